"""How a step is executed: the plain way, and the choice between it and the captured one.

An engine turns micro-batches into gradients (`backward`) and gradients into an update (`update`). The
maths is the caller's: a function from the tensors of a micro-batch to its mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from ..errors import LoraGraftError
from .precision import Precision

Tensors = tuple[torch.Tensor | None, ...]
Loss = Callable[[Tensors], torch.Tensor]


class Engine(Protocol):
    """What the loop needs of an engine; ``notes`` holds what the user should hear, and is emptied by it."""

    name: str
    notes: list[str]

    def backward(self, tensors: Tensors, count: int) -> torch.Tensor:
        """Add a micro-batch's gradients, as one of ``count`` of the step; return its loss, on the device."""

    def update(self, max_norm: float) -> torch.Tensor:
        """Clip, take the optimizer's step and clear the gradients; return their norm before clipping."""

    def close(self) -> None:
        """Free what the engine holds on the device."""


class Eager:
    """One kernel launch after the other, as PyTorch does by itself."""

    name = "eager"

    def __init__(
        self,
        loss_of: Loss,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        device: torch.device,
    ) -> None:
        self.loss_of, self.optimizer, self.scaler, self.device = loss_of, optimizer, scaler, device
        self.notes: list[str] = []

    def backward(self, tensors: Tensors, count: int) -> torch.Tensor:
        """See `Engine`."""
        loss = self.loss_of(tuple(None if x is None else x.to(self.device) for x in tensors))
        self.scaler.scale(loss / count).backward()
        return loss.detach()

    def update(self, max_norm: float) -> torch.Tensor:
        """See `Engine`; with a loss scaler, a step whose gradients overflowed is left out."""
        self.scaler.unscale_(self.optimizer)
        norm = clip(parameters_of(self.optimizer), max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def close(self) -> None:
        """See `Engine`: nothing is held."""


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients so that their common norm is at most ``max_norm`` (0: no limit); return it."""
    return nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return all tensors that an optimizer trains."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def choose(setting: str, precision: Precision, optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    """Return the engine's name for the setting `engine`, and why: one line for the log.

    Raises LG-RUN-008 where captured steps are asked for and cannot be.
    """
    if setting == "eager":
        return "eager", "as set"
    why = None
    if precision.device.type != "cuda":
        why = f"there are no CUDA graphs on {precision.device.type}"
    elif precision.name == "fp16":
        why = "fp16's loss scaling decides on the host whether a step counts"
    elif not all("capturable" in group for group in optimizer.param_groups):
        why = f"{type(optimizer).__name__} cannot be captured"
    if why is None:
        return "captured", "whole steps as CUDA graphs"
    if setting == "captured":
        raise LoraGraftError(
            "LG-RUN-008",
            "Captured steps are not possible here.",
            where="engine",
            why=f"{why}.",
            fix="set engine to auto or eager",
        )
    return "eager", why
