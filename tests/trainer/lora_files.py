"""LoRA files for the tests of the tools: the reference's, and one for every layer of a tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.tools import deltas, lora_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

Tensors = Mapping[str, torch.Tensor]


def change(module: lora_file.Module) -> torch.Tensor:
    """Return a module's change of the weight as a matrix."""
    return deltas.delta(module).flatten(1)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    return float((found - wanted).norm() / wanted.norm())


def golden_tensors() -> dict[str, dict[str, torch.Tensor]]:
    """Return the reference's tensors by what they are of."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(GOLDEN / "lora_tools.safetensors").items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def as_file(tensors: Tensors, name: str = "x", **metadata: str) -> lora_file.LoraFile:
    return lora_file.parse(tensors, metadata, name=name)


def tiny_lora(base: api.Base, folder: Path) -> Path:
    """Write a LoRA with random tensors for every layer of the tiny model that is trained."""
    rng = torch.Generator().manual_seed(8)
    parts = base.load()
    tensors: dict[str, torch.Tensor] = {}
    for target in base.family.targets(parts, convolutions=True):
        root: Any = parts.denoiser if target.part == "denoiser" else parts.text_encoder
        out, fan_in, *kernel = root.get_submodule(target.path).weight.shape
        tensors[f"{target.key}.lora_down.weight"] = torch.randn(4, fan_in, *kernel, generator=rng) * 0.1
        tensors[f"{target.key}.lora_up.weight"] = (
            torch.randn(out, 4, *(1 for _ in kernel), generator=rng) * 0.1
        )
        tensors[f"{target.key}.alpha"] = torch.tensor(2.0)
    path = folder / "tiny_lora.safetensors"
    save_file(tensors, path, {"ss_clip_skip": "1"})
    return path
