"""The noise and the timestep of one sample, each a function of (seed, step, sample)."""

from __future__ import annotations

import random

import torch

from ..config import TrainConfig
from ..objective import coarse_sizes, generator, multires_noise, offset_noise


def draw_timestep(config: TrainConfig, num_timesteps: int, step: int, sample: int) -> torch.Tensor:
    """Draw a timestep (1,) from min_timestep up to, but not including, max_timestep."""
    limit = min(config.max_timestep, num_timesteps)
    return torch.randint(
        config.min_timestep, limit, (1,), generator=generator(config.seed, step, sample, "t")
    )


def draw_noise(
    config: TrainConfig, latents: torch.Tensor, step: int, sample: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw the noise of one sample's latents (1, C, h, w), and what the model sees of it where that differs.

    Each kind of noise has a generator of its own, so that switching one on does not change another's draws.
    """
    shape = latents.shape

    def normal(what: str, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(size, generator=generator(config.seed, step, sample, what))

    def strength(limit: float, is_random: bool, what: str) -> float:
        drawn = generator(config.seed, step, sample, what)
        return limit * torch.rand(1, generator=drawn).item() if is_random else limit

    noise = normal("noise", shape)
    if config.noise_offset:
        limit = strength(config.noise_offset, config.noise_offset_random_strength, "offset strength")
        shift = normal("offset", (*shape[:2], 1, 1))
        noise = offset_noise(noise, latents, shift, limit, config.adaptive_noise_scale)
    if config.multires_noise_iterations:
        rng = random.Random(f"{config.seed}-{step}-{sample}-multires")
        ratios = [2 + 2 * rng.random() for _ in range(config.multires_noise_iterations)]
        sizes = coarse_sizes(shape[2], shape[3], ratios)
        coarse = [normal(f"multires {i}", (*shape[:2], *size)) for i, size in enumerate(sizes)]
        noise = multires_noise(noise, coarse, config.multires_noise_discount)
    if not config.ip_noise_gamma:
        return noise, None
    limit = strength(config.ip_noise_gamma, config.ip_noise_gamma_random_strength, "perturbation strength")
    return noise, noise + limit * normal("perturbation", shape)
