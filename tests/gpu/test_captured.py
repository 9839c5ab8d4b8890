"""Captured steps against eager ones, on a tiny random model: the same function, its state and its memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft_tests.trainer import runs, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave TF32 out of float32: two algorithms for one convolution would differ by 1e-3."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> api.Base:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny.write_tokenizer(folder / "tokenizer")
    return api.open_base(tiny.write_checkpoint(folder / "tiny.safetensors"), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def train_set(tmp_path_factory: pytest.TempPathFactory) -> api.TrainSet:
    root = tmp_path_factory.mktemp("images")
    tiny.write_images(root / "2_zibu", [(32, 32), (40, 24), (24, 40), (32, 32), (32, 32)])
    return runs.train_set(root)


def train(
    base: api.Base, train_set: api.TrainSet, out: Path, **settings: Any
) -> tuple[api.Finished, list[api.Event]]:
    """Train on the GPU; return the end and all events."""
    config = runs.settings(**{"max_train_steps": 50, "preview_image": False, **settings})
    places = api.Places(out / "runs", out / "loras", out / "cache")
    events = list(api.train(base, train_set, config, places=places, device="cuda"))
    assert isinstance(events[-1], api.Finished)
    return events[-1], events


VARIANTS: dict[str, dict[str, Any]] = {
    "text encoder and U-Net": {},
    "U-Net alone": {"network_train_unet_only": True},
    "convolutions": {"conv_dim": 2, "conv_alpha": 1.0},
    "accumulation": {"gradient_accumulation_steps": 3},
    "clip skip": {"clip_skip": 2},
    "warm-up and cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 5, "min_snr_gamma": 5.0},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fifty_fused_and_captured_steps_are_fifty_eager_ones(
    base: api.Base, train_set: api.TrainSet, tmp_path: Path, variant: str
) -> None:
    options = {**VARIANTS[variant], "mixed_precision": "fp32"}
    eager, _ = train(base, train_set, tmp_path / "eager", engine="eager", **options)
    for engine in ("fused", "captured"):
        found, events = train(base, train_set, tmp_path / engine, engine=engine, **options)
        assert not [e.text for e in runs.of(events, api.Note) if "not captured" in e.text]
        assert any(f"{engine} steps" in line for line in runs.of(events, api.Planned)[0].lines)
        assert found.losses == pytest.approx(eager.losses, rel=1e-4)


@pytest.mark.parametrize("engine", ["fused", "captured"])
def test_runs_side_by_side_learn_what_they_learn_alone(
    base: api.Base, train_set: api.TrainSet, tmp_path: Path, engine: str
) -> None:
    common = {"max_train_steps": 20, "preview_image": False, "mixed_precision": "fp32", "engine": engine}
    jobs = [{"learning_rate": 1e-3}, {"learning_rate": 3e-3, "network_dim": 6}, {"seed": 7}]
    pairs = [
        (train_set, runs.settings(output_name=f"run{n}", **{**common, **job})) for n, job in enumerate(jobs)
    ]
    places = api.Places(tmp_path / "runs", tmp_path / "loras", tmp_path / "cache")
    events = api.train_together(base, pairs, places=places, device="cuda")
    many = {number: event for number, event in events if isinstance(event, api.Finished)}
    for number, job in enumerate(jobs):
        alone, _ = train(base, train_set, tmp_path / f"alone{number}", **{**common, **job})
        assert many[number].losses == pytest.approx(alone.losses, rel=1e-4)


def test_bf16_follows_its_eager_self(base: api.Base, train_set: api.TrainSet, tmp_path: Path) -> None:
    eager, _ = train(base, train_set, tmp_path / "eager", engine="eager", mixed_precision="bf16")
    captured, _ = train(base, train_set, tmp_path / "captured", mixed_precision="bf16")
    assert captured.losses == pytest.approx(eager.losses, rel=2e-2)


@pytest.mark.parametrize("engine", ["captured", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_run_ends_in_the_same_bytes(
    base: api.Base, train_set: api.TrainSet, tmp_path: Path, engine: str, precision: str
) -> None:
    options: dict[str, Any] = {"max_train_steps": 12, "mixed_precision": precision, "engine": engine}
    options |= {"deterministic": True, "preview_image": False}
    straight, _ = train(base, train_set, tmp_path / "straight", **options)
    out = tmp_path / "stopped"
    places = api.Places(out / "runs", out / "loras", out / "cache")
    events = api.train(base, train_set, runs.settings(**options), places=places, device="cuda")
    for event in events:
        if isinstance(event, api.Step) and event.step == 5:
            events.close()
    continued, _ = train(base, train_set, out, **options)
    assert continued.losses == straight.losses
    assert continued.lora_file.read_bytes() == straight.lora_file.read_bytes()


def test_graphs_give_their_memory_back(base: api.Base, train_set: api.TrainSet, tmp_path: Path) -> None:
    train(base, train_set, tmp_path / "warm", mixed_precision="bf16", max_train_steps=6)
    gc.collect()
    before = torch.cuda.memory_allocated()
    train(base, train_set, tmp_path / "again", mixed_precision="bf16", max_train_steps=6)
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 16 * 2**20


def test_a_capture_that_fails_is_said_and_runs_eagerly(
    base: api.Base, train_set: api.TrainSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loragraft.trainer import losses

    real = losses.diffusion_losses

    def on_the_host(*tensors: Any) -> torch.Tensor:
        found = real(*tensors)
        return found * (1.0 if found.sum().item() > 0 else 2.0)  # reads the loss: no graph can hold that

    monkeypatch.setattr(losses, "diffusion_losses", on_the_host)
    options: dict[str, Any] = {"max_train_steps": 6, "mixed_precision": "fp32"}
    captured, events = train(base, train_set, tmp_path / "captured", **options)
    assert [e for e in runs.of(events, api.Note) if "not captured" in e.text]
    monkeypatch.setattr(losses, "diffusion_losses", real)
    eager, _ = train(base, train_set, tmp_path / "eager", engine="eager", **options)
    assert captured.losses == pytest.approx(eager.losses, rel=1e-4)
