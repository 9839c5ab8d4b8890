"""The noise and the timestep of one sample, each a function of (seed, step, sample)."""

from __future__ import annotations

import random

import torch

from ..config import TrainConfig
from ..contradictions.flow import AUTO, AUTO_WITHOUT
from ..objective import (
    Flow,
    Objective,
    Times,
    coarse_sizes,
    drawn_level,
    generator,
    multires_noise,
    offset_noise,
    tokens_of,
)


def draw_timestep(
    config: TrainConfig, objective: Objective, size: tuple[int, int], step: int, sample: int
) -> torch.Tensor:
    """Draw a timestep (1,) from min_timestep up to, but not including, max_timestep.

    A schedule's are int64, each as likely. A flow's are float32: a noise level of the distribution that
    timestep_sampling names, for an image of ``size`` pixels, brought between the two as the reference
    trainer does for SD3.
    """
    rng = generator(config.seed, step, sample, "t")
    low, high = config.min_timestep, min(config.max_timestep, objective.num_timesteps)
    if isinstance(objective, Flow):
        return low + (high - low) * drawn_level(times_of(config), rng, tokens_of(size))
    return torch.randint(low, high, (1,), generator=rng)


def times_of(config: TrainConfig) -> Times:
    """Return the distribution of a flow's noise levels that a run draws from."""
    return Times(
        AUTO_WITHOUT if config.timestep_sampling == AUTO else config.timestep_sampling,
        config.sigmoid_scale,
        config.logit_mean,
        config.logit_std,
        config.mode_scale,
        1.0 if config.discrete_flow_shift is None else config.discrete_flow_shift,
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
