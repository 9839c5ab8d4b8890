"""GLoRA: a low-rank change of the input beside that of the weight (Chavan et al. 2023), as LyCORIS has it.

dW = (alpha/r) (W a1 a2 + b1 b2).
"""

from __future__ import annotations

import torch

from .shapes import Shape
from .shares import Start, Tensors, kaiming, zeros


def begin(shape: Shape, rank: int) -> dict[str, Start]:
    """Return how the tensors begin: a2 and b2 at zero."""
    return {
        "a1.weight": kaiming(shape.inputs, rank, *shape.ones),
        "a2.weight": zeros(rank, shape.inputs, *shape.ones),
        "b1.weight": kaiming(shape.outputs, rank, *shape.ones),
        "b2.weight": zeros(rank, shape.inputs, *shape.kernel),
    }


def delta(t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """Return the unscaled update, (out, in, ...)."""
    a1, a2, b1 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1"))
    own = (b1 @ t["b2.weight"].flatten(1)).view(weight.shape)
    return own + torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)


def rank_of(t: Tensors) -> int:
    """Return the rank."""
    return t["a2.weight"].shape[0]
