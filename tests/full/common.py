"""What the full-size tests train: two steps whose LoRA has a size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loragraft.trainer import api

MODULES = 264  # 192 in the U-Net, 72 in the text encoder
TOLERANCE = 1e-3  # relative, of each module's weight change
SIDE = 256
DATASET: dict[str, Any] = {"resolution": SIDE, "enable_bucket": True}
# A rate at which two steps give the up tensors, which start at zero, a size that a comparison can see.
SETTINGS: dict[str, Any] = {
    "output_name": "full_size",
    "network_dim": 32,
    "network_alpha": 16.0,
    "learning_rate": 1e-2,
    "lr_scheduler": "constant",
    "max_train_steps": 2,
    "mixed_precision": "fp32",
    "preview_image": False,
    "seed": 7,
}


@dataclass(frozen=True)
class Trained:
    """A headless run: the LoRA file and all its events."""

    lora: Path
    events: list[api.Event]
