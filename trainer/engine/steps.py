"""How a step is executed: kernel after kernel in the plainest way, or fused; and the choice of an engine.

An engine turns micro-batches into gradients (`backward`) and gradients into an update (`update`). The
maths is the caller's: a function from the tensors of micro-batches to one mean loss a run. Several runs
on one base may hand in their micro-batches together, where these have equal shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..errors import LoraGraftError
from .flat import Flat, FlatOptimizer, is_elementwise
from .inside import StepInBackward
from .lowrank import Bank
from .precision import Precision, strict

Tensors = tuple[torch.Tensor | None, ...]
Rows = tuple[int, ...]
Loss = Callable[[Rows, Tensors], torch.Tensor]  # tensors of len(rows) equal slices -> losses (len(rows),)
Key = tuple[object, ...]


@dataclass(frozen=True)
class Micro:
    """A micro-batch of the run ``row``; the tensors are on the CPU.

    Its loss is divided by ``count`` before it adds to the gradients: the number of micro-batches in its step,
    times what `distributed` says where other processes have shares of it. ``setting`` holds whatever else
    must be equal where runs share a pass.
    """

    row: int
    tensors: Tensors
    count: float
    setting: Key = ()

    @property
    def shape(self) -> Key:
        """What must be equal where micro-batches go through the base together."""
        shapes = (None if x is None else (tuple(x.shape), x.dtype) for x in self.tensors)
        return (self.setting, *shapes)


class Engine(Protocol):
    """What the loop needs of an engine; ``notes`` holds what the user should hear, and is emptied by it."""

    name: str
    notes: list[str]

    def backward(self, micros: Sequence[Micro]) -> list[torch.Tensor]:
        """Add the gradients of micro-batches of one shape, one a run; return their losses, on the device."""

    def update(self, row: int, max_norm: float) -> torch.Tensor:
        """Clip, take the optimizer's step, clear the gradients of one run; return their norm before."""

    def reload(self, row: int) -> None:
        """Take over what was written into a run's parameters and its optimizer's state from outside."""

    def refresh(self, row: int) -> None:
        """Take over what was written into a run's parameters alone."""

    def release(self) -> None:
        """Free what can be made anew, where no step is to come: images need the memory."""

    def close(self) -> None:
        """Free what the engine holds on the device."""


class Eager:
    """One kernel launch after the other, as PyTorch does by itself: the reference for the others.

    With ``inside``, each tensor takes its optimizer step as soon as its gradient is there.
    """

    name = "eager"

    def __init__(
        self,
        loss_of: Loss,
        optimizers: Sequence[torch.optim.Optimizer],
        scalers: Sequence[torch.amp.GradScaler],
        device: torch.device,
        deterministic: bool,
        inside: bool = False,
    ) -> None:
        self.loss_of, self.optimizers, self.scalers = loss_of, optimizers, scalers
        self.device, self.deterministic = device, deterministic
        self.notes: list[str] = []
        self.inside = [StepInBackward(optimizer) for optimizer in optimizers] if inside else []

    def backward(self, micros: Sequence[Micro]) -> list[torch.Tensor]:
        """See `Engine`; each run goes alone."""
        losses = []
        with strict(self.deterministic):
            for micro in micros:
                (loss,) = self.loss_of((micro.row,), on_device(self.device, micro.tensors))
                self.scalers[micro.row].scale(loss / micro.count).backward()
                losses.append(loss.detach())
        return losses

    def update(self, row: int, max_norm: float) -> torch.Tensor:
        """See `Engine`; with a loss scaler, a step whose gradients overflowed is left out."""
        if self.inside:
            return self.inside[row].taken()
        optimizer, scaler = self.optimizers[row], self.scalers[row]
        with strict(self.deterministic):
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters_of(optimizer), max_norm or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def reload(self, row: int) -> None:
        """See `Engine`: there is no other copy."""

    def refresh(self, row: int) -> None:
        """See `Engine`: there is no other copy."""

    def release(self) -> None:
        """See `Engine`: nothing is held."""

    def close(self) -> None:
        """See `Engine`: nothing is held."""


