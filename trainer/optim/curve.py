"""What a run's learning rate will be, to be drawn before it begins: over the steps, and over the blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..block_weights import Blocks, block_lr_weights
from ..config import ENCODER_RATES, TrainConfig, denoiser_lr, encoder_lr, optimizer_kwargs
from ..settings.optimizers import has_relative_steps
from .find import known
from .groups import lr_scale
from .schedules import rate


def curve(config: TrainConfig, total_steps: int, at: Sequence[int] | None = None) -> list[float]:
    """Return the learning rate of every step: the denoiser's, or the text encoder's where only it learns.

    ``at`` picks steps from 0. Of Adafactor with relative steps, the step size before it is scaled by a
    tensor's own size.
    """
    steps = range(total_steps) if at is None else at
    if has_relative_steps(known(config), optimizer_kwargs(config)):
        warms_up = bool(optimizer_kwargs(config).get("warmup_init", False))
        return [min(1e-6 * (step + 1) if warms_up else 1e-2, 1.0 / math.sqrt(step + 1)) for step in steps]
    rates = denoiser_lr(config), *(encoder_lr(config, part) for part in ENCODER_RATES)
    base = next((rate for rate in rates if rate), 0.0) * lr_scale(config)
    return [rate(config, base, step, total_steps) for step in steps]


def block_bars(config: TrainConfig, blocks: Blocks | None) -> list[tuple[str, float]]:
    """Return each block's name and highest learning rate; empty where there are no blocks.

    Raises ValueError where a weight cannot be read.
    """
    if blocks is None:
        return []
    base = denoiser_lr(config) * lr_scale(config)
    weights = block_lr_weights(config, blocks) or (1.0,) * len(blocks.names)
    return [(name, base * weight) for name, weight in zip(blocks.names, weights, strict=True)]
