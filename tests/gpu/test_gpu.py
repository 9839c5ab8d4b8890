"""Training on a GPU against the same training on the CPU: a tiny random model, so mechanics only."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from loragraft.trainer import api
from loragraft_tests.trainer import runs, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> api.Base:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny.write_tokenizer(folder / "tokenizer")
    return api.open_base(tiny.write_checkpoint(folder / "tiny.safetensors"), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def train_set(tmp_path_factory: pytest.TempPathFactory) -> api.TrainSet:
    root = tmp_path_factory.mktemp("images")
    tiny.write_images(root / "2_zibu", [(32, 32), (40, 24), (24, 40), (32, 32)])
    return runs.train_set(root)


def _losses(base: api.Base, train_set: api.TrainSet, out: Path, device: str, precision: str) -> list[float]:
    config = runs.settings(max_train_steps=8, mixed_precision=precision, preview_image=False)
    places = api.Places(out / "runs", out / "loras", out / "cache")
    *_, last = api.train(base, train_set, config, places=places, device=device)
    assert isinstance(last, api.Finished)
    return list(last.losses)


def test_fp32_losses_agree_with_the_cpu(base: api.Base, train_set: api.TrainSet, tmp_path: Path) -> None:
    on_cpu = _losses(base, train_set, tmp_path / "cpu", "cpu", "fp32")
    on_gpu = _losses(base, train_set, tmp_path / "gpu", "cuda", "fp32")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(
    base: api.Base, train_set: api.TrainSet, tmp_path: Path, precision: str
) -> None:
    full = _losses(base, train_set, tmp_path / "full", "cuda", "fp32")
    half = _losses(base, train_set, tmp_path / "half", "cuda", precision)
    assert half == pytest.approx(full, rel=5e-2)


def test_memory_is_given_back(base: api.Base, train_set: api.TrainSet, tmp_path: Path) -> None:
    _losses(base, train_set, tmp_path / "warm", "cuda", "bf16")
    gc.collect()
    before = torch.cuda.memory_allocated()
    _losses(base, train_set, tmp_path / "again", "cuda", "bf16")
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 16 * 2**20
