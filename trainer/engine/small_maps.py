"""3x3 convolutions on small feature maps as one matrix product with the unfolded map.

A CPU's convolution brings its weight into a layout of its own at every call. Where the map has few
pixels and the weight is large, that costs more than the arithmetic: SD1.5's lowest levels spend two to
five times as long as unfolding the map and multiplying by the weight as it lies takes. Padding is 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int
) -> torch.Tensor:
    """Return the convolution, channels last: x (B, in, H, W), weight (out, in, 3, 3) -> (B, out, H', W')."""
    batch, (height, width) = x.shape[0], ((size - 1) // stride + 1 for size in x.shape[2:])
    columns = F.unfold(x, kernel_size=3, padding=1, stride=stride)  # (B, 9 in, H'W')
    joined = columns.transpose(0, 1).flatten(1)  # (9 in, B H'W')
    flat = weight.flatten(1)
    out = flat @ joined if bias is None else torch.addmm(bias[:, None], flat, joined)
    return out.view(-1, batch, height, width).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def input_gradient(
    grad: torch.Tensor, weight: torch.Tensor, stride: int, size: tuple[int, int]
) -> torch.Tensor:
    """Return dX of `convolution` for an input of ``size``: grad (B, out, H', W') -> (B, in, H, W)."""
    joined = grad.transpose(0, 1).flatten(1)  # (out, B H'W')
    columns = (weight.flatten(1).t() @ joined).view(-1, len(grad), joined.shape[1] // len(grad))
    # Nine numbers a pixel are added up, in float32.
    folded = F.fold(columns.transpose(0, 1).float(), size, kernel_size=3, padding=1, stride=stride)
    return folded.to(grad.dtype).contiguous(memory_format=torch.channels_last)
