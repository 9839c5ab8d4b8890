"""The tables: what is trained (cases), with which of our settings (variants), and against whom (peers)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """SD1.5 of true size; ``steps`` include ``warmup``, whose steps do not count."""

    resolution: int
    batch_size: int
    precision: str
    device: str
    steps: int
    warmup: int


CASES = {
    "sd15-256-b1-fp32": Case(256, 1, "fp32", "cpu", 12, 3),
    "sd15-256-b4-fp32": Case(256, 4, "fp32", "cpu", 8, 2),
    "sd15-256-b1-bf16": Case(256, 1, "bf16", "cpu", 12, 3),
    "sd15-256-b4-bf16": Case(256, 4, "bf16", "cpu", 8, 2),
    "sd15-512-b1": Case(512, 1, "bf16", "cuda", 100, 30),
    "sd15-512-b8": Case(512, 8, "bf16", "cuda", 60, 20),
}

TRAINED = {"unet": False, "unet+text": True}  # name -> whether the text encoder is trained too

# Settings of ours against the defaults, each on its own. A variant that the trainer refuses on this
# machine (captured steps without a GPU) is left out with its reason.
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours eager": {"engine": "eager"},
    "ours fused": {"engine": "fused"},
    "ours captured": {"engine": "captured"},
    "ours plain attention": {"attention": "plain"},
    "ours checkpointed": {"gradient_checkpointing": True},
    "ours swapped": {"gradient_checkpointing": True, "blocks_to_swap": 8},
    "ours fp8 base": {"base_storage": "fp8"},
    "ours int8 base": {"base_storage": "int8"},
    "ours nf4 base": {"base_storage": "nf4"},
    "ours strict": {"deterministic": True},
}
ENGINES = ("ours", "ours eager", "ours fused")  # run unless others are named; "ours" is engine = auto
LOSSY = {name for name, settings in VARIANTS.items() if "base_storage" in settings}

# Without these a table does not count. CPU targets name kohya and the plain loop only.
NEEDED_PEERS = {
    "cpu": ("kohya", "peft loop"),
    "cuda": ("kohya", "peft loop", "comfyui", "onetrainer"),
}

# ComfyUI's node can change the layers' outputs (by far the faster way) or, its default, the weights.
COMFYUI_VARIANTS: dict[str, dict[str, Any]] = {
    "comfyui": {"bypass_mode": True},
    "comfyui weights": {"bypass_mode": False},
}
PEERS = ("kohya", "peft loop", "comfyui", "onetrainer")  # run unless others are named
