"""Single-file weights cut into files of their own, for the tests of bases in several files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from loragraft.trainer.families import FAMILIES
from loragraft_tests.trainer.tiny_families import TOKENIZERS

Tensors = Mapping[str, torch.Tensor]

VAES = ("first_stage_model.", "vae.")
LORA = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 32),
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.zeros(32, 4),
}


def write(path: Path, weights: Tensors) -> Path:
    save_file({k: weights[k].detach().contiguous().clone() for k in weights}, path)
    return path


def below(weights: Tensors, *prefixes: str) -> dict[str, torch.Tensor]:
    """Return the weights below prefixes, without them."""
    return {k.removeprefix(p): weights[k] for p in prefixes for k in weights if k.startswith(p)}


def tokenizers_of(family: str, folder: Path) -> list[Path]:
    return [TOKENIZERS[kind](folder / kind) for kind in sorted(set(FAMILIES[family].encoders.values()))]
