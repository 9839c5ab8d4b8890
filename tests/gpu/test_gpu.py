"""Training on a GPU against the same training on the CPU: a tiny random model, so mechanics only."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from loragraft.trainer import api

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def _run(base: api.Base, train_set: api.TrainSet, out: Path, device: str, precision: str) -> api.Finished:
    config = api.make(
        api.TrainConfig,
        {
            "output_name": "gpu",
            "network_dim": 4,
            "max_train_steps": 8,
            "learning_rate": 1e-3,
            "mixed_precision": precision,
            "preview_image": False,
        },
    )
    places = api.Places(out / "runs", out / "loras", out / "cache")
    *_, last = api.train(base, train_set, config, places=places, device=device)
    assert isinstance(last, api.Finished)
    return last


@pytest.fixture
def tiny_run(
    tmp_path: Path, tiny_base: api.Base, tiny_train_set: api.TrainSet
) -> tuple[api.Base, api.TrainSet, Path]:
    return tiny_base, tiny_train_set, tmp_path


def test_fp32_losses_agree_with_the_cpu(tiny_run: tuple[api.Base, api.TrainSet, Path]) -> None:
    base, train_set, out = tiny_run
    on_cpu = _run(base, train_set, out / "cpu", "cpu", "fp32")
    on_gpu = _run(base, train_set, out / "gpu", "cuda", "fp32")
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(
    tiny_run: tuple[api.Base, api.TrainSet, Path], precision: str
) -> None:
    base, train_set, out = tiny_run
    full = _run(base, train_set, out / "full", "cuda", "fp32")
    half = _run(base, train_set, out / "half", "cuda", precision)
    assert half.losses == pytest.approx(full.losses, rel=5e-2)


def test_memory_is_given_back(tiny_run: tuple[api.Base, api.TrainSet, Path]) -> None:
    base, train_set, out = tiny_run
    _run(base, train_set, out / "warm", "cuda", "bf16")
    gc.collect()
    before = torch.cuda.memory_allocated()
    _run(base, train_set, out / "again", "cuda", "bf16")
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 16 * 2**20
