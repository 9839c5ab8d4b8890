"""Stopped and continued at 300 places, over every kind of state that a run has: each time the same bytes.

A run that is stopped after every single step is compared with one that never was, state by state: if each
state that was put back from disk leads to the next one's bytes, so does every run with any stops.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer import api
from loragraft_tests.trainer import runs, tiny

STEPS = 13  # 12 stops; five images in batches of two: epochs end within, at and after accumulated steps
SPLITS = 300
SMALL = {
    "train_batch_size": 2,
    "network_dim": 2,
    "network_alpha": 1,
    "max_train_steps": STEPS,
    "save_every_n_steps": 1,
    "network_train_unet_only": True,
    "sample_steps": 1,
    "validation_timesteps": 1,
    "log_with": "none",
}
TELLS = {
    "sample_prompts": ["zibu --w 64 --h 64"],
    "sample_every_n_steps": 4,
    "validate_every_n_steps": 3,
    "publish_checkpoints": True,
}
VARIED = {
    "shuffle_caption": True,
    "caption_dropout_rate": 0.3,
    "caption_tag_dropout_rate": 0.2,
    "flip_aug": True,
    "token_warmup_step": 9,
    "validation_split": 0.3,
}

# Settings of the run; those of the images are added to every second one.
VARIANTS: dict[str, dict[str, Any]] = {
    "everything": {
        **TELLS,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine_with_restarts",
        "lr_scheduler_num_cycles": 2,
        "lr_warmup_steps": 3,
        "network_train_unet_only": False,
        "text_encoder_lr": 1e-4,
    },
    "constant": {"lr_scheduler": "constant"},
    "warm-up": {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5, **TELLS},
    "cosine": {"lr_scheduler": "cosine"},
    "linear": {"lr_scheduler": "linear", "lr_warmup_steps": 0.25, "gradient_accumulation_steps": 3},
    "polynomial": {"lr_scheduler": "polynomial", "lr_scheduler_power": 0.5},
    "inverse_sqrt": {"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 2},
    "min_lr": {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1},
    "eager": {"engine": "eager", "optimizer_args": ["weight_decay=0.1"]},
    "amsgrad": {"optimizer_args": ["amsgrad=True"], "gradient_accumulation_steps": 2},
    "text": {"network_train_unet_only": False, "text_encoder_lr": 1e-4, "clip_skip": 2},
    "half": {"mixed_precision": "bf16"},
    "scaler": {"mixed_precision": "fp16", "lr_scheduler": "linear"},
    "convolutions": {"conv_dim": 2, "gradient_checkpointing": True},
    "dropouts": {"network_dropout": 0.3, "gradient_accumulation_steps": 2},
    "noise": {"noise_offset": 0.1, "multires_noise_iterations": 3, "ip_noise_gamma": 0.1},
    "loss": {"loss_type": "huber", "min_snr_gamma": 5.0},
    "uncached": {"cache_latents": False},
    "norms": {"scale_weight_norms": 0.01},
    "Lion": {"optimizer_type": "Lion", "learning_rate": 1e-4},
    "SGDNesterov": {"optimizer_type": "SGDNesterov", "learning_rate": 0.01},
    "Adafactor": {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]},
    "Prodigy": {"optimizer_type": "Prodigy", "learning_rate": 1.0, "gradient_accumulation_steps": 2},
    "DAdaptAdam": {"optimizer_type": "DAdaptAdam", "learning_rate": 1.0},
    "schedule-free": {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "constant", **TELLS},
    "8bit": {"optimizer_type": "AdamW8bit"},
}
NEEDS = {
    "Prodigy": "pytorch_optimizer",
    "DAdaptAdam": "pytorch_optimizer",
    "schedule-free": "pytorch_optimizer",
    "8bit": "bitsandbytes",
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[api.TrainSet]:
    """Return the images as they are trained plainly, and with varied captions, flips and some kept out."""
    root = tmp_path_factory.mktemp("split")
    tiny.write_images(root / "1_zibu", [(16, 16), (16, 16), (24, 16), (16, 16), (24, 16)])
    return [runs.train_set(root), runs.train_set(root, **VARIED)]


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Return the LoRA and the training state; state.json also tells what was measured after the save."""
    return {n: (checkpoint / n).read_bytes() for n in ("lora.safetensors", "train_state.safetensors")}


def told(training: runs.Training) -> dict[str, bytes]:
    """Return what is published, drawn and measured."""
    folder = runs.run_folder(training.places)
    files = runs.tree(training.places.loras)
    files |= {f"samples/{k}": v for k, v in runs.tree(folder / "samples").items()}
    extra = [folder / "validation.jsonl", folder / "best.json"]
    return files | {p.name: p.read_bytes() for p in extra if p.exists()}


def split_everywhere(training: runs.Training, options: dict[str, Any]) -> int:
    """Compare a run that is stopped after each step with one that is not; return the number of stops."""
    never = training.elsewhere("never")
    expected = [contents(e.folder) for e in never.start(**options) if isinstance(e, api.Saved)]
    assert len(expected) == STEPS
    for step in range(1, STEPS):
        training.stop_after(step, **options)
        found = contents(runs.newest(runs.run_folder(training.places)))
        differing = [name for name in found if found[name] != expected[step - 1][name]]
        assert not differing, f"step {step}: {differing}"
    training.finish(**options)
    assert told(training) == told(never)
    return STEPS - 1


def options_of(name: str) -> dict[str, Any]:
    needed = NEEDS.get(name)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"no {needed}: pip install {needed}")
    return {**SMALL, **VARIANTS[name]}


def place(training: runs.Training, name: str, sets: list[api.TrainSet]) -> runs.Training:
    varied = name == "everything" or list(VARIANTS).index(name) % 2 == 1
    return dataclasses.replace(training, train_set=sets[varied or "validate_every_n_steps" in VARIANTS[name]])


def test_a_dozen_places_in_a_run_with_everything(training: runs.Training, sets: list[api.TrainSet]) -> None:
    """Accumulation, warm-up, both parts, varied captions, mirroring, validation, samples, early files."""
    assert split_everywhere(place(training, "everything", sets), options_of("everything")) == 12


@pytest.mark.slow
@pytest.mark.parametrize("name", list(VARIANTS))
def test_everywhere(training: runs.Training, sets: list[api.TrainSet], name: str) -> None:
    assert split_everywhere(place(training, name, sets), options_of(name)) == STEPS - 1


def test_there_are_enough_places() -> None:
    assert len(VARIANTS) * (STEPS - 1) >= SPLITS
