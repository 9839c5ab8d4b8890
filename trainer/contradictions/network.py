"""What contradicts itself in how the LoRA is built."""

from __future__ import annotations

from ..config import TrainConfig
from .refusals import contradiction


def check(config: TrainConfig, where: str) -> None:
    """Raise LG-CFG-004 for the first fault."""
    if config.network_train_unet_only and config.text_encoder_lr:
        raise contradiction(
            "network_train_unet_only is on, but text_encoder_lr is given.",
            where,
            why="the text encoder would not be trained at that rate.",
            fix="clear text_encoder_lr, or switch network_train_unet_only off",
        )
    if config.conv_alpha is not None and config.conv_dim is None:
        raise contradiction(
            "conv_alpha is given, but conv_dim is not.",
            where,
            why="without conv_dim no convolution is trained and conv_alpha has no effect.",
            fix="set conv_dim (usually a half to a quarter of network_dim), or clear conv_alpha",
        )
