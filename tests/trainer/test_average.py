"""The average of the trained weights: its formula, and that it is what is saved and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loragraft.trainer import api
from loragraft.trainer.optim.average import Average, decay_at
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal

SAVED = {"save_precision": "fp32", "save_every_n_steps": 1, "max_train_steps": 4, "learning_rate": 1e-2}
SAVED |= {"network_train_unet_only": True, "sample_prompts": ["a"], "sample_every_n_steps": 2}


def lora_at(finished: api.Finished, step: int) -> dict[str, torch.Tensor]:
    """Return the LoRA as it was saved after ``step``."""
    return load_file(finished.run_folder / "ckpt" / f"step-{step:06d}" / "lora.safetensors")


@pytest.mark.parametrize(("step", "decay"), [(1, 2 / 6), (3, 4 / 8), (95, 0.96), (96, 0.96), (10**6, 0.96)])
def test_the_first_steps_are_soon_forgotten(step: int, decay: float) -> None:
    assert decay_at(step, 0.96) == pytest.approx(decay)


def test_a_look_at_the_average_leaves_no_trace() -> None:
    values = [torch.randn(5, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    average = Average(values, 0.9)
    before = [value.clone() for value in values]
    for value in values:
        value += 1.0
    average.take(1)
    with average.in_place():
        for value, start in zip(values, before, strict=True):
            torch.testing.assert_close(value, start + 2 / 3)
    for value, start in zip(values, before, strict=True):
        assert torch.equal(value, start + 1.0)


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_what_is_saved_is_the_average_of_all_steps(training: runs.Training, engine: str) -> None:
    plain = training.finish(engine=engine, **SAVED)
    events = training.elsewhere("average").events(engine=engine, ema_decay=0.45, **SAVED)
    finished, planned = runs.only(events, api.Finished), runs.only(events, api.Planned)
    assert finished.losses == plain.losses, "the training itself is the same"
    assert any("an average of the weights" in line and "0.45" in line for line in planned.lines)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 5):
        now = lora_at(plain, step)
        stays = min(0.45, (1 + step) / (5 + step))
        first = {k: torch.zeros_like(v) if k.endswith("lora_up.weight") else None for k, v in now.items()}
        for name, value in now.items():
            if name.endswith(".lora_up.weight"):  # these begin at zero, so that their start is known
                before = expected.get(name, first[name])
                expected[name] = stays * before + (1 - stays) * value
        found = lora_at(finished, step)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8)
            assert not torch.equal(found[name], now[name])
    sampled = [e.image.tobytes() for e in runs.of(events, api.Sampled)]
    assert len(sampled) == 2 and sampled[0] != sampled[1]


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_a_stopped_run_ends_with_the_same_average(training: runs.Training, engine: str) -> None:
    changes = {"engine": engine, "ema_decay": 0.9, "max_train_steps": 3}
    whole = training.finish(**changes)
    again = training.elsewhere("again")
    again.stop_after(1, **changes)
    parts = again.finish(**changes)
    assert parts.lora_file.read_bytes() == whole.lora_file.read_bytes()
    assert runs.newest(parts.run_folder).joinpath("train_state.safetensors").read_bytes() == (
        runs.newest(whole.run_folder).joinpath("train_state.safetensors").read_bytes()
    )


def test_trained_words_are_averaged_too(training: runs.Training, tmp_path: Path) -> None:
    changes = {"train_embeddings": ["zibu=a*2"], "embedding_lr": 0.1, "max_train_steps": 2, "engine": "eager"}
    plain = training.finish(**changes)
    averaged = training.elsewhere("average").finish(ema_decay=0.9, **changes)
    own, theirs = (
        load_file(f.lora_file.with_name(f"{f.lora_file.stem}-zibu.safetensors"))["emb_params"]
        for f in (averaged, plain)
    )
    assert own.shape == theirs.shape and not torch.equal(own, theirs)


def test_two_averages_are_refused(training: runs.Training) -> None:
    with Refusal("LG-CFG-004", "ema_decay", "AdamWScheduleFree"):
        runs.settings(
            optimizer_type="AdamWScheduleFree", lr_scheduler="constant", lr_warmup_steps=0, ema_decay=0.9
        )
