"""The shape of a layer that is trained, and how its dimensions are split into factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """A layer's outputs, inputs and kernel; ``inputs`` is 0 for a normalisation layer."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()
    has_bias: bool = True

    @property
    def is_large(self) -> bool:
        """Say whether it is a convolution with a kernel of more than one pixel."""
        return any(side != 1 for side in self.kernel)

    @property
    def ones(self) -> tuple[int, ...]:
        """A kernel of one pixel, where there is a kernel."""
        return tuple(1 for _ in self.kernel)

    @property
    def weight(self) -> tuple[int, ...]:
        """The weight's shape, (out, in, ...)."""
        return (self.outputs, self.inputs, *self.kernel)


def shape_of(layer: nn.Module) -> Shape:
    """Return a layer's shape; a frozen layer may have to unpack its weight, which is not asked."""
    has_bias = getattr(layer, "bias", None) is not None
    if isinstance(layer, nn.Linear):
        return Shape(layer.out_features, layer.in_features, (), has_bias)
    if isinstance(layer, nn.Conv2d):
        inputs = layer.in_channels // layer.groups
        return Shape(layer.out_channels, inputs, layer.kernel_size, has_bias)
    if isinstance(layer, nn.GroupNorm):
        return Shape(layer.num_channels, 0, (), has_bias)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return Shape(math.prod(layer.normalized_shape), 0, (), has_bias)
    raise TypeError(f"{type(layer).__name__} cannot be trained")


def device_of(layer: nn.Module) -> torch.device:
    """Return where a layer's tensors are."""
    held = next(chain(layer.parameters(), layer.buffers()), None)
    return cast(torch.Tensor, layer.weight).device if held is None else held.device


def factors(dimension: int, factor: int) -> tuple[int, int]:
    """Split a dimension into two factors, the smaller first, as LyCORIS does.

    The smaller is ``factor`` where that divides, else the largest divisor up to it; -1 takes the two that
    are nearest to each other.
    """
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = dimension if factor < 0 else factor
    best = max(m for m in range(1, math.isqrt(dimension) + 1) if dimension % m == 0 and m <= max(limit, 1))
    return best, dimension // best


def butterfly(dimension: int, limit: int) -> tuple[int, int] | None:
    """Split into an even block side up to ``limit`` and a power of two, as BOFT needs; None if none can be.

    Of several the largest side is taken, as LyCORIS does.
    """
    even = range(2, min(limit, dimension) + 1, 2)
    side = max((m for m in even if dimension % m == 0 and _is_power(dimension // m)), default=None)
    return None if side is None else (side, dimension // side)


def smallest_butterfly(dimension: int) -> int | None:
    """Return the smallest block side with which `butterfly` can split a dimension."""
    return next((m for m in range(2, dimension + 1, 2) if butterfly(dimension, m)), None)


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0
