"""Every weight trained, kept as its difference from the base: full fine-tuning in a LoRA file (LyCORIS)."""

from __future__ import annotations

import torch

from .shapes import Shape
from .shares import Start, Tensors, zeros

WEIGHT, BIAS = "diff", "diff_b"


def begin(shape: Shape) -> dict[str, Start]:
    """Return how the differences begin: at zero."""
    result = {WEIGHT: zeros(*shape.weight)}
    return {**result, BIAS: zeros(shape.outputs)} if shape.has_bias else result


def delta(t: Tensors) -> torch.Tensor:
    """Return the update, (out, in, ...)."""
    return t[WEIGHT]
