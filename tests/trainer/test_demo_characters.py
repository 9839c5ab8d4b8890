"""The demo's bars for three more characters, each with a data set of its own: minutes, so marked slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from loragraft.trainer.demo import run
from loragraft.trainer.demo.creatures import MORE_SEEDS
from loragraft.trainer.demo.make_dataset import write_dataset


@pytest.mark.slow
@pytest.mark.parametrize("seed", MORE_SEEDS)
def test_another_character_meets_the_bars(seed: int, tmp_path: Path) -> None:
    write_dataset(tmp_path / "images", seed)
    summary = run.demo(tmp_path / "images", seed, tmp_path / "out", device="cpu")
    assert summary["recognised"] >= 0.80
    assert summary["recognised_without_lora"] <= 0.05
    assert summary["background_obeyed"] >= 0.70
