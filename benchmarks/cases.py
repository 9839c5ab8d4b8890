"""The tables: what is trained (cases), with which of our settings (variants), and against whom (peers)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A model of true size, see `architectures`; ``steps`` include ``warmup``, whose steps do not count."""

    resolution: int
    batch_size: int
    precision: str
    device: str
    steps: int
    warmup: int
    architecture: str = "sd15"


CASES = {
    "sd15-256-b1-fp32": Case(256, 1, "fp32", "cpu", 12, 3),
    "sd15-256-b4-fp32": Case(256, 4, "fp32", "cpu", 8, 2),
    "sd15-256-b1-bf16": Case(256, 1, "bf16", "cpu", 12, 3),
    "sd15-256-b4-bf16": Case(256, 4, "bf16", "cpu", 8, 2),
    "sd15-512-b1": Case(512, 1, "bf16", "cuda", 100, 30),
    "sd15-512-b8": Case(512, 8, "bf16", "cuda", 60, 20),
    "sdxl-256-b1-bf16": Case(256, 1, "bf16", "cpu", 5, 1, "sdxl"),
    "sdxl-1024-b1": Case(1024, 1, "bf16", "cuda", 40, 15, "sdxl"),
    "sdxl-1024-b4": Case(1024, 4, "bf16", "cuda", 24, 10, "sdxl"),
    "flux-1-2-256-b1-bf16": Case(256, 1, "bf16", "cpu", 5, 1, "flux-1-2"),
    "flux-4-8-1024-b1": Case(1024, 1, "bf16", "cuda", 30, 10, "flux-4-8"),
    "flux-1024-b1": Case(1024, 1, "bf16", "cuda", 24, 10, "flux"),
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
    "ours smallest": {"gradient_checkpointing": True},  # and what the architecture adds
}
ENGINES = ("ours", "ours eager", "ours fused")  # run unless others are named; "ours" is engine = auto
LOSSY = {name for name, settings in VARIANTS.items() if "base_storage" in settings} | {"ours smallest"}

# Without these a table does not count. CPU targets name kohya and the plain loop only, and so do tables of
# other architectures than SD1.5, on which the benchmark runs no other peer.
NEEDED_ALWAYS = ("kohya", "peft loop")
NEEDED_PEERS = {
    "cpu": NEEDED_ALWAYS,
    "cuda": (*NEEDED_ALWAYS, "comfyui", "onetrainer"),
}

# ComfyUI's node can change the layers' outputs (by far the faster way) or, its default, the weights.
COMFYUI_VARIANTS: dict[str, dict[str, Any]] = {
    "comfyui": {"bypass_mode": True},
    "comfyui weights": {"bypass_mode": False},
}
KOHYA_VARIANTS: dict[str, dict[str, Any]] = {
    "kohya": {},
    "kohya checkpointed": {"gradient_checkpointing": True},
    "kohya smallest": {"gradient_checkpointing": True},  # and what the architecture adds
}
PEERS = ("kohya", "peft loop", "comfyui", "onetrainer")  # run unless others are named
