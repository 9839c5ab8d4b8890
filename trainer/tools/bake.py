"""Merge LoRAs into a checkpoint: W + ratio (alpha / r) up down, tensor by tensor into a new file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapters import full, norm
from ..adapters.files import DTYPES, compact
from ..errors import LoraGraftError, listed
from .convert import to_common
from .deltas import ON_WEIGHT, bias_change, delta, refusal
from .lora_file import LoraFile, Module, check_free
from .places import Place, places_in
from .stream import Form, open_weights, weights_metadata, write_stream

OTHER_BASE = "use the LoRA with a checkpoint, or a denoiser's file, of the kind that it was trained on"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def merge_into_checkpoint(
    checkpoint: Path,
    loras: Sequence[tuple[LoraFile, float]],
    output: Path,
    *,
    precision: str = "same",
    overwrite: bool = False,
    device: str = "cpu",
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write ``checkpoint`` with every LoRA at its ratio in it; computed in float32.

    ``precision`` is "same" (each tensor keeps its number format) or one of fp16, bf16, fp32. Memory stays at
    about one tensor, whatever the file's size. Raises LG-TOOL-003, -004, -005, -008, -010, -011.
    """
    check_free(output, overwrite=overwrite)
    _check(checkpoint, loras, output, precision)
    weights = open_weights(checkpoint)

    def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
        return DTYPES[precision] if precision != "same" and dtype in FLOATS else dtype

    forms, made = merged(weights, loras, checkpoint.name, dtype_of, device=device)
    told = weights_metadata(checkpoint) | {
        "modelspec.merged_from": ", ".join([checkpoint.stem, *(Path(file.name).stem for file, _ in loras)]),
        "loragraft_merged": compact(
            {
                "checkpoint": checkpoint.name,
                "files": [f.name for f, _ in loras],
                "ratios": [r for _, r in loras],
            }
        ),
    }
    write_stream(output, forms, made, told, tell=tell)
    return output


def merged(
    weights: Mapping[str, torch.Tensor],
    loras: Sequence[tuple[LoraFile, float]],
    where: str,
    dtype_of: Callable[[str, torch.dtype], torch.dtype],
    *,
    device: str = "cpu",
) -> tuple[dict[str, Form], Callable[[str], torch.Tensor]]:
    """Return what `write_stream` writes: the form of every tensor, and each as it is asked for.

    ``weights`` are under single-file names; ``dtype_of`` says in which number format a tensor is written.
    Raises LG-TOOL-003 and -010 at once, -010 and -011 when a tensor is made.
    """
    changes = _changes(places_in(weights), loras, where, weights)

    def made(name: str) -> torch.Tensor:
        weight = weights[name]
        dtype = dtype_of(name, weight.dtype)
        if name in changes:
            weight = _changed(name, weight, changes[name], device)
        result = weight.to(dtype)
        if name in changes and not bool(torch.isfinite(result).all()):
            raise LoraGraftError(
                "LG-TOOL-011",
                "A merged weight is too large for the checkpoint's number format.",
                where=name,
                why="the checkpoint would draw black or broken images.",
                fix="write it as fp32 or bf16, or merge at a lower ratio",
            )
        return result

    def form(tensor: torch.Tensor, name: str) -> Form:
        return dtype_of(name, tensor.dtype), tuple(tensor.shape)

    return {name: form(weights[name], name) for name in weights}, made


@dataclass(frozen=True)
class _Change:
    """What one module of a LoRA adds to a tensor of the checkpoint, to its weight or its bias."""

    place: Place
    module: Module
    ratio: float
    is_bias: bool = False

    def added_to(self, merged: torch.Tensor, before: torch.Tensor, device: str) -> None:
        """Add it to ``merged``, in place; ``before`` is the tensor without any LoRA."""
        rows, plain = self.place.rows(merged), self.place.rows(before).float()
        if self.is_bias:
            change = bias_change(self.module)
            assert change is not None
            _check_shape(self.module, tuple(change.shape), rows)
        else:
            _check_shape(self.module, _shape_of(self.module, rows), rows)
            change = delta(_on(self.module, device), plain.to(device)).cpu()
        rows += self.ratio * change


