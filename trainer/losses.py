"""The loss of a micro-batch, from noisy latents to one number a run: the maths of a step, in one place.

The reference trainer's order: noise, prediction, each value's error, mask, mean over a sample, the sample's
own weight, the timestep's weight, mean over the samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .config import TrainConfig
from .engine.steps import Tensors
from .inputs import Fed, Inputs
from .objective import (
    Flow,
    NoiseSchedule,
    Objective,
    diffusion_losses,
    flow_weight,
    huber_threshold,
    timestep_weight,
)
from .objective.errors import NEEDS_THRESHOLD
from .objective.flow import PREDICTIONS
from .parts import Parts
from .settings.loss import LossSettings

OBJECTIVE = (
    *(field.name for field in dataclasses.fields(LossSettings)),
    *("weighting_scheme", "model_prediction_type"),
)


def micro_losses(
    parts: Parts, inputs: Inputs, configs: Sequence[TrainConfig], tensors: Tensors
) -> torch.Tensor:
    """Return the losses (len(configs),) of one micro-batch a run; ``tensors`` are a `Fed`'s, joined."""
    family, fed = inputs.base.family, Fed.of(tensors)
    plain = family.objective

    def noisy(
        config: TrainConfig, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        return schedule_of(plain, config).add_noise(latents, noise, t)

    def losses(
        config: TrainConfig,
        pred: torch.Tensor,
        noisy: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        weight: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        schedule = schedule_of(plain, config)
        pred, target = COMPARED[type(plain)](schedule, config, pred, noisy, latents, noise, t)
        for_time = WEIGHTS[type(plain)](plain, config, t)
        if for_time is not None:
            weight = for_time if weight is None else for_time * weight
        threshold = None
        if config.loss_type in NEEDS_THRESHOLD:
            kind, c = config.huber_schedule, config.huber_c
            threshold = huber_threshold(kind, schedule, t, c, config.huber_scale)
        return diffusion_losses(pred, target, weight, mask, config.loss_type, threshold)

    seen = fed.noise if fed.perturbed is None else fed.perturbed
    cond = inputs.embed(fed.text)
    x_t = _by_run(configs, noisy, fed.latents, seen, fed.t)
    pred = family.predict(parts, x_t, fed.t, cond, fed.sizes, configs[0].guidance_scale)
    each = _by_run(configs, losses, pred, x_t, fed.latents, fed.noise, fed.t, fed.weight, fed.mask)
    return each.view(len(configs), -1).mean(dim=1)


def schedule_of(plain: Objective, config: TrainConfig) -> Objective:
    """Return the objective that a run trains on: the family's own, or the one that ends in noise alone."""
    if config.zero_terminal_snr and isinstance(plain, NoiseSchedule):
        return dataclasses.replace(plain, zero_terminal_snr=True)
    return plain


def _by_snr(plain: NoiseSchedule, config: TrainConfig, t: torch.Tensor) -> torch.Tensor | None:
    """Return the timesteps' weights (B,) by their signal-to-noise ratio, where the run asks for any.

    They count with the ratio of the unchanged schedule, as in the reference trainer: where the last timestep
    is noise alone, min-SNR would otherwise never teach it.
    """
    return timestep_weight(
        plain.snr(t),
        velocity=config.v_parameterization,
        min_snr_gamma=config.min_snr_gamma,
        scale_v_like_noise=config.scale_v_pred_loss_like_noise_pred,
        v_like_loss=config.v_pred_like_loss,
        debiased=config.debiased_estimation_loss,
    )


def _by_level(flow: Flow, config: TrainConfig, t: torch.Tensor) -> torch.Tensor | None:
    """Return the weights (B,) of a flow's noise levels, where the run asks for any."""
    return flow_weight(config.weighting_scheme, t / flow.num_timesteps)


# How timesteps are weighed, by the kind of objective.
WEIGHTS: Mapping[type, Callable[[Any, TrainConfig, torch.Tensor], torch.Tensor | None]] = {
    NoiseSchedule: _by_snr,
    Flow: _by_level,
}


def _as_predicted(
    schedule: NoiseSchedule,
    config: TrainConfig,
    pred: torch.Tensor,
    noisy: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return pred, schedule.target(latents, noise, t, velocity=config.v_parameterization)


def _as_flow(
    flow: Flow,
    config: TrainConfig,
    pred: torch.Tensor,
    noisy: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    kind = config.model_prediction_type
    predicted, wanted = PREDICTIONS["raw" if kind == "auto" else kind]
    return predicted(pred, noisy, flow.level(t, noisy)), wanted(latents, noise)


# What of the denoiser's output is compared with what, by the kind of objective.
COMPARED: Mapping[type, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    NoiseSchedule: _as_predicted,
    Flow: _as_flow,
}


def _by_run(
    configs: Sequence[TrainConfig], work: Callable[..., torch.Tensor], *tensors: torch.Tensor | None
) -> torch.Tensor:
    """Apply ``work(config, *slices)`` to each run's slice of the tensors and join the results.

    Where all runs have one objective, it is applied to the whole at once.
    """
    if len({tuple(getattr(config, name) for name in OBJECTIVE) for config in configs}) == 1:
        return work(configs[0], *tensors)
    count = len(configs)
    slices = zip(*([None] * count if x is None else x.chunk(count) for x in tensors), strict=True)
    return torch.cat([work(config, *each) for config, each in zip(configs, slices, strict=True)])
