"""How the noise level of a sample is drawn for rectified flow: what is random is handed in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .flow import FLUX_MU, shifted


@dataclass(frozen=True)
class Times:
    """The numbers of a distribution of noise levels; each distribution takes those that it names."""

    sampling: str
    sigmoid_scale: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """One distribution: whether it is made of a normal number or a uniform one, how, and what moves it.

    ``level`` takes that number (B,) to a noise level in [0, 1]; ``settings`` are the fields of `Times` that
    it uses.
    """

    normal: bool
    level: Callable[[torch.Tensor, Times, int], torch.Tensor]
    settings: tuple[str, ...] = ()


def _sigmoid(n: torch.Tensor, times: Times) -> torch.Tensor:
    return torch.sigmoid(times.sigmoid_scale * n)


def _mode(u: torch.Tensor, scale: float) -> torch.Tensor:
    """The density with heavy tails and one mode of Esser et al. 2024, eq. 20."""
    return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


def _step(u: torch.Tensor, shift: float, steps: int = 1000) -> torch.Tensor:
    """A level of the discrete schedule of ``steps``, of which the 0-th is noise alone."""
    return shifted((steps - (u * steps).floor().clamp(max=steps - 1)) / steps, shift)


SAMPLINGS: Mapping[str, Sampling] = {
    "uniform": Sampling(False, lambda u, times, tokens: u),
    "sigmoid": Sampling(True, lambda n, times, tokens: _sigmoid(n, times), ("sigmoid_scale",)),
    "logit_normal": Sampling(
        True,
        lambda n, times, tokens: shifted(torch.sigmoid(times.logit_mean + times.logit_std * n), times.shift),
        ("logit_mean", "logit_std", "shift"),
    ),
    "mode": Sampling(
        False,
        lambda u, times, tokens: shifted(_mode(u, times.mode_scale), times.shift),
        ("mode_scale", "shift"),
    ),
    "shift": Sampling(
        True, lambda n, times, tokens: shifted(_sigmoid(n, times), times.shift), ("sigmoid_scale", "shift")
    ),
    "flux_shift": Sampling(
        True,
        lambda n, times, tokens: shifted(_sigmoid(n, times), math.exp(FLUX_MU(tokens))),
        ("sigmoid_scale",),
    ),
    "nextdit_shift": Sampling(False, lambda u, times, tokens: shifted(u, math.exp(FLUX_MU(tokens)))),
    "sigma": Sampling(False, lambda u, times, tokens: _step(u, times.shift), ("shift",)),
}


def drawn_level(times: Times, generator: torch.Generator, tokens: int) -> torch.Tensor:
    """Draw one noise level (1,), float32, for an image of so many tokens."""
    sampling = SAMPLINGS[times.sampling]
    draw = torch.randn if sampling.normal else torch.rand
    return sampling.level(draw(1, generator=generator), times, tokens)
