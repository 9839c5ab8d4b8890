"""All trained tensors of a run side by side: one row of one matrix, and an optimizer that sees it whole.

An elementwise optimizer (AdamW) computes the same over one long tensor as over hundreds of short ones,
in a few launches instead of hundreds. The rows belong to runs that train on one base side by side. Beside
the float32 values lies a working copy in the dtype of the arithmetic, so that no layer casts its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

ALIGNMENT = 64  # elements: matrix products are fastest where a tensor begins at a multiple of 128 bytes
PIECE = 2**18  # elements


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in every row: ``shape`` is the largest of ``params``, one a run or None."""

    start: int
    shape: torch.Size
    params: tuple[nn.Parameter | None, ...]

    @property
    def stop(self) -> int:
        """Where it ends, without what is left free behind it."""
        return self.start + self.shape.numel()

    def view(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this tensor of all rows, (N, *shape)."""
        return rows[:, self.start : self.stop].view(rows.shape[0], *self.shape)

    def cut(self, row: torch.Tensor, param: nn.Parameter) -> torch.Tensor:
        """Return a parameter's share of its row: all of it, or the corner of a run with a smaller rank."""
        return row[self.start : self.stop].view(self.shape)[tuple(slice(n) for n in param.shape)]


class Flat:
    """Values and gradients of N runs, (N, P); the parameters become views on their row.

    What a run has less of than the widest (rank, modules) is zero, gets zero gradients and stays zero.
    ``params`` lists, for every tensor, one parameter a run, or None where a run does not train it.
    """

    def __init__(self, params: Sequence[Sequence[nn.Parameter | None]], dtype: torch.dtype) -> None:
        self.slots: list[Slot] = []
        start = 0
        for tensors in params:
            shapes = [p.shape for p in tensors if p is not None]
            shape = torch.Size(max(sizes) for sizes in zip(*shapes, strict=True))
            self.slots.append(Slot(start, shape, tuple(tensors)))
            start += math.ceil(shape.numel() / ALIGNMENT) * ALIGNMENT
        device = next(p.device for tensors in params for p in tensors if p is not None)
        rows = len(params[0])
        self.values = torch.zeros(rows, start, device=device)
        self.grads = torch.zeros_like(self.values)
        plain = dtype == torch.float32
        self.work = self.values if plain else torch.zeros(rows, start, dtype=dtype, device=device)
        self.work_grads = self.grads if plain else torch.zeros_like(self.work)
        for slot, row, param in self._params():
            place = slot.cut(self.values[row], param)
            place.copy_(param.detach())
            param.data = place
        # (row, slot) wherever a gradient has come to; what it never reaches is no optimizer's business
        self.reached: set[tuple[int, int]] = set()
        self.refresh()

    def refresh(self, row: int | None = None) -> None:
        """Bring the working copy up to date with the values, of one row or all."""
        if self.work is not self.values:
            part = slice(None) if row is None else slice(row, row + 1)
            self.work[part].copy_(self.values[part])

    def collect(self, rows: Sequence[int]) -> None:
        """Add a micro-batch's gradients in the dtype of the arithmetic to the float32 sums of these rows."""
        if self.work_grads is not self.grads:
            part = slice(rows[0], rows[-1] + 1)
            sums, new = self.grads[part], self.work_grads[part]
            # A CPU first makes a float32 copy of what it adds: in pieces, that stays in its cache.
            size = PIECE if sums.device.type == "cpu" else sums.shape[1]
            for into, piece in zip(sums.split(size, 1), new.split(size, 1), strict=True):
                into += piece
            new.zero_()

    def gradient(self, param: nn.Parameter) -> torch.Tensor:
        """Return a view on the gradient of one parameter."""
        return next(slot.cut(self.grads[row], p) for slot, row, p in self._params() if p is param)

    def _params(self) -> Iterator[tuple[Slot, int, nn.Parameter]]:
        for slot in self.slots:
            for row, param in enumerate(slot.params):
                if param is not None:
                    yield slot, row, param


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether the optimizer computes over one long tensor what it computes over many short ones.

    Of torch's own these are known; others say so by an attribute ``elementwise`` of their class. SGD treats a
    tensor's first step otherwise where its momentum is dampened.
    """
    if type(optimizer) is torch.optim.SGD:
        return all(not group["dampening"] for group in optimizer.param_groups)
    return type(optimizer) is torch.optim.AdamW or getattr(type(optimizer), "elementwise", False) is True


class FlatOptimizer:
    """An elementwise optimizer's arithmetic on one row of a `Flat`; its state stays readable per parameter.

    Parameters that no gradient reached are left out, as an optimizer leaves out those without one: weight
    decay would change them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, flat: Flat, row: int) -> None:
        self.optimizer, self.flat, self.row = optimizer, flat, row
        self._reached: frozenset[int] = frozenset()
        self._segments: list[_Segment] = []
        self._inner: torch.optim.Optimizer | None = None
        self._is_shown = False

    def step(self, max_norm: float, reached: frozenset[int]) -> torch.Tensor:
        """Clip the row's gradient, step, clear it; return its norm before. ``reached`` has slot indices."""
        if self._inner is None or reached != self._reached:
            self._inner, self._reached = self._build(reached), reached
        grads = self.flat.grads[self.row]
        norm = torch.linalg.vector_norm(grads)
        if max_norm:
            grads *= (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for group in self._inner.param_groups:
            group["lr"] = self.optimizer.param_groups[group["of"]]["lr"]
        self._inner.step()
        grads.zero_()
        self.flat.refresh(self.row)
        self._show_state()
        return norm

    def is_settled(self, reached: frozenset[int]) -> bool:
        """Say whether another step changes values only: the first one also makes the optimizer's state."""
        return self._inner is not None and reached == self._reached

    def forget(self) -> None:
        """Begin anew with the state that now stands in the optimizer: it was replaced from outside."""
        self._inner, self._segments, self._is_shown = None, [], False

    def _build(self, reached: frozenset[int]) -> torch.optim.Optimizer:
        """Return the optimizer over as few tensors as there are runs of neighbours treated alike."""
        self._segments, self._is_shown = list(self._neighbours(reached)), False
        groups = []
        for number, group in enumerate(self.optimizer.param_groups):
            tensors = [s.tensor for s in self._segments if s.group == number]
            if tensors:
                groups.append({**group, "params": tensors, "of": number})
        inner = type(self.optimizer)(groups)  # type: ignore[call-arg]
        # Also where updates are captured, the first one is not: it makes the state. torch need not warn.
        inner._warned_capturable_if_run_uncaptured = True
        for segment in self._segments:
            for param, place in segment.places:
                for key, value in self.optimizer.state.get(param, {}).items():
                    state = inner.state[segment.tensor]
                    if value.shape == param.shape:
                        whole = state.setdefault(key, torch.zeros_like(segment.tensor.detach()))
                        place(whole).copy_(value)
                    else:  # a count of steps, the same for all of a segment
                        state.setdefault(key, value.clone())
        return inner

    def _neighbours(self, reached: frozenset[int]) -> Iterator[_Segment]:
        """Join the reached slots that lie side by side, in one group and with equally many steps."""
        group_of = {id(p): n for n, g in enumerate(self.optimizer.param_groups) for p in g["params"]}
        pending: list[tuple[Slot, nn.Parameter]] = []
        kind: tuple[int, float] | None = None
        for number, slot in enumerate(self.flat.slots):
            param = slot.params[self.row]
            found = None
            if param is not None and number in reached:
                steps = self.optimizer.state.get(param, {}).get("step", 0)
                found = (group_of[id(param)], float(steps))
            if pending and (found is None or found != kind):
                yield self._segment(kind, pending)
                pending = []
            if found is not None and param is not None:
                pending, kind = [*pending, (slot, param)], found
        if pending:
            yield self._segment(kind, pending)

    def _segment(self, kind: tuple[int, float] | None, members: list[tuple[Slot, nn.Parameter]]) -> _Segment:
        assert kind is not None
        first, last = members[0][0].start, members[-1][0].stop
        tensor = nn.Parameter(self.flat.values[self.row, first:last])
        tensor.grad = self.flat.grads[self.row, first:last]

        def place(slot: Slot, param: nn.Parameter) -> Callable[[torch.Tensor], torch.Tensor]:
            moved = Slot(slot.start - first, slot.shape, slot.params)
            return lambda whole: moved.cut(whole, param)

        return _Segment(kind[0], tensor, [(param, place(slot, param)) for slot, param in members])

    def _show_state(self) -> None:
        """Let each parameter's own entry in the optimizer's state be a view on the segment's."""
        if self._is_shown or self._inner is None:
            return  # views are up to date by themselves
        self._is_shown = True
        for segment in self._segments:
            state = self._inner.state[segment.tensor]
            for param, place in segment.places:
                self.optimizer.state[param] = {
                    key: place(value) if value.shape == segment.tensor.shape else value
                    for key, value in state.items()
                }


@dataclass(frozen=True)
class _Segment:
    """Neighbours in a row that an optimizer group treats as one tensor, and each parameter's place in it."""

    group: int
    tensor: nn.Parameter
    places: list[tuple[nn.Parameter, Callable[[torch.Tensor], torch.Tensor]]]
