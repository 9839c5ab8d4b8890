"""Frozen layers that keep their weight in another storage, and bring it into the arithmetic's when used.

Autocast makes such copies too, and keeps each from forward to backward. Here the copy lives as long as
the product: a frozen weight has no gradient, so backward needs neither it nor the layer's input, only dX,
for which the weight is brought again. Every function looks at shapes only, so all of it can be captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .packed_tensor import PackedTensor, held, moved
from .storage import Packed, pack, refuse_lacking


def dense(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return a frozen layer's weight in ``dtype``: itself where it is so already, else in new memory.

    ``layer`` is a plain or a Frozen linear layer, convolution or embedding.
    """
    stored = layer.stored if isinstance(layer, FROZEN) else layer.weight
    stored = stored.packed if isinstance(stored, PackedTensor) else stored
    if isinstance(stored, Packed):
        return stored.unpack(dtype)
    return cast(torch.Tensor, stored).detach().to(dtype)


class FrozenLinear(nn.Linear):
    """A linear layer that computes in ``dtype`` on a weight in any storage; the bias is in ``dtype``."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype, packed: Packed | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = base.in_features, base.out_features, dtype
        self.stored = base.weight if packed is None else packed
        self.bias = cast(nn.Parameter, _in(dtype, base.bias))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight as the arithmetic sees it, in new memory, for code that looks at a layer's weight."""
        return dense(self, self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., in) -> (..., out) in ``dtype``."""
        out: torch.Tensor = _Linear.apply(input.to(self.dtype), self)
        return out


class FrozenConv2d(nn.Conv2d):
    """A convolution that computes in ``dtype`` on a weight in any storage; the bias is in ``dtype``."""

    def __init__(self, base: nn.Conv2d, dtype: torch.dtype, packed: Packed | None = None) -> None:
        nn.Module.__init__(self)
        for name in nn.Conv2d.__constants__:
            setattr(self, name, getattr(base, name))
        self.transposed = False
        self.dtype = dtype
        self.stored = base.weight if packed is None else packed
        self.bias = _in(dtype, base.bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight as the arithmetic sees it, in new memory, for code that looks at a layer's weight."""
        return dense(self, self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (B, in, H, W) -> (B, out, H', W') in ``dtype``."""
        out: torch.Tensor = _Conv2d.apply(input.to(self.dtype), self)
        return out


class FrozenEmbedding(nn.Embedding):
    """An embedding that brings only the rows asked for into ``dtype``."""

    def __init__(self, base: nn.Embedding, dtype: torch.dtype, packed: Packed | None = None) -> None:
        nn.Module.__init__(self)
        for name in nn.Embedding.__constants__:
            setattr(self, name, getattr(base, name))
        self.dtype = dtype
        self.stored = base.weight if packed is None else packed

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight as it is stored: code looks at its shape."""
        return PackedTensor(self.stored, self.dtype) if isinstance(self.stored, Packed) else self.stored

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: ids (...) -> (..., D) in ``dtype``."""
        if isinstance(self.stored, Packed):
            return self.stored.lookup(input, self.dtype)
        return F.embedding(input, self.stored, self.padding_idx).to(self.dtype)


FROZEN = (FrozenLinear, FrozenConv2d, FrozenEmbedding)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, dense(layer, x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad @ dense(ctx.layer, grad.dtype), None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FrozenConv2d) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        ctx.last = x.is_contiguous(memory_format=torch.channels_last)
        weight = dense(layer, x.dtype)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        layer: FrozenConv2d = ctx.layer
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad,
            grad.new_empty(1).expand(ctx.shape),  # of the input only the shape is looked at
            dense(layer, grad.dtype),
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0, 0],
            layer.groups,
            [True, False, False],
        )
        if ctx.last:  # what is added to it lies like x
            grad_x = grad_x.contiguous(memory_format=torch.channels_last)
        return grad_x, None


def _in(dtype: torch.dtype, bias: torch.Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)


@dataclass
class Frozen:
    """What `freeze` did: layers that bring their weight when it is used, and what packing cost."""

    storage: str = "as_is"
    num_packed: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    _squares: dict[str, list[float]] = field(default_factory=dict)  # kind: of the error, of the weights
    _worst: tuple[float, str] = (-1.0, "")

    def measure(self, path: str, layer: nn.Module, packed: Packed) -> None:
        """Count a packed layer, and how far its weight is from what it was."""
        weight = cast(torch.Tensor, layer.weight)
        values = weight.detach().to(packed.device).float()
        error, whole = (_sum_of_squares(v) for v in (packed.unpack(torch.float32) - values, values))
        sums = self._squares.setdefault("linear" if isinstance(layer, nn.Linear) else "conv", [0.0, 0.0])
        sums[0], sums[1] = sums[0] + error, sums[1] + whole
        self._worst = max(self._worst, ((error / whole) ** 0.5 if whole else 0.0, path))
        self.num_packed += 1
        self.bytes_before += sum(t.nbytes for t in held(weight))
        self.bytes_after += packed.num_bytes

    @property
    def line(self) -> str | None:
        """Say what was lost, in one line; None where nothing was."""
        if not self.num_packed:
            return None
        of_kinds = ", ".join(
            f"{kind} {(e / max(w, 1e-300)) ** 0.5:.2%}" for kind, (e, w) in sorted(self._squares.items())
        )
        return (
            f"base_storage {self.storage}: {self.num_packed} layers in {self.bytes_after / 1e9:.2f} GB "
            f"instead of {self.bytes_before / 1e9:.2f}; relative error of the weights: {of_kinds}, "
            f"worst {self._worst[1]} {self._worst[0]:.2%}"
        )


def freeze(
    root: nn.Module,
    dtype: torch.dtype,
    device: torch.device | None,
    *,
    storage: str = "as_is",
    skip: Collection[str] = (),
    keeps: Callable[[torch.Tensor], bool] = lambda weight: True,
) -> Frozen:
    """Bring a frozen tree to ``device`` (None: it stays) to compute in ``dtype``; return what was done.

    With a ``storage`` of FORMATS, linear layers and convolutions are packed, except below the children
    of ``root`` named in ``skip``. Of the others, a layer whose weight has another dtype keeps it and
    casts at each use if ``keeps(weight)``; the rest, norms too, is converted for good. What a file holds
    packed stays so; only a weight of another kind of module is unpacked. Weights are never written to: what
    changes is new memory. Paths stay; layers that are trained are left alone. Raises LG-RUN-012 for a
    storage that the device lacks.
    """
    done = Frozen(storage)
    here = next((p.device for p in root.parameters()), torch.device("cpu"))
    refuse_lacking(storage, device or here)
    made: dict[nn.Module, nn.Module] = {}
    brought: dict[Packed, Packed] = {}  # layers may share a weight
    for path, layer in list(root.named_modules(remove_duplicate=False)):
        kind = _kind(layer)
        if kind is None or (weight := cast(torch.Tensor, layer.weight)).requires_grad:
            continue
        new: nn.Module
        if layer in made:
            new = made[layer]
        elif storage != "as_is" and kind is not FrozenEmbedding and path.split(".")[0] not in skip:
            packed = pack(dense(layer, weight.dtype).to(device=device), storage, name=path)
            done.measure(path, layer, packed)
            new = kind(layer, dtype, packed)
        elif isinstance(weight, PackedTensor):
            own = weight.packed
            brought[own] = brought.get(own) or moved(own, device)
            new = kind(layer, dtype, brought[own])
        elif weight.dtype != dtype and keeps(weight):
            new = kind(layer, dtype)
        else:
            continue
        made[layer] = new
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, new.train(layer.training))
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False):
            stays = name == "stored" or parameter.requires_grad
            if isinstance(parameter, PackedTensor):
                values = moved(parameter.packed, device).unpack(dtype)
                setattr(module, name, nn.Parameter(values, parameter.requires_grad))
                continue
            parameter.data = parameter.data.to(device=device, dtype=parameter.dtype if stays else dtype)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device=device))
    return done


def _sum_of_squares(matrix: torch.Tensor) -> float:
    """Add float32 squares row by row, and the rows exactly: Apple's GPUs have no float64."""
    return math.fsum(matrix.flatten(1).square().sum(1).tolist())


def is_plain_convolution(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Say whether a layer is torch's own convolution, padded with zeros by numbers."""
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def is_frozen(layer: nn.Module) -> bool:
    """Say whether no parameter of the layer itself is trained."""
    return not any(p.requires_grad for p in layer.parameters(recurse=False))


def _kind(layer: nn.Module) -> Any:
    """Return the Frozen class that computes the same as a plain layer; None where there is none."""
    if type(layer) is nn.Linear:
        return FrozenLinear
    if is_plain_convolution(layer):
        return FrozenConv2d
    if type(layer) is nn.Embedding and layer.max_norm is None:
        return FrozenEmbedding
    return None
