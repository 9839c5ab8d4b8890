"""Frozen convolutions on a CPU: each in the way that is fastest for its shape, and no input kept.

Which way it is follows from shapes and dtypes alone, so a run stays reproducible. What each gains is in
benchmarks/LOG.md. All take and give maps channels last: what is added or multiplied element by element,
forwards and backwards, then lies in equal order; where it does not, a CPU takes ten times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from . import small_maps, winograd
from .frozen import FrozenConv2d, dense, is_frozen, is_plain_convolution

# UNFOLDED: up to so many output pixels of a batch per output channel, and from so large a weight on.
PIXELS_PER_CHANNEL = {torch.float32: 0.1, torch.bfloat16: 0.25}
SMALLEST_WEIGHT = 1_000_000
# TILED, in float32 alone: from so many channels and tiles of 2x2 pixels on.
FEWEST_CHANNELS, FEWEST_TILES = 128, 64


class CPUConv2d(FrozenConv2d):
    """A frozen convolution that chooses by its input's size; its weight may have any storage."""

    def __init__(self, base: nn.Conv2d, scratch: winograd.Scratch) -> None:
        nn.Module.__init__(self)
        for name in nn.Conv2d.__constants__:
            setattr(self, name, getattr(base, name))
        frozen = base if isinstance(base, FrozenConv2d) else FrozenConv2d(base, base.weight.dtype)
        self.stored, self.dtype, self.bias, self.transposed = frozen.stored, frozen.dtype, frozen.bias, False
        self.scratch = scratch

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (B, in, H, W) -> (B, out, H', W') in ``dtype``, channels last."""
        x = input.to(self.dtype).contiguous(memory_format=torch.channels_last)
        way = self._way(x)
        if way is None:
            return super().forward(x)
        out: torch.Tensor = _Convolution.apply(x, self, way)
        return out

    def _way(self, x: torch.Tensor) -> Way | None:
        """Return the way for an input; None: torch's."""
        stride, (batch, _, height, width) = self.stride[0], x.shape
        form = (self.kernel_size, self.padding, self.dilation, self.groups)
        if self.stride != (stride, stride):
            return None
        if form == ((1, 1), (0, 0), (1, 1), 1):
            return PRODUCT if stride == 1 else None
        if form != ((3, 3), (1, 1), (1, 1), 1):
            return None
        pixels = batch * math.prod((size - 1) // stride + 1 for size in (height, width))
        if pixels <= PIXELS_PER_CHANNEL.get(x.dtype, 0) * self.out_channels:
            return UNFOLDED if 9 * self.in_channels * self.out_channels >= SMALLEST_WEIGHT else None
        fits = stride == 1 and height % 2 == width % 2 == 0 and x.dtype == torch.float32
        wide = min(self.in_channels, self.out_channels) >= FEWEST_CHANNELS
        return TILED if fits and wide and pixels >= 4 * FEWEST_TILES else None


class Way(NamedTuple):
    """A convolution: (x, weight, layer) -> out; and its gradient: (grad, weight, layer, size of x) -> dX."""

    forward: Callable[[torch.Tensor, torch.Tensor, CPUConv2d], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor, CPUConv2d, tuple[int, int]], torch.Tensor]


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x: (B, in, H, W), weight: (out, in) -> (B, out, H, W), no view: an update may be added to it."""
    out = winograd.channels_last(x, len(x), len(weight), *x.shape[2:])
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    into = out.permute(0, 2, 3, 1).view(-1, len(weight))
    if bias is None:
        torch.mm(rows, weight.t(), out=into)
    else:
        torch.addmm(bias, rows, weight.t(), out=into)
    return out


PRODUCT = Way(
    lambda x, w, layer: _product(x, w.flatten(1), layer.bias),
    lambda grad, w, layer, size: _product(grad, w.flatten(1).t(), None),
)
UNFOLDED = Way(
    lambda x, w, layer: small_maps.convolution(x, w, layer.bias, layer.stride[0]),
    lambda grad, w, layer, size: small_maps.input_gradient(grad, w, layer.stride[0], size),
)
TILED = Way(
    lambda x, w, layer: winograd.convolution(x, w, layer.bias, layer.scratch),
    lambda grad, w, layer, size: winograd.input_gradient(grad, w, layer.scratch),
)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: CPUConv2d, way: Way) -> torch.Tensor:
        ctx.layer, ctx.way, ctx.size = layer, way, tuple(x.shape[2:])
        return way.forward(x, dense(layer, x.dtype), layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight = dense(ctx.layer, grad.dtype)
        return ctx.way.backward(grad, weight, ctx.layer, ctx.size), None, None


def use_faster_ways(root: nn.Module) -> int:
    """Put a CPUConv2d on the same weight in place of each frozen convolution; return how many."""
    scratch = winograd.Scratch()
    found = [(path, module) for path, module in root.named_modules() if _fits(module)]
    for path, old in found:
        parent, _, name = path.rpartition(".")
        new = CPUConv2d(cast(nn.Conv2d, old), scratch).train(old.training)
        setattr(root.get_submodule(parent), name, new)
    return len(found)


def _fits(module: nn.Module) -> bool:
    return type(module) is FrozenConv2d or (is_plain_convolution(module) and is_frozen(module))
