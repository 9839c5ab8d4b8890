"""Layers that read one input, as one function: self-attention's q, k and v with one down product for all.

Their A matrices lie side by side, so that A x is one product, as are its gradient and its share of dX;
see `lowrank` for the formula and for what a bank is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .frozen import dense
from .lowrank import Bank, add_product, bias_in, of_rows, slices


@dataclass(frozen=True)
class Group:
    """Layers of one input and one rank r, G of them: ``down`` (N, G r, in) joins their banks' own."""

    layers: tuple[nn.Module, ...]
    banks: tuple[Bank, ...]
    down: torch.Tensor
    down_grad: torch.Tensor | None = None

    def part(self, hidden: torch.Tensor, number: int) -> torch.Tensor:
        """Return a layer's own share (N, M, r) of (N, M, G r)."""
        rank = hidden.shape[-1] // len(self.banks)
        return hidden[..., number * rank : (number + 1) * rank]


def linears(x: torch.Tensor, group: Group, rows: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Return each layer's W x + b + s B A x for x (len(rows) * M, in), slices in the order of ``rows``."""
    ups = [bank.up for bank in group.banks]
    outs: tuple[torch.Tensor, ...] = _Linears.apply(x.to(group.down.dtype), group.down, group, rows, *ups)
    return outs


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down: torch.Tensor,
        group: Group,
        rows: tuple[int, ...],
        *ups: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        number, factor = group.banks[0].scale(rows)
        hidden = torch.bmm(slices(x, rows), of_rows(down, rows).transpose(1, 2))  # (N, M, G r)
        if factor is not None:
            hidden *= factor
        outs = []
        for k, (layer, up) in enumerate(zip(group.layers, ups, strict=True)):
            outs.append(F.linear(x, dense(layer, x.dtype), bias_in(layer, x.dtype)))
            part = group.part(hidden, k)
            slices(outs[-1], rows).baddbmm_(part, of_rows(up, rows).transpose(1, 2), alpha=number)
        ctx.save_for_backward(x, down, hidden, *ups)
        ctx.others = (group, rows, number, factor)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        flat, down, hidden, *ups = ctx.saved_tensors
        group, rows, number, factor = ctx.others
        x, dys = slices(flat, rows), [slices(grad.contiguous(), rows) for grad in grads]
        dh = torch.empty_like(hidden)
        for k, (dy, up) in enumerate(zip(dys, ups, strict=True)):
            group.part(dh, k).baddbmm_(dy, of_rows(up, rows), beta=0)
        if factor is not None:
            dh *= factor
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _back(group.layers, dys)
            slices(grad_x, rows).baddbmm_(dh, of_rows(down, rows), alpha=number)
        into_down = add_product(group.down_grad, down, rows, dh.transpose(1, 2), x, number)
        into_ups = []
        for k, (bank, dy, up) in enumerate(zip(group.banks, dys, ups, strict=True)):
            part = group.part(hidden, k)
            into_ups.append(add_product(bank.up_grad, up, rows, dy.transpose(1, 2), part, number))
            bank.reach(rows)
        return grad_x, into_down, None, None, *into_ups


def _back(layers: Sequence[nn.Module], dys: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of dY W over the layers, (N * M, in)."""
    first, *others = [
        (dy.flatten(0, 1), dense(layer, dy.dtype)) for dy, layer in zip(dys, layers, strict=True)
    ]
    total = first[0] @ first[1]
    for dy, weight in others:
        total.addmm_(dy, weight)
    return total