class Fused:
    """Low-rank updates as one function a layer, and all trained tensors of a run as one.

    ``banks`` are the layers' working tensors in ``flat``.
    """

    name = "fused"

    def __init__(
        self,
        loss_of: Loss,
        optimizers: Sequence[torch.optim.Optimizer],
        flat: Flat,
        banks: Sequence[Bank],
        device: torch.device,
        deterministic: bool,
    ) -> None:
        self.loss_of, self.flat, self.banks = loss_of, flat, banks
        self.device, self.deterministic = device, deterministic
        self.optimizers = [FlatOptimizer(o, flat, row) for row, o in enumerate(optimizers)]
        self._reached: dict[int, tuple[int, frozenset[int]]] = {}
        self.notes: list[str] = []

    def backward(self, micros: Sequence[Micro]) -> list[torch.Tensor]:
        """See `Engine`; all go through the base together."""
        tensors = on_device(self.device, together(micros))
        return list(self.run(rows_of(micros), [m.count for m in micros], tensors).unbind())

    def run(self, rows: Rows, counts: Sequence[float], tensors: Tensors) -> torch.Tensor:
        """Compute losses (N,) and add the gradients; nothing is read on the host."""
        with strict(self.deterministic):
            losses = self.loss_of(rows, tensors)
            shares = [loss / count for loss, count in zip(losses.unbind(), counts, strict=True)]
            torch.autograd.backward(shares)
            self.flat.collect(rows)
        return losses.detach()

    def update(self, row: int, max_norm: float) -> torch.Tensor:
        """See `Engine`."""
        with strict(self.deterministic):
            return self.optimizers[row].step(max_norm, self.reached(row))

    def reload(self, row: int) -> None:
        """See `Engine`: the working copy, and the optimizer's state."""
        self.flat.refresh(row)
        self.optimizers[row].forget()

    def refresh(self, row: int) -> None:
        """See `Engine`: the working copy."""
        self.flat.refresh(row)

    def reached(self, row: int) -> frozenset[int]:
        """Return the slots of a run that a gradient has come to."""
        found = self.flat.reached
        if row not in self._reached or self._reached[row][0] != len(found):
            self._reached[row] = (len(found), frozenset(slot for own, slot in found if own == row))
        return self._reached[row][1]

    def release(self) -> None:
        """See `Engine`: the buffers live as long as the run."""

    def close(self) -> None:
        """See `Engine`: the buffers live as long as the run."""


def rows_of(micros: Sequence[Micro]) -> Rows:
    """Return the runs that take part."""
    return tuple(m.row for m in micros)


def together(micros: Sequence[Micro]) -> Tensors:
    """Join micro-batches of one shape along the batch."""
    if len(micros) == 1:
        return micros[0].tensors
    columns = zip(*(m.tensors for m in micros), strict=True)
    return tuple(None if column[0] is None else torch.cat(column) for column in columns)


def on_device(device: torch.device, tensors: Tensors, *, copy: bool = False) -> Tensors:
    """Bring tensors to the device."""
    return tuple(None if x is None else x.to(device, copy=copy) for x in tensors)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return all tensors that an optimizer trains."""
    return [p for group in optimizer.param_groups for p in group["params"]]


# What the engines need, and how to say that it is missing: (holds for a run?, why not).
Need = Callable[[Precision, torch.optim.Optimizer], bool]
NO_FP16: tuple[Need, str] = (
    lambda precision, _: precision.name != "fp16",
    "fp16's loss scaling decides on the host whether a step counts",
)
CUDA: tuple[Need, str] = (
    lambda precision, _: precision.device.type == "cuda",
    "there are no CUDA graphs on this device",
)
CAPTURABLE: tuple[Need, str] = (
    lambda _, optimizer: all("capturable" in group for group in optimizer.param_groups),
    "this optimizer cannot be captured",
)
ELEMENTWISE: tuple[Need, str] = (
    lambda _, optimizer: is_elementwise(optimizer),
    "this optimizer looks at each tensor as a whole",
)
NEEDS: Mapping[str, tuple[tuple[Need, str], ...]] = {
    "captured": (CUDA, NO_FP16, CAPTURABLE, ELEMENTWISE),
    "fused": (NO_FP16, ELEMENTWISE),
    "eager": (),
}
SEVERAL = "several processes add up their gradients between two graphs"
MEANING = {
    "captured": "whole steps as CUDA graphs",
    "fused": "one function a layer, all trained tensors as one",
    "eager": "one kernel after the other",
}


def choose(
    setting: str,
    precision: Precision,
    optimizers: Sequence[torch.optim.Optimizer],
    processes: int = 1,
    network: str = "",
) -> tuple[str, str]:
    """Return the engine's name for the setting `engine`, and why: one line for the log.

    ``auto`` takes the first of NEEDS that can be; ``network`` says why a network needs plain modules, if it
    does. Raises LG-RUN-008 where the one asked for cannot.
    """
    refused = {
        name: next((why for holds, why in needs for o in optimizers if not holds(precision, o)), None)
        for name, needs in NEEDS.items()
    }
    if network:
        refused |= {name: refused[name] or network for name in ("captured", "fused")}
    if processes > 1:
        refused["captured"] = refused["captured"] or SEVERAL
    if setting != "auto":
        if (why := refused[setting]) is not None:
            raise LoraGraftError(
                "LG-RUN-008",
                f"{setting.capitalize()} steps are not possible here.",
                where="engine",
                why=f"{why}.",
                fix="set engine to auto or eager",
            )
        return setting, f"as set: {MEANING[setting]}"
    name = next(name for name, why in refused.items() if why is None)
    if name == "fused" and refused["captured"] == SEVERAL:
        return name, f"{MEANING[name]}; not captured: {SEVERAL}"
    return name, f"{MEANING[name]}: {refused['fused']}" if name == "eager" else MEANING[name]
