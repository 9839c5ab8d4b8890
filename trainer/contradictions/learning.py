"""What contradicts itself in how it learns: rates, optimizer, schedule."""

from __future__ import annotations

from ..config import TrainConfig, denoiser_lr, encoder_lr, optimizer_kwargs
from .refusals import contradiction


def check(config: TrainConfig, where: str) -> None:
    """Raise LG-CFG-002 or LG-CFG-004 for the first fault."""
    if denoiser_lr(config) == 0 and encoder_lr(config) == 0:
        raise contradiction(
            "Every learning rate is 0.",
            where,
            why="nothing would be trained.",
            fix="give learning_rate, unet_lr or text_encoder_lr a value above 0",
        )
    if config.lr_scheduler == "constant" and config.lr_warmup_steps:
        raise contradiction(
            "lr_scheduler is 'constant', but lr_warmup_steps is given.",
            where,
            why="a constant schedule has no warm-up.",
            fix="choose constant_with_warmup, or set lr_warmup_steps to 0",
        )
    optimizer_kwargs(config)
