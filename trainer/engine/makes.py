"""The computations between matrix products in few launches, with their gradients written out; see `made`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

_ops = torch.ops.aten
Kept = tuple[torch.Tensor, ...]
Grads = tuple[torch.Tensor | None, ...]


class Make(Protocol):
    """A pure function of tensors, its sources, and its gradient."""

    @property
    def forward(self) -> Callable[..., tuple[torch.Tensor, Kept]]:
        """From the sources, return the result and small tensors (a norm's statistics) for backward."""

    def backward(self, grad: torch.Tensor, wanted: Sequence[bool], sources: Kept, kept: Kept) -> Grads:
        """Return the gradient of each source that is ``wanted``, None for others."""


# ---- norms ----


@dataclass(frozen=True)
class Modulated:
    """Layer norm without weights, then * (1 + scale) + shift (adaptive layer norm, Peebles & Xie 2023).

    Of one sample, that is a layer norm whose weight and bias are 1 + scale and shift, so torch's own kernel
    does it in one launch, and its gradient has those of scale and shift. Sources: x (B, L, D), and shift and
    scale (B, 1, D).
    """

    eps: float

    def forward(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """See `Make`."""
        size, weight, bias = x.shape[-1:], 1 + scale[:, 0], shift[:, 0]
        each = [torch.native_layer_norm(x[b], size, weight[b], bias[b], self.eps) for b in range(len(x))]
        out, mean, rstd = (_stacked(parts) for parts in zip(*each, strict=True))
        return out, (mean, rstd)

    def backward(self, grad: torch.Tensor, wanted: Sequence[bool], sources: Kept, kept: Kept) -> Grads:
        """See `Make`."""
        (x, shift, scale), (mean, rstd) = sources, kept
        size, weight, bias = x.shape[-1:], 1 + scale[:, 0], shift[:, 0]
        coarse = x.device.type == "cpu" and x.dtype.itemsize < 4  # there torch's kernel adds up in x's dtype
        mask = [wanted[0], wanted[2] and not coarse, wanted[1] and not coarse]
        each = [
            _ops.native_layer_norm_backward(grad[b], x[b], size, mean[b], rstd[b], weight[b], bias[b], mask)
            for b in range(len(x))
        ]
        dx, dscale, dshift = (
            _stacked(parts) if wants else None
            for parts, wants in zip(zip(*each, strict=True), mask, strict=True)
        )
        if coarse and wanted[2]:
            dscale = (grad * F.layer_norm(x, size, eps=self.eps)).sum(1)
        if coarse and wanted[1]:
            dshift = grad.sum(1)
        return dx, None if dshift is None else dshift[:, None], None if dscale is None else dscale[:, None]


@dataclass(frozen=True)
class Normed:
    """Layer norm (Ba et al. 2016). Sources: x (..., D), and its weight and bias (D), which are frozen."""

    eps: float

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """See `Make`."""
        out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        return out, (mean, rstd)

    def backward(self, grad: torch.Tensor, wanted: Sequence[bool], sources: Kept, kept: Kept) -> Grads:
        """See `Make`."""
        x, weight, bias = sources
        mask = [wanted[0], False, False]
        dx = _ops.native_layer_norm_backward(grad, x, x.shape[-1:], *kept, weight, bias, mask)[0]
        return dx, None, None


@dataclass(frozen=True)
class GroupNormSilu:
    """SiLU of a group norm (Wu & He 2018). Sources: x (B, C, H, W), its weight and bias (C), frozen."""

    groups: int
    eps: float

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """See `Make`."""
        x = x.contiguous(memory_format=_layout(x))
        normed, _, _ = torch.native_group_norm(x, weight, bias, *self._shape(x), self.eps)
        return F.silu(normed, inplace=True), ()

    def backward(self, grad: torch.Tensor, wanted: Sequence[bool], sources: Kept, kept: Kept) -> Grads:
        """See `Make`."""
        if not wanted[0]:
            return None, None, None
        x, weight, bias = sources
        layout = _layout(x)
        x = x.contiguous(memory_format=layout)
        normed, mean, rstd = torch.native_group_norm(x, weight, bias, *self._shape(x), self.eps)
        grad = _ops.silu_backward(grad, normed).contiguous(memory_format=layout)
        mask = [True, False, False]
        dx = _ops.native_group_norm_backward(grad, x, mean, rstd, weight, *self._shape(x), mask)[0]
        return dx, None, None

    def _shape(self, x: torch.Tensor) -> tuple[int, int, int, int]:
        return x.shape[0], x.shape[1], x.shape[2:].numel(), self.groups


# ---- activations, which can write into a wider matrix ----


class Activation(Protocol):
    """A function of single values, or of two halves of the channels."""

    def width(self, channels: int) -> int:
        """Return how many channels come of so many."""

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the result for x (..., n) into ``out`` (..., width(n)) and return it."""

    def back(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x."""


@dataclass(frozen=True)
class Gelu:
    """GELU (Hendrycks & Gimpel 2016); ``approximate`` as torch has it."""

    approximate: str = "none"

    def width(self, channels: int) -> int:
        """See `Activation`."""
        return channels

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """See `Activation`."""
        result: torch.Tensor = _ops.gelu.out(x, approximate=self.approximate, out=out)
        return result

    def back(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """See `Activation`."""
        result: torch.Tensor = _ops.gelu_backward(grad, x, approximate=self.approximate)
        return result


@dataclass(frozen=True)
class Gated:
    """One half of the channels times the other half's activation (GLU variants, Shazeer 2020).

    ``into_of`` writes the activation: (input, out=...); ``back_into`` its gradient: (gradient, input,
    grad_input=...). Both write where the result belongs, so that nothing is made on the way: new pages of
    memory cost a CPU more than the arithmetic.
    """

    into_of: Callable[..., torch.Tensor]
    back_into: Callable[..., torch.Tensor]
    gate_first: bool

    def width(self, channels: int) -> int:
        """See `Activation`."""
        return channels // 2

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """See `Activation`."""
        gate, value = self._halves(x)
        self.into_of(gate, out=out)
        return out.mul_(value)

    def back(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """See `Activation`."""
        dx = torch.empty_like(x)
        (gate, value), (dgate, dvalue) = self._halves(x), self._halves(dx)
        self.into_of(gate, out=dvalue)
        dvalue.mul_(grad)
        torch.mul(grad, value, out=dgate)
        self.back_into(dgate, gate, grad_input=dgate)
        return dx

    def _halves(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        halves = x.chunk(2, dim=-1)
        return halves if self.gate_first else halves[::-1]


SWIGLU = Gated(_ops.silu.out, _ops.silu_backward.grad_input, gate_first=True)
GEGLU = Gated(_ops.gelu.out, _ops.gelu_backward.grad_input, gate_first=False)  # as diffusers cuts it


@dataclass(frozen=True)
class Activated:
    """An activation of one source x (..., n)."""

    activation: Activation

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """See `Make`."""
        out = x.new_empty(*x.shape[:-1], self.activation.width(x.shape[-1]))
        return self.activation.into(x, out), ()

    def backward(self, grad: torch.Tensor, wanted: Sequence[bool], sources: Kept, kept: Kept) -> Grads:
        """See `Make`."""
        return (self.activation.back(grad, sources[0]) if wanted[0] else None,)


@dataclass(frozen=True)
class Beside:
    """Sources a (..., m) and x (..., n): a with x's activation beside it, written in one place."""

    activation: Activation

    def forward(self, a: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """See `Make`."""
        own = a.shape[-1]
        out = a.new_empty(*a.shape[:-1], own + self.activation.width(x.shape[-1]))
        out[..., :own].copy_(a)
        self.activation.into(x, out[..., own:])
        return out, ()

    def backward(self, grad: torch.Tensor, wanted: Sequence[bool], sources: Kept, kept: Kept) -> Grads:
        """See `Make`."""
        x, own = sources[1], sources[0].shape[-1]
        return (
            grad[..., :own] if wanted[0] else None,
            self.activation.back(grad[..., own:], x) if wanted[1] else None,
        )


@dataclass(frozen=True)
class SiluTimes:
    """Sources a and b of one shape: silu(a) b."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """See `Make`."""
        return F.silu(a).mul_(b), ()

    def backward(self, grad: torch.Tensor, wanted: Sequence[bool], sources: Kept, kept: Kept) -> Grads:
        """See `Make`."""
        a, b = sources
        return (
            _ops.silu_backward(grad * b, a) if wanted[0] else None,
            F.silu(a).mul_(grad) if wanted[1] else None,
        )


def _layout(x: torch.Tensor) -> torch.memory_format:
    """Return the layout in which torch's group norm reads x and its gradient; it checks neither."""
    last = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not x.is_contiguous() else torch.contiguous_format


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join samples; a view where there is one."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))
