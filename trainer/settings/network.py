"""How the LoRA is built: its network, ranks and which parts of the base it trains."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """How the LoRA is built: its network, ranks and which parts of the base it trains."""

    network_dim: int = setting(32, "Rank of the LoRA.", minimum=1, maximum=1024)
    network_alpha: float = setting(
        16.0, "Scale of the LoRA is network_alpha / network_dim.", minimum=0.001, maximum=4096
    )
    conv_dim: int | None = setting(
        None, "Rank for 3x3 convolutions; empty trains none of them.", minimum=1, maximum=1024, advanced=True
    )
    conv_alpha: float | None = setting(
        None, "Alpha for 3x3 convolutions; empty means 1.", minimum=0.001, maximum=4096, advanced=True
    )
    network_train_unet_only: bool = setting(False, "Train no text encoder LoRA.", advanced=True)
