"""Check a LoRA file: size and norm of every tensor, what no gradient reached, and what is not finite.

A LoRA's up tensors begin at zero, so that one which is still zero was never trained. At clip_skip 2 the text
encoder's last layer takes no part in the conditioning, which leaves its six modules (q, k, v, out, fc1, fc2)
so; SDXL's first text encoder is always read so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.files import read_metadata, read_tensors
from .architecture import architecture_of
from .deltas import FREE, delta
from .lora_file import Module, parse

LAYER_MODULES = 6  # of a CLIP layer that a LoRA trains
SKIPPING = ("sd", "sd2")  # architectures whose text encoder clip_skip is for
REASONS = {"sdxl": "SDXL's first text encoder is read before its last layer"}
FIRST_ENCODER = re.compile(r"lora_te1_|text_encoder\.|text_encoders\.clip_l\.")
LAYER = re.compile(r"^(?:lora_te|text_encoder).*text_model[._]encoder[._]layers[._](\d+)[._]")


@dataclass(frozen=True)
class TensorRow:
    """One tensor: its name and shape, the mean and the least of its absolute values, and its norm."""

    key: str
    shape: tuple[int, ...]
    mean: float
    minimum: float
    norm: float
    finite: bool

    def __str__(self) -> str:
        size = "(" + "-".join(map(str, self.shape)) + ("," if len(self.shape) == 1 else "") + ")"
        return f"{self.key},{size},{self.mean},{self.minimum},{self.norm:.6g}"


@dataclass(frozen=True)
class LoraCheck:
    """A file's tensors, the norm of each module's change, and what is to be said of them.

    ``misplaced`` are zero tensors of modules that training reaches in every case.
    """

    rows: tuple[TensorRow, ...]
    changes: Mapping[str, float]
    zero: tuple[str, ...]
    not_finite: tuple[str, ...]
    expected_zero: int | None
    remarks: tuple[str, ...]
    misplaced: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Say whether every tensor is finite and no module is untrained that should be trained."""
        counted = self.expected_zero is None or len(self.zero) == self.expected_zero
        return counted and not self.not_finite and not self.misplaced


def check_lora(path: Path, *, clip_skip: int | None = None) -> LoraCheck:
    """Check a file; ``clip_skip`` None takes what its metadata says. Raises LG-SAVE-004, LG-TOOL-001."""
    metadata = read_metadata(path)
    file = parse(read_tensors(path), metadata, name=path.name)
    tensors = file.tensors()
    rows = tuple(_row(key, tensor) for key, tensor in tensors.items() if tensor.ndim)
    not_finite = tuple(row.key for row in rows if not row.finite)
    zero = tuple(row.key for row in rows if row.finite and row.norm == 0)
    changes = {name: _norm(m) for name, m in file.modules.items() if m.kind in FREE and not m.has_magnitude}
    skip = clip_skip if clip_skip is not None else _stated_skip(metadata)
    architecture = architecture_of(file.modules, metadata)
    expected = _expected(list(file.modules), skip, architecture)
    reason = REASONS.get(architecture, f"at clip_skip {skip} the text encoder's last layers stay untouched")
    misplaced = _misplaced(list(file.modules), zero) if architecture == "sdxl" else ()
    remarks = _remarks(rows, zero, not_finite, expected, reason)
    if misplaced:
        remarks.append(f"{len(misplaced)} zero tensors are of modules that every step trains.")
    return LoraCheck(rows, changes, zero, not_finite, expected, tuple(remarks), misplaced)


def _row(key: str, tensor: torch.Tensor) -> TensorRow:
    values = tensor.float()
    size = values.abs()
    finite = bool(torch.isfinite(values).all())
    return TensorRow(
        key, tuple(tensor.shape), float(size.mean()), float(size.min()), float(values.norm()), finite
    )


def _norm(module: Module) -> float:
    """Return the Frobenius norm of a module's change; of a LoRA without making the product."""
    if module.kind != "LoRA":
        return float(delta(module).norm())
    up, down = module.factors()
    return float(torch.einsum("ij,ij->", up.T @ up, down @ down.T).clamp_min(0).sqrt()) * abs(module.scale)


def _stated_skip(metadata: Mapping[str, str]) -> int | None:
    text = metadata.get("ss_clip_skip", "")
    return int(text) if text.isascii() and text.isdecimal() else 1 if text == "None" else None


def _expected(names: list[str], skip: int | None, architecture: str) -> int | None:
    """Return how many zero tensors complete training leaves: six for each layer that is skipped."""
    if architecture == "sdxl":
        return LAYER_MODULES if any(LAYER.search(name) and FIRST_ENCODER.match(name) for name in names) else 0
    if architecture not in SKIPPING or not any(LAYER.search(name) for name in names):
        return 0
    return None if skip is None else LAYER_MODULES * (max(1, skip) - 1)


def _misplaced(names: list[str], zero: tuple[str, ...]) -> tuple[str, ...]:
    """Return SDXL's zero tensors that are not of its first text encoder's last layer."""
    layers = [int(m[1]) for name in names if FIRST_ENCODER.match(name) and (m := LAYER.search(name))]
    last = max(layers, default=-1)

    def is_last(key: str) -> bool:
        found = LAYER.search(key)
        return FIRST_ENCODER.match(key) is not None and found is not None and int(found[1]) == last

    return tuple(key for key in zero if not is_last(key))


def _remarks(
    rows: tuple[TensorRow, ...],
    zero: tuple[str, ...],
    not_finite: tuple[str, ...],
    expected: int | None,
    reason: str,
) -> list[str]:
    minima = sum(row.minimum == 0 for row in rows)
    lines = [
        f"{len(rows)} tensors; {minima} have a least absolute value of 0.0, {len(zero)} are zero throughout."
    ]
    if not_finite:
        lines.append(
            f"{len(not_finite)} tensors hold NaN or infinity: the file draws black or broken images."
        )
    if len(zero) * 2 >= len(rows):
        lines.append("Half of the tensors are zero: the LoRA was never trained.")
    elif expected is None:
        lines.append("The file does not say its clip_skip: 6 zero tensors belong to clip_skip 2, none to 1.")
    elif len(zero) == expected and expected:
        lines.append(f"As it should be: {reason}.")
    elif len(zero) == expected:
        lines.append("As it should be: every module was trained.")
    else:
        lines.append(
            f"Expected {expected} zero tensors"
            + (f" ({reason})" if expected else "")
            + f", found {len(zero)}: "
            + (
                "some modules got no gradient."
                if len(zero) > expected
                else "layers that have no effect were changed."
            )
        )
    return lines
