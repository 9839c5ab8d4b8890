"""Inputs that a layer can make again: in backward they are computed once more instead of kept.

A norm, an activation or a product of two tensors costs next to nothing beside the matrix product behind it,
but its result is kept from forward to backward, because A's gradient needs the layer's input. A `Make` is
such a computation with its gradient written out; `through` gives it to a layer, and what is kept are its
sources, which other layers keep anyway (Jain et al. 2020 call it rematerialisation).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from . import lowrank
from .makes import Make


def made(make: Make, *sources: torch.Tensor) -> torch.Tensor:
    """Return what ``make`` makes of its sources; only these and its small tensors are kept."""
    out: torch.Tensor = _Made.apply(make, *sources)
    return out


def through(layer: nn.Module, make: Make, *sources: torch.Tensor) -> torch.Tensor:
    """Return layer(made(make, *sources)); where the layer runs as one function, without keeping its input."""
    bank = getattr(layer, "bank", None)
    if bank is None or any(source.dtype != bank.down.dtype for source in sources):
        out: torch.Tensor = layer(made(make, *sources))
        return out
    fused = cast(Any, layer)
    return lowrank.linear_after(make, sources, fused.base, bank, fused.rows.active)


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Make, *sources: torch.Tensor) -> torch.Tensor:
        out, kept = make.forward(*sources)
        ctx.save_for_backward(*sources, *kept)
        ctx.make, ctx.count = make, len(sources)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        saved = ctx.saved_tensors
        sources, kept = saved[: ctx.count], saved[ctx.count :]
        return None, *ctx.make.backward(grad, ctx.needs_input_grad[1:], sources, kept)
