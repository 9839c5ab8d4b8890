"""Frozen weights of some blocks wait in host memory and visit the device when their block runs.

The idea is kohya's blocks_to_swap. Two buffers on the device take turns: while a block computes, the next
one in the direction of travel is copied into the other buffer. Nothing comes back, because frozen weights
never change; trained tensors stay where they are. The blocks must be checkpointed (after this is put on
them): backward then computes each block anew, in reverse order, and never needs more than the two.

Why a buffer may be filled again when another block is entered: autograd runs what was recorded last
first, so in backward too all kernels of the block before are queued by then; the copy waits for them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_iter

from .checkpointing import Forward, undo_all, wrap_forward

ALIGNMENT = 256  # bytes: kernels read aligned weights fastest
LARGEST_PIECE = 2**32  # bytes of pinned memory that are taken, and given back, at once


class Copier(Protocol):
    """Copies into one of two buffers beside the computation."""

    def start(self, slot: int, buffer: torch.Tensor, host: torch.Tensor) -> None:
        """Begin to fill buffer number ``slot`` once all work queued so far is done."""

    def wait(self, slot: int) -> None:
        """Let the work queued from now on begin when the buffer is filled."""

    def close(self) -> None:
        """Let the work queued from now on begin when all copies are done."""


class Directly:
    """Copies at once: for a device without streams."""

    def start(self, slot: int, buffer: torch.Tensor, host: torch.Tensor) -> None:
        """See `Copier`."""
        buffer.copy_(host)

    def wait(self, slot: int) -> None:
        """See `Copier`: the copy is done."""

    def close(self) -> None:
        """See `Copier`."""


class OnStream:
    """Copies from pinned memory on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event(), torch.cuda.Event()]

    def start(self, slot: int, buffer: torch.Tensor, host: torch.Tensor) -> None:
        """See `Copier`."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(host, non_blocking=True)
            self._filled[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        """See `Copier`."""
        torch.cuda.current_stream(self.device).wait_event(self._filled[slot])

    def close(self) -> None:
        """See `Copier`."""
        torch.cuda.current_stream(self.device).wait_stream(self._stream)


class Swap:
    """Blocks whose frozen tensors live in host memory, and the two buffers they visit; `undo` ends it.

    ``chosen``: in forward order. A tensor that several of them share stays on the device. Not for captured
    steps: where a block lies is decided on the host.
    """

    def __init__(
        self, chosen: Sequence[nn.Module], device: torch.device, copier: Copier | None = None
    ) -> None:
        self.device = device
        self.copier = copier or (OnStream(device) if device.type == "cuda" else Directly())
        uses = Counter(id(t) for block in chosen for t in frozen(block))
        own = [[t for t in frozen(block) if uses[id(t)] == 1] for block in chosen]
        sizes = [sum(map(_aligned, tensors)) for tensors in own]
        places = _places(sizes, pin=device.type == "cuda")
        self._blocks = [_Parked(tensors, place) for tensors, place in zip(own, places, strict=True)]
        size = max((b.host.numel() for b in self._blocks), default=0)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._views = [[block.views(buffer) for block in self._blocks] for buffer in self._buffers]
        self._held: list[int | None] = [None, None]
        self._now = -1  # the block that was entered last
        self._undo = undo_all([wrap_forward(block, self._visiting(i)) for i, block in enumerate(chosen)])

    @property
    def resident(self) -> tuple[int, ...]:
        """The blocks whose weights are on the device now, or on their way to it."""
        return tuple(sorted(block for block in self._held if block is not None))

    @property
    def host_bytes(self) -> int:
        """What the blocks take in host memory."""
        return sum(b.host.numel() for b in self._blocks)

    @property
    def device_bytes(self) -> int:
        """What the buffers take on the device."""
        return sum(b.numel() for b in self._buffers)

    def undo(self, to: torch.device | None = None, *, let_go: bool = False) -> None:
        """Give the weights memory of their own on ``to``, their device if None, or ``let_go`` of them.

        The pinned memory goes back to the system.
        """
        self._undo()
        self.copier.close()
        while self._blocks:
            block = self._blocks.pop()
            block.be(block.nothing() if let_go else block.own(to or self.device))
            del block
        self._buffers, self._views, self._held = [], [], [None, None]
        if self.device.type == "cuda" and hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()

    def _visiting(self, i: int) -> Any:
        def around(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                self._enter(i)
                result = forward(*args, **kwargs)
                # Functions that fetch a weight anew in backward may do so before anything is recomputed.
                for tensor in tree_iter(result):
                    if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                        tensor.register_hook(lambda grad: self._enter(i))
                return result

            return run

        return around

    def _enter(self, i: int) -> None:
        """Have block ``i`` on the device for the work queued from now on, and send for the next one."""
        if i == self._now:
            return
        step = 1 if i > self._now else -1
        if i not in self._held:
            self._fetch(i, 0)
        slot = self._held.index(i)
        self.copier.wait(slot)
        self._now = i
        following = i + step if 0 <= i + step < len(self._blocks) else i - step  # at an end it turns round
        if 0 <= following < len(self._blocks) and following not in self._held:
            self._fetch(following, 1 - slot)

    def _fetch(self, i: int, slot: int) -> None:
        before, self._held[slot] = self._held[slot], None
        if before is not None:
            self._blocks[before].rest()
        block = self._blocks[i]
        self.copier.start(slot, self._buffers[slot][: block.host.numel()], block.host)
        block.be(self._views[slot][i])
        self._held[slot] = i


class _Parked:
    """A block's frozen tensors side by side in one piece of host memory, ``host`` (bytes,) uint8."""

    def __init__(self, tensors: list[torch.Tensor], host: torch.Tensor) -> None:
        self._tensors = tensors
        sizes = [_aligned(t) for t in tensors]
        self._starts = [0, *accumulate(sizes)][:-1]
        # Strides are kept where a tensor is dense (channels_last); else it becomes contiguous.
        self._strides = [torch.empty_like(t, device="meta").stride() for t in tensors]
        self.host = host
        self._at_rest = self.views(self.host)
        for tensor, view in zip(tensors, self._at_rest, strict=True):
            view.copy_(tensor.detach())
        self.rest()

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors as they lie in memory of the host memory's form."""
        return [
            memory[start : start + t.numel() * t.element_size()].view(t.dtype).as_strided(t.shape, strides)
            for t, start, strides in zip(self._tensors, self._starts, self._strides, strict=True)
        ]

    def rest(self) -> None:
        """Let the tensors be those in host memory."""
        self.be(self._at_rest)

    def be(self, views: list[torch.Tensor]) -> None:
        """Let the tensors be what `views` returned for some memory."""
        for tensor, view in zip(self._tensors, views, strict=True):
            tensor.data = view

    def own(self, device: torch.device) -> list[torch.Tensor]:
        """Return copies of the tensors on ``device``, each in memory of its own."""
        return [view.to(device, copy=True) for view in self._at_rest]

    def nothing(self) -> list[torch.Tensor]:
        """Return empty tensors."""
        return [torch.empty(0, dtype=t.dtype) for t in self._tensors]


