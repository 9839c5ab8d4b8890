"""The loss of a micro-batch, from noisy latents to one number a run: the maths of a step, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from .config import TrainConfig
from .engine.steps import Tensors
from .inputs import Fed, Inputs
from .objective import diffusion_losses, min_snr_weight
from .parts import Parts


def micro_losses(
    parts: Parts, inputs: Inputs, configs: Sequence[TrainConfig], tensors: Tensors
) -> torch.Tensor:
    """Return the losses (len(configs),) of one micro-batch a run; ``tensors`` are a `Fed`'s, joined."""
    base = inputs.base
    latents, noise, t, text, weight, mask = cast("Fed", tensors)
    schedule = base.family.schedule
    noisy = schedule.add_noise(latents, noise, t)
    cond = inputs.embed(text)
    pred = base.family.predict(parts, noisy, t, cond)
    for_snr = _snr_weights(configs, schedule.snr(t))
    if for_snr is not None:
        weight = for_snr if weight is None else for_snr * weight
    return diffusion_losses(pred, noise, weight, mask).view(len(configs), -1).mean(dim=1)


def _snr_weights(configs: Sequence[TrainConfig], snr: torch.Tensor) -> torch.Tensor | None:
    """Return min-SNR weights of the samples, where a run asks for them."""
    gammas = [config.min_snr_gamma for config in configs]
    if not any(gammas):
        return None
    pieces = zip(gammas, snr.chunk(len(configs)), strict=True)
    return torch.cat([torch.ones_like(x) if g is None else min_snr_weight(x, g) for g, x in pieces])
