"""LoRA layers put into flat buffers, so that each runs as one function and an optimizer sees one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import nn

from ..engine.flat import Flat, Slot
from ..engine.grouped import Group, linears
from ..engine.lowrank import Bank
from ..parts import Parts
from .layers import Layer, LoRALinear
from .network import Adapter
from .shares import Rows


def fuse(parts: Parts, adapters: Sequence[Adapter], dtype: torch.dtype) -> tuple[Flat, list[Bank]]:
    """Lay the tensors of runs side by side into flat buffers and let their layers run as one function each.

    ``dtype`` is that of the arithmetic. Self-attention's q, k and v become one function where all three are
    trained; their down tensors lie side by side.
    """
    left = dict.fromkeys(m.module for adapter in adapters for m in adapter.modules)
    units: list[tuple[Layer, ...]] = []
    for _, members in _self_attentions(parts.denoiser):
        if all(m in left for m in members):
            units.append(members)
            for m in members:
                del left[m]
    units += [(module,) for module in left]
    tensors: list[list[nn.Parameter | None]] = []
    places: dict[Layer, tuple[int, int]] = {}
    for unit in units:
        first = len(tensors)
        tensors += [[None if low is None else low.down for low in m.lows] for m in unit]
        tensors += [[None if low is None else low.up for low in m.lows] for m in unit]
        places.update({m: (first + k, first + len(unit) + k) for k, m in enumerate(unit)})
    flat = Flat(tensors, dtype)
    for module, slots in places.items():
        down, up = (flat.slots[number] for number in slots)
        module.bank = Bank(
            down.view(flat.work).requires_grad_(),
            up.view(flat.work).requires_grad_(),
            [0.0 if low is None else low.scale for low in module.lows],
            down.view(flat.work_grads),
            up.view(flat.work_grads),
            slots,
            flat.reached,
        )
    for attention, members in _self_attentions(parts.denoiser):
        if (group := _group(flat, members)) is not None:
            rows = members[0].rows
            attention.grouped_qkv = partial(_grouped, group, rows)  # type: ignore[assignment]
    return flat, [m.bank for m in places if m.bank is not None]


def _self_attentions(root: nn.Module) -> Iterator[tuple[nn.Module, tuple[LoRALinear, ...]]]:
    """Yield the attention modules whose q, k and v read one input and have a LoRA, with these three."""
    for module in root.modules():
        members = tuple(getattr(module, name, None) for name in ("to_q", "to_k", "to_v"))
        if getattr(module, "is_cross_attention", True) or not all(isinstance(m, LoRALinear) for m in members):
            continue
        yield module, cast("tuple[LoRALinear, ...]", members)


def _group(flat: Flat, members: tuple[LoRALinear, ...]) -> Group | None:
    """Return the three as one, where their down tensors fill one stretch of the buffers."""
    banks = tuple(m.bank for m in members if m.bank is not None)
    if len(banks) != len(members):
        return None
    downs = [flat.slots[bank.slots[0]] for bank in banks]
    one_shape = len({slot.shape for slot in downs}) == 1 and all(b.scales == banks[0].scales for b in banks)
    if not one_shape or any(a.stop != b.start for a, b in pairwise(downs)):
        return None
    joined = Slot(downs[0].start, torch.Size((len(downs) * downs[0].shape[0], downs[0].shape[1])), ())
    down, grads = joined.view(flat.work).requires_grad_(), joined.view(flat.work_grads)
    return Group(tuple(m.base for m in members), banks, down, grads)


def _grouped(group: Group, rows: Rows, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return linears(x, group, rows.active)
