"""Frozen 3x3 convolutions whose weight lies in oneDNN's own layout: faster on a CPU, twice the weight.

A CPU's convolution reorders its weight at every call, which takes more than half of a bf16 step of SD1.5. A
frozen weight can be reordered once. Backward needs only dX, which is the convolution of dY with the weight
flipped and transposed (stride 1, padding 1), so a second reordered copy serves it; the plain weight goes.
The operations are torch's, but private, so they are tried once before they are used.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import skip_init

from .frozen import is_frozen, is_plain_convolution

FEWEST_CHANNELS = 16  # the first and the last layer of a U-Net gain nothing
SIZE_HINT = 32  # the layout is chosen for maps of this side, whatever comes, so that a run is reproducible
SAME = ([1, 1], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups


class PackedConv2d(nn.Conv2d):
    """A frozen 3x3 convolution of stride 1 and padding 1 on reordered weights."""

    def __init__(self, base: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        for name in nn.Conv2d.__constants__:
            setattr(self, name, getattr(base, name))
        weight = base.weight.detach()
        self.bias = base.bias
        self.num_bytes = 2 * weight.nbytes
        self.forwards = _packed(weight)
        self.backwards = _packed(weight.flip(2, 3).transpose(0, 1).contiguous())

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight in its plain layout, in new memory, for code that looks at a layer's weight."""
        return self.forwards.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, in, H, W) -> (B, out, H, W), channels last."""
        out: torch.Tensor = _Packed.apply(x, self)
        return out


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedConv2d) -> torch.Tensor:
        ctx.layer = layer
        return _convolve(x, layer.forwards, layer.bias, layer.out_channels)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        layer = ctx.layer
        return _convolve(grad, layer.backwards, None, layer.in_channels), None


def pack_convolutions(root: nn.Module) -> int:
    """Put a PackedConv2d in place of each convolution that can gain; return how many it were."""
    paths = [path for path, module in root.named_modules() if _can_gain(module)] if is_possible() else []
    for path in paths:  # each plain weight goes before the next one is reordered
        parent, _, name = path.rpartition(".")
        old = cast(nn.Conv2d, root.get_submodule(path))
        setattr(root.get_submodule(parent), name, PackedConv2d(old))
    return len(paths)


def packed_bytes(root: nn.Module) -> int:
    """Return what the reordered weights below ``root`` take."""
    return sum(m.num_bytes for m in root.modules() if isinstance(m, PackedConv2d))


@cache
def is_possible() -> bool:
    """Say whether this build of torch has the operations and they compute the convolution."""
    channels = FEWEST_CHANNELS, 2 * FEWEST_CHANNELS
    base = skip_init(nn.Conv2d, *channels, 3, padding=1, dtype=torch.bfloat16).requires_grad_(False)
    for tensor in base.parameters():  # without a random number, which would be missing elsewhere
        tensor.copy_(torch.arange(tensor.numel()).sin().view_as(tensor))
    x = torch.arange(FEWEST_CHANNELS * 48).cos().view(1, FEWEST_CHANNELS, 8, 6).bfloat16()
    try:
        layer = PackedConv2d(base)
        with torch.no_grad():
            ours = layer(x).float()
            dx = _convolve(ours.bfloat16(), layer.backwards, None, layer.in_channels).float()
    except (RuntimeError, AttributeError, TypeError):  # another version of torch, or a CPU without oneDNN
        return False
    expected = F.conv2d(x.float(), base.weight.float(), cast(torch.Tensor, base.bias).float(), padding=1)
    back = F.conv_transpose2d(ours, base.weight.float(), padding=1)
    pairs = ((ours, expected), (dx, back))
    return all(bool((a - b).norm() <= 2e-2 * b.norm()) for a, b in pairs)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    hint = [1, weight.shape[1], SIZE_HINT, SIZE_HINT]
    result: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *SAME, hint)
    return result


def _convolve(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, channels: int
) -> torch.Tensor:
    if isinstance(x, FakeTensor):  # memory is being predicted: an opaque weight has no fake
        return x.new_empty(x.shape[0], channels, *x.shape[2:])
    pointwise = torch.ops.mkldnn._convolution_pointwise
    x = x.contiguous(memory_format=torch.channels_last)
    result: torch.Tensor = pointwise(x, packed, bias, *SAME, "none", [], "")
    return result


def _can_gain(module: nn.Module) -> bool:
    return (
        is_plain_convolution(module)
        and is_frozen(module)
        and module.kernel_size == (3, 3)
        and module.stride == module.padding == module.dilation == (1, 1)
        and module.groups == 1
        and min(module.in_channels, module.out_channels) >= FEWEST_CHANNELS
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
    )
