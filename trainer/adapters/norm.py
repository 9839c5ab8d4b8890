"""Normalisation layers: their weight and bias trained, kept as differences (LyCORIS' train_norm)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .shapes import Shape
from .shares import Start, Tensors, zeros

WEIGHT, BIAS = "w_norm", "b_norm"


def begin(shape: Shape) -> dict[str, Start]:
    """Return how the differences begin: at zero."""
    result = {WEIGHT: zeros(shape.outputs)}
    return {**result, BIAS: zeros(shape.outputs)} if shape.has_bias else result


def update(base: nn.Module, x: torch.Tensor, t: Tensors) -> torch.Tensor:
    """Return what the differences add to the layer's output: x normalised, times w_norm, plus b_norm."""
    weight = t[WEIGHT].to(x.dtype)
    bias = t[BIAS].to(x.dtype) if BIAS in t else None
    if isinstance(base, nn.GroupNorm):
        if not x.requires_grad:
            x = x.contiguous()  # torch's gradient on a CPU crashes on one that lies channels last
        return F.group_norm(x, base.num_groups, weight, bias, base.eps)
    if isinstance(base, nn.RMSNorm):
        return F.rms_norm(x, base.normalized_shape, weight, base.eps)
    assert isinstance(base, nn.LayerNorm)
    return F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)
