"""Samplers: from noise to latents along a falling row of sigmas, in the form of Karras et al. 2022.

x = x0 + sigma noise. ``denoise(x, sigma)`` returns the estimate of x0, and (x - x0) / sigma is the slope of
the way. Each sampler takes sigmas that end with 0 and returns x there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Noise = Callable[[int], torch.Tensor]  # standard normal noise of step i, like x
Sampler = Callable[[Denoise, torch.Tensor, torch.Tensor, Noise], torch.Tensor]


def euler(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Euler's method: straight on along the slope."""
    for sigma, following in pairwise(sigmas):
        x = x + slope(denoise, x, sigma) * (following - sigma)
    return x


def euler_a(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Ancestral: further down than wanted, then up again with fresh noise."""
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        down, up = ancestral(sigma, following)
        x = x + slope(denoise, x, sigma) * (down - sigma)
        if following > 0:
            x = x + noise(i) * up
    return x


def heun(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Heun's method: the mean of the slopes at both ends of a step; two predictions a step."""
    for sigma, following in pairwise(sigmas):
        first, length = slope(denoise, x, sigma), following - sigma
        there = x + first * length
        x = there if following == 0 else x + (first + slope(denoise, there, following)) / 2 * length
    return x


def dpm_2(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, noise: Noise) -> torch.Tensor:
    """DPM-Solver-2 (Lu et al. 2022): the slope half-way in log sigma; two predictions a step."""
    for sigma, following in pairwise(sigmas):
        first = slope(denoise, x, sigma)
        if following == 0:
            x = x + first * (following - sigma)
        else:
            middle = (sigma * following).sqrt()
            x = x + slope(denoise, x + first * (middle - sigma), middle) * (following - sigma)
    return x


def ddim(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, noise: Noise) -> torch.Tensor:
    """DDIM with eta 0 (Song et al. 2021): x0 and the same noise, mixed for the next sigma."""
    for sigma, following in pairwise(sigmas):
        x0 = denoise(x, sigma)
        x = x0 + following * ((x - x0) / sigma)
    return x


def dpmpp_2m(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, noise: Noise) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022): second order from the last two estimates; t = -log sigma."""
    before: torch.Tensor | None = None
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        estimate = x0
        if before is not None and following > 0:
            h, h_before = (sigma / following).log(), (sigmas[i - 1] / sigma).log()
            r = h_before / h
            estimate = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x = following / sigma * x + (1 - following / sigma) * estimate  # exp(-h) = following / sigma
        before = x0
    return x


def slope(denoise: Denoise, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return dx / dsigma: the predicted noise."""
    return (x - denoise(x, sigma)) / sigma


def ancestral(sigma: torch.Tensor, following: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sigma to step down to, and the noise to add, so that both make ``following``."""
    up = torch.minimum(following, (following**2 * (sigma**2 - following**2) / sigma**2).sqrt())
    return (following**2 - up**2).sqrt(), up


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "dpm_2": dpm_2,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
}
ANCESTRAL = ("euler_a",)  # which add noise on the way
