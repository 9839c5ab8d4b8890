"""Small checkpoints with known content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loragraft.trainer.checkpoint import Checkpoint, RunFolder


def content(step: int) -> tuple[Any, ...]:
    """Return what a run saves at this step: step, LoRA, metadata, training state, facts."""
    lora = {"lora_unet_a.lora_up.weight": torch.full((3, 2), float(step)), "b": torch.ones(1)}
    state = {"adapter.a": torch.full((5,), float(step)), "micro_losses": torch.arange(step).float()}
    return step, lora, {"ss_steps": str(step)}, state, {"step": step, "run": "r" * 64}


def save(folder: Path, step: int) -> Checkpoint:
    """Save the checkpoint of this step into a run folder."""
    return RunFolder(folder).save(*content(step))


def write_history(folder: Path) -> Path:
    """Write checkpoints 2, 5 and 10; of the first only the LoRA is kept."""
    for step in (2, 5, 10):
        save(folder, step)
    return folder
