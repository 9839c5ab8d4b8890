"""Frozen 3x3 convolutions on small feature maps as one matrix product: faster on a CPU, the same sums.

A CPU's convolution brings its weight into a layout of its own at every call. Where the map has few
pixels and the weight is large, that costs more than the arithmetic: SD1.5's lowest levels spend two to
five times as long as unfolding the map and multiplying by the weight as it lies takes, in float32 and
in bfloat16 (benchmarks/LOG.md). Nothing is copied or kept, and the rule looks at shapes and dtypes
only, so a run stays reproducible.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

PIXELS_PER_CHANNEL = 0.25  # up to so many output pixels of a batch per output channel it is faster
IN_BATCHES = (torch.bfloat16,)  # in float32 the convolution is faster as soon as there are several images
SMALLEST_WEIGHT = 1_000_000  # below so many elements there is nothing to gain


class SmallMapConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1 that chooses by its input's size; the weight must be frozen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, in, H, W) -> (B, out, H', W')."""
        stride = cast("tuple[int, int]", self.stride)
        height, width = ((size - 1) // step + 1 for size, step in zip(x.shape[2:], stride, strict=True))
        batch = x.shape[0]
        pixels = batch * height * width
        if pixels > PIXELS_PER_CHANNEL * self.out_channels or (batch > 1 and x.dtype not in IN_BATCHES):
            return super().forward(x)
        # Unfolded in float32, because backward adds up nine numbers a pixel there.
        columns = F.unfold(x.float(), kernel_size=3, padding=1, stride=stride).to(x.dtype)  # (B, 9 in, H'W')
        joined = columns[0] if batch == 1 else columns.transpose(0, 1).flatten(1)  # (9 in, B H'W')
        weight = self.weight.flatten(1)
        out = weight @ joined if self.bias is None else torch.addmm(self.bias[:, None], weight, joined)
        return out.view(self.out_channels, batch, height, width).transpose(0, 1)


def use_matrix_products(root: nn.Module) -> int:
    """Put a SmallMapConv2d on the same weight in place of each convolution that can gain; return how many."""
    found = [(path, module) for path, module in root.named_modules() if _can_gain(module)]
    for path, old in found:
        old = cast(nn.Conv2d, old)
        stride = cast("tuple[int, int]", old.stride)
        with torch.device("meta"):
            new = SmallMapConv2d(
                old.in_channels, old.out_channels, 3, stride, padding=1, bias=old.bias is not None
            )
        new.weight, new.bias = old.weight, old.bias
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, new)
    return len(found)


def _can_gain(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.padding == (1, 1)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and module.weight.is_contiguous()
        and module.weight.numel() >= SMALLEST_WEIGHT
        and not module.weight.requires_grad
    )
