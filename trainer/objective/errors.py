"""How far a prediction is from its target, and what a sample's loss is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from .base import Objective
from .schedule import NoiseSchedule

# (prediction minus target, threshold) -> each value's error; the threshold broadcasts
Error = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _pseudo_huber(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Pseudo-Huber 2 (sqrt(x^2 + c^2) - c): |x| far from 0, x^2 / c near it (Charbonnier et al. 1997)."""
    return 2 * ((x.square() + c.square()).sqrt() - c)


ERRORS: Mapping[str, Error] = {
    "l2": lambda x, _: x.square(),
    "l1": lambda x, _: x.abs(),
    "huber": lambda x, c: c * _pseudo_huber(x, c),
    "smooth_l1": _pseudo_huber,
}
NEEDS_THRESHOLD = ("huber", "smooth_l1")


def huber_threshold(
    kind: str, schedule: Objective, t: torch.Tensor, c: float, scale: float = 1.0
) -> torch.Tensor:
    """Return the threshold of the Huber losses at timesteps t (B,), float32, on t's device.

    ``kind`` is "constant" (c x scale), "exponential" (from scale down to c x scale) or "snr" (from near 1
    down to c, where ``scale`` has no part), as the reference trainer has them (Khrapov et al. 2024).
    """
    if kind == "constant":
        return torch.full(t.shape, c * scale, device=t.device)
    if kind == "exponential":
        return torch.exp(math.log(c) / schedule.num_timesteps * t) * scale
    assert isinstance(schedule, NoiseSchedule), "a flow has no such ratio; it is refused before"
    a = schedule.signal(t)
    sigma = ((1.0 - a) / a) ** 0.5
    return (1 - c) / (1 + sigma) ** 2 + c


def pointwise(
    kind: str, pred: torch.Tensor, target: torch.Tensor, threshold: torch.Tensor | None = None
) -> torch.Tensor:
    """Return each value's error, of pred's shape (B, ...) in float32; ``threshold`` (B,) as `ERRORS` need."""
    difference = pred.float() - target.float()
    if kind not in NEEDS_THRESHOLD:
        return ERRORS[kind](difference, difference)
    assert threshold is not None
    return ERRORS[kind](difference, threshold.view(-1, *[1] * (pred.ndim - 1)))


def diffusion_losses(
    pred: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    kind: str = "l2",
    threshold: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return each sample's mean error times its weight, both (B,); computed in float32.

    ``mask`` (B, 1, h, w) weighs the places; masked places still count in the mean, as in kohya's trainer.
    """
    errors = pointwise(kind, pred, target, threshold)
    per_sample = (errors if mask is None else errors * mask).mean(dim=(1, 2, 3))
    return per_sample if weight is None else per_sample * weight
