"""Low-rank updates of frozen layers as one autograd function each (Hu et al. 2021): y = W x + s B A x.

The plain formula costs some twenty kernels a layer and keeps several copies of x. Here the base's
product, both small products and their sum are one function: x and the rank-r activation A x are kept,
the frozen weight is fetched again in backward, and gradients are added where the optimizer reads them.

A bank holds the adapters of N runs that train on one base side by side: its tensors have a leading
dimension N, and x holds as many equal slices along the batch as runs take part (``rows``). Each slice
meets its own adapter only, so each run's gradients are those that it has alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .frozen import dense
from .makes import Make


@dataclass
class Bank:
    """Working tensors of N adapters of one layer, in the dtype of the arithmetic, and their gradients.

    ``down`` (N, r, in) and ``up`` (N, out, r); of a convolution (N, r, in, kh, kw) and (N, out, r, 1, 1).
    ``scales`` has one number a run. Where gradient tensors are given, backward adds to them and returns
    none. ``slots`` says where the two lie in the flat buffers, ``reached`` holds (row, slot)
    wherever a gradient has come to.
    """

    down: torch.Tensor
    up: torch.Tensor
    scales: list[float]
    down_grad: torch.Tensor | None = None
    up_grad: torch.Tensor | None = None
    slots: tuple[int, int] = (0, 1)
    reached: set[tuple[int, int]] = field(default_factory=set)
    # Small tensors on the device, made once: a captured step must not copy from the host.
    _kept: dict[tuple[float, ...], torch.Tensor] = field(default_factory=dict)

    def reach(self, rows: tuple[int, ...]) -> None:
        """Remember that gradients came to these rows."""
        self.reached.update((row, slot) for row in rows for slot in self.slots)

    def scale(self, rows: tuple[int, ...]) -> tuple[float, torch.Tensor | None]:
        """Return the number that products are multiplied by, or 1 and a factor (N, 1, 1) on A x."""
        scales = tuple(self.scales[row] for row in rows)
        if len(set(scales)) == 1:
            return scales[0], None
        if scales not in self._kept:
            self._kept[scales] = torch.tensor(scales).to(self.down).view(-1, 1, 1)
        return 1.0, self._kept[scales]


def linear(x: torch.Tensor, layer: nn.Module, bank: Bank, rows: tuple[int, ...]) -> torch.Tensor:
    """Return W x + b + s B A x for x (len(rows) * B, ..., in), its slices in the order of ``rows``."""
    x = x.to(bank.down.dtype)
    out: torch.Tensor = _Linear.apply(bank.down, bank.up, layer, bank, rows, None, x)
    return out


def linear_after(
    make: Make, sources: Sequence[torch.Tensor], layer: nn.Module, bank: Bank, rows: tuple[int, ...]
) -> torch.Tensor:
    """Return `linear` of what ``make`` makes of its sources, which is made again in backward and not kept."""
    out: torch.Tensor = _Linear.apply(bank.down, bank.up, layer, bank, rows, make, *sources)
    return out


def convolution(x: torch.Tensor, layer: nn.Conv2d, bank: Bank, rows: tuple[int, ...]) -> torch.Tensor:
    """Return the frozen convolution of x (len(rows) * B, in, H, W) plus its low-rank update.

    ``down`` has the layer's kernel, ``up`` is 1x1; the base runs as it is, the update is added in place.
    """
    x = x.to(bank.down.dtype)
    base = layer(x)
    if base.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)  # so that what is added to it lies like it
    out: torch.Tensor = _Convolution.apply(base, x, bank.down, bank.up, layer, bank, rows)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        down: torch.Tensor,
        up: torch.Tensor,
        layer: nn.Module,
        bank: Bank,
        rows: tuple[int, ...],
        make: Make | None,
        *sources: torch.Tensor,
    ) -> torch.Tensor:
        number, factor = bank.scale(rows)
        x, kept = (sources[0], ()) if make is None else make.forward(*sources)
        flat = x.reshape(-1, x.shape[-1])
        out = F.linear(flat, dense(layer, x.dtype), bias_in(layer, x.dtype))
        hidden = torch.bmm(slices(flat, rows), of_rows(down, rows).transpose(1, 2))  # (N, M, r)
        if factor is not None:
            hidden *= factor
        slices(out, rows).baddbmm_(hidden, of_rows(up, rows).transpose(1, 2), alpha=number)
        ctx.save_for_backward(down, up, hidden, *((flat,) if make is None else sources), *kept)
        ctx.others = (layer, bank, rows, number, factor, x.shape, make, len(sources))
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        down, up, hidden, *saved = ctx.saved_tensors
        layer, bank, rows, number, factor, shape, make, count = ctx.others
        wants_adapter, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        wants_x, sources, kept = any(wanted), tuple(saved[:count]), tuple(saved[count:])
        grad = grad.reshape(-1, grad.shape[-1])
        dy = slices(grad, rows)
        dh = torch.bmm(dy, of_rows(up, rows))  # (N, M, r)
        if factor is not None:
            dh *= factor
        grad_x = None
        if wants_x:
            grad_x = grad @ dense(layer, grad.dtype)
            slices(grad_x, rows).baddbmm_(dh, of_rows(down, rows), alpha=number)
            grad_x = grad_x.view(shape)
        returned: tuple[torch.Tensor | None, ...] = (None, None)
        if wants_adapter:
            x = sources[0] if make is None else make.forward(*sources)[0]
            x = slices(x.reshape(-1, shape[-1]), rows)
            returned = (
                add_product(bank.down_grad, down, rows, dh.transpose(1, 2), x, number),
                add_product(bank.up_grad, up, rows, dy.transpose(1, 2), hidden, number),
            )
            bank.reach(rows)
        into: tuple[torch.Tensor | None, ...] = (grad_x,)
        if make is not None:
            into = (None,) * count if grad_x is None else make.backward(grad_x, wanted, sources, kept)
        return *returned, None, None, None, None, *into


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        layer: nn.Conv2d,
        bank: Bank,
        rows: tuple[int, ...],
    ) -> torch.Tensor:
        ctx.mark_dirty(base)
        hidden = []
        # One run after the other: a grouped convolution would need the runs side by side as channels.
        for row, piece, out in zip(rows, x.chunk(len(rows)), base.chunk(len(rows)), strict=True):
            hidden.append(F.conv2d(piece, down[row], None, layer.stride, layer.padding, layer.dilation))
            out.add_(F.conv2d(hidden[-1], up[row]), alpha=bank.scales[row])
        ctx.save_for_backward(x, down, up, *hidden)
        ctx.others = (layer, bank, rows)
        return base

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, down, up, *hidden = ctx.saved_tensors
        layer, bank, rows = ctx.others
        wants_x, wants_adapter = ctx.needs_input_grad[1:3]
        returned: tuple[torch.Tensor | None, ...] = (None, None)
        into = (bank.down_grad, bank.up_grad)
        if wants_adapter and (bank.down_grad is None or bank.up_grad is None):
            returned = into = (torch.zeros_like(down), torch.zeros_like(up))
        grads_x = []
        pieces = zip(rows, grad.chunk(len(rows)), x.chunk(len(rows)), hidden, strict=True)
        for row, dy, piece, h in pieces:
            scale = bank.scales[row]
            dh, up_grad = _gradients(dy, h, up[row], None, (True, wants_adapter))
            dx, down_grad = _gradients(dh, piece, down[row], layer, (wants_x, wants_adapter))
            if wants_x:
                grads_x.append(dx.mul_(scale))
            if wants_adapter:
                into[0][row].add_(down_grad, alpha=scale)
                into[1][row].add_(up_grad, alpha=scale)
        if wants_adapter:
            bank.reach(rows)
        grad_x = None if not grads_x else grads_x[0] if len(rows) == 1 else torch.cat(grads_x)
        return grad, grad_x, *returned, None, None, None


def slices(x: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
    """View (N * M, c) as (N, M, c)."""
    return x.view(len(rows), -1, x.shape[-1])


def of_rows(stacked: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
    """Return the matrices of ``rows``, a view where they lie side by side."""
    first, last = rows[0], rows[-1] + 1
    if rows == tuple(range(first, last)):
        return stacked[first:last]
    return torch.stack([stacked[row] for row in rows])


def add_product(
    into: torch.Tensor | None,
    like: torch.Tensor,
    rows: tuple[int, ...],
    a: torch.Tensor,
    b: torch.Tensor,
    number: float,
) -> torch.Tensor | None:
    """Add number * a @ b to the rows of ``into``; without one, return it for autograd to add."""
    target = torch.zeros_like(like) if into is None else into
    if rows == tuple(range(rows[0], rows[-1] + 1)):
        target[rows[0] : rows[-1] + 1].baddbmm_(a, b, alpha=number)
    else:
        for row, product in zip(rows, torch.bmm(a, b), strict=True):
            target[row].add_(product, alpha=number)
    return target if into is None else None


def _gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    layer: nn.Conv2d | None,
    wanted: tuple[bool, bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of a convolution's input and weight; without a ``layer``, of a 1x1 one."""
    stride, padding, dilation = (
        ((1, 1), (0, 0), (1, 1)) if layer is None else (layer.stride, layer.padding, layer.dilation)
    )
    into_x, into_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), 1, (*wanted, False)
    )
    return into_x, into_weight


def bias_in(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor | None:
    bias = layer.bias
    return bias.to(dtype) if isinstance(bias, torch.Tensor) else None
