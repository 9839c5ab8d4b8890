"""The loss on images kept out of training: the same noise and timesteps every time, so that values compare.

Each image is measured at timesteps that divide the trained range into equal parts, with noise that is a
function of (seed, image, timestep's place) alone. Equal weights give equal numbers whatever the step, the
order of the images and, but for rounding, the batch size. How an error counts is the run's; what a run
weighs or disturbs while it learns (min-SNR, noise offset, prior loss weight) is left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from .config import TrainConfig
from .data.batches import Batch
from .events import Validated, Validating
from .inputs import Inputs
from .losses import micro_losses
from .objective import Flow, Objective, generator
from .plan import average_loss
from .run import Run, as_used
from .settings.loss import LossSettings
from .trends import Measure, best

# What of the loss's settings says what is predicted and how an error counts; the others teach.
MEASURED = (
    *("v_parameterization", "zero_terminal_snr", "loss_type", "huber_schedule", "huber_c", "huber_scale"),
    *("min_timestep", "max_timestep", "masked_loss", "mask_range"),
)


def validate(run: Run, *, saved: bool) -> Iterator[Validating | Validated]:
    """Measure the images kept out, note the result in ``run.measures``; ``saved`` if this step is saved."""
    inputs = run.validation
    if inputs is None:
        return
    chosen = chosen_images(inputs, run.config)
    losses: list[tuple[str, float]] = []
    for done, index in enumerate(chosen, 1):
        losses.append((inputs.train_set.records[index].name, image_loss(run, inputs, index)))
        yield Validating(run.step, done, len(chosen))
    mean = math.fsum(loss for _, loss in losses) / len(losses)
    before = best(run.measures)
    run.measures.append(Measure(run.step, mean, average_loss(run.micro_losses, run.plan), saved))
    is_best = saved and (before is None or mean < before.loss)
    yield Validated(run.step, mean, len(losses), tuple(losses), is_best)


def chosen_images(inputs: Inputs, config: TrainConfig) -> list[int]:
    """Return the records to measure: all, or always the same `max_validation_steps` of them."""
    records = inputs.train_set.records
    order = sorted(range(len(records)), key=lambda i: hashlib.sha256(records[i].name.encode()).digest())
    return sorted(order[: config.max_validation_steps])


def timesteps(config: TrainConfig, objective: Objective) -> list[int] | list[float]:
    """Return the middles of `validation_timesteps` equal parts of the trained range, whole for a schedule."""
    low, span, count = (
        config.min_timestep,
        config.max_timestep - config.min_timestep,
        config.validation_timesteps,
    )
    middles = [(k + 0.5) * span / count for k in range(count)]
    if isinstance(objective, Flow):
        return [low + middle for middle in middles]
    return [low + int(middle) for middle in middles]


@torch.no_grad()
def image_loss(run: Run, inputs: Inputs, index: int) -> float:
    """Return one image's mean loss over the timesteps."""
    config, seed = as_measured(run.config), run.config.seed
    name = inputs.train_set.records[index].name
    moments = inputs.pictures.moments((index, False))
    shape = moments["mean"].shape

    def draw(*what: object) -> torch.Tensor:
        return torch.randn(shape, generator=generator(seed, "validation", name, *what))

    latents = inputs.base.family.latents(moments, draw("posterior"))
    steps, total = timesteps(config, inputs.base.family.objective), 0.0
    with as_used(run):
        for first in range(0, len(steps), config.train_batch_size):
            part = range(first, min(first + config.train_batch_size, len(steps)))
            count = len(part)
            indices, flips, weights = (index,) * count, (False,) * count, (1.0,) * count
            fed = inputs.draw(0, 0, Batch(inputs.train_set.buckets[index], indices, flips, weights))
            fed = fed._replace(
                latents=latents.expand(count, *shape[1:]),
                noise=torch.cat([draw("noise", k) for k in part]),
                t=torch.tensor([steps[k] for k in part]),
                weight=None,
                perturbed=None,
            )
            on_device = tuple(None if x is None else x.to(run.precision.device) for x in fed.tensors)
            total += micro_losses(run.parts, inputs, [config], on_device).item() * count
    return total / len(steps)


def as_measured(config: TrainConfig) -> TrainConfig:
    """Return the settings without what teaches: those of the loss at their defaults, but for MEASURED."""
    teaching: dict[str, Any] = {
        f.name: f.default for f in dataclasses.fields(LossSettings) if f.name not in MEASURED
    }
    teaching["weighting_scheme"] = "none"
    return dataclasses.replace(config, **teaching)
