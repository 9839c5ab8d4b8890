"""The average of the trained tensors over the steps: what is saved, drawn and validated where it is wanted.

An exponential moving average (Polyak and Juditsky 1992; HCP-Diffusion's ModelEMA): after the n-th step

    average <- d average + (1 - d) value,   d = min(ema_decay, (1 + n) / (5 + n))

so that the first steps, which are far from where the run ends, are soon forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

PREFIX = "average."


def decay_at(step: int, longest: float) -> float:
    """Return how much of the average stays at the ``step``-th step, from 1."""
    return min(longest, (1 + step) / (5 + step))


class Average:
    """The average of ``tensors``, float32 beside them; it starts as they are."""

    def __init__(self, tensors: Sequence[torch.Tensor], decay: float) -> None:
        self.decay = decay
        self.tensors = list(tensors)
        self.values = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Take in the tensors as they are after the ``step``-th step."""
        torch._foreach_lerp_(self.values, self.tensors, 1 - decay_at(step, self.decay))

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a continued run needs, on the CPU."""
        return {f"{PREFIX}{n}": value.cpu() for n, value in enumerate(self.values)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take `state` back; raises KeyError or RuntimeError where it does not fit."""
        for number, value in enumerate(self.values):
            value.copy_(tensors[f"{PREFIX}{number}"])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the tensors hold the average while the block runs; then they are as before, to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap tensors and averages, with one of them twice in memory."""
        for tensor, value in zip(self.tensors, self.values, strict=True):
            before = tensor.detach().clone()
            tensor.copy_(value)
            value.copy_(before)