def _places(sizes: Sequence[int], *, pin: bool) -> Iterator[torch.Tensor]:
    """Yield host memory (size,) uint8 for each of the sizes, in order.

    torch rounds a piece of pinned memory up to a power of two, which for the blocks of Flux would be half as
    much again. So neighbours share pieces of such sizes.
    """
    if not pin:
        yield from (torch.empty(size, dtype=torch.uint8) for size in sizes)
        return
    for piece, members in pieces(sizes):
        yield from torch.empty(piece, dtype=torch.uint8, pin_memory=True)[: sum(members)].split(members)


def pieces(sizes: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Divide sizes, in order, over powers of two; yields each with its members, the fullest that can be."""
    left = list(sizes)
    while left:
        least = 2 ** max(0, left[0] - 1).bit_length()
        choices = []
        piece = least
        while piece <= max(least, LARGEST_PIECE):
            count = sum(total <= piece for total in accumulate(left))
            choices.append((sum(left[:count]) / piece, -piece, count))
            piece *= 2
        _, negative, count = max(choices)
        yield -negative, left[:count]
        left = left[count:]


def frozen_bytes(block: nn.Module) -> int:
    """Return what a block's frozen tensors take, as `Swap` lays them out."""
    return sum(_aligned(t) for t in frozen(block))


def frozen(module: nn.Module) -> list[torch.Tensor]:
    """Return a module's tensors that are not trained, each once; those without data are left out."""
    return [t for t in (*module.parameters(), *module.buffers()) if not (t.requires_grad or t.is_meta)]


def _aligned(tensor: torch.Tensor) -> int:
    return math.ceil(tensor.numel() * tensor.element_size() / ALIGNMENT) * ALIGNMENT