def _changes(
    places: dict[str, Place],
    loras: Sequence[tuple[LoraFile, float]],
    where: str,
    weights: Mapping[str, torch.Tensor],
) -> dict[str, list[_Change]]:
    """List for every tensor that changes what is added to it, in the LoRAs' order."""
    changes: dict[str, list[_Change]] = {}
    for file, ratio in loras:
        common = to_common(file)
        if others := [m for m in common.modules.values() if m.kind not in ON_WEIGHT]:
            raise refusal(others, "Merging into a checkpoint")
        biases = {n: _bias_of(places[n]) for n, m in common.modules.items() if n in places and _moves_bias(m)}
        unknown = [name for name in common.modules if name not in places]
        unknown += [f"{name} (bias)" for name, place in biases.items() if place.key not in weights]
        if unknown:
            raise LoraGraftError(
                "LG-TOOL-010",
                f"{len(unknown)} of the LoRA's {len(common.modules)} modules are not in this checkpoint.",
                where=f"{file.name} and {where}: {listed(unknown, limit=3)}",
                why="these parts would be left out in silence.",
                fix=OTHER_BASE,
            )
        for name, module in common.modules.items():
            changes.setdefault(places[name].key, []).append(_Change(places[name], module, ratio))
            if name in biases:
                changes.setdefault(biases[name].key, []).append(_Change(biases[name], module, ratio, True))
    return changes


def _moves_bias(module: Module) -> bool:
    return bias_change(module) is not None


def _bias_of(place: Place) -> Place:
    """Return where the bias of a weight lies."""
    whole = place.key.removesuffix("weight")  # OpenCLIP has in_proj_weight and in_proj_bias
    return replace(place, key=f"{whole}bias")


def _changed(name: str, weight: torch.Tensor, changes: Sequence[_Change], device: str) -> torch.Tensor:
    if weight.dtype not in FLOATS:
        raise LoraGraftError(
            "LG-TOOL-011",
            f"The checkpoint's weights are {str(weight.dtype).removeprefix('torch.')}.",
            where=name,
            why="quantised weights cannot take a small change: it would be rounded away.",
            fix="use the fp16, bf16 or fp32 version of the checkpoint",
        )
    before = weight.cpu()
    merged = before.float().clone()
    for change in changes:
        change.added_to(merged, before, device)
    return merged


def _shape_of(module: Module, rows: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the weight that a module changes, where its tensors tell it."""
    if module.kind == "LoRA":
        return module.shape()
    whole = next(
        (module.tensors[role] for role in (full.WEIGHT, norm.WEIGHT) if role in module.tensors), rows
    )
    return tuple(whole.shape)


def _check_shape(module: Module, shape: tuple[int, ...], rows: torch.Tensor) -> None:
    if math.prod(shape) != rows.numel() or shape[:2] != tuple(rows.shape[:2]):
        raise LoraGraftError(
            "LG-TOOL-010",
            "A module of the LoRA has another shape than the checkpoint's weight.",
            where=f"{module.name}: {shape}, checkpoint {tuple(rows.shape)}",
            why="it was trained on another model.",
            fix=OTHER_BASE,
        )


def _on(module: Module, device: str) -> Module:
    if device == "cpu":
        return module
    return replace(
        module, tensors={k: t if k == "alpha" else t.to(device) for k, t in module.tensors.items()}
    )


def _check(checkpoint: Path, loras: Sequence[tuple[LoraFile, float]], output: Path, precision: str) -> None:
    reason = None
    if not loras:
        reason = "no LoRA is named."
    elif not all(math.isfinite(ratio) and ratio != 0 for _, ratio in loras):
        reason = "a ratio of 0 would merge nothing."
    elif precision not in ("same", *DTYPES):
        reason = f"{precision[:20]!r} is no number format; known are same, {', '.join(DTYPES)}."
    elif output.resolve() == checkpoint.resolve():
        reason = "the result would replace the checkpoint that it is read from."
    if reason:
        raise LoraGraftError(
            "LG-TOOL-005",
            "The LoRA cannot be merged so.",
            where=f"{checkpoint.name} with {len(loras)} LoRAs into {output.name}",
            why=reason,
            fix="name one LoRA or more, ratios other than 0, and another output file",
        )
