"""What the settings of a run mean for its network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..block_weights import Blocks, zero_blocks
from ..config import TrainConfig, denoiser_lr, trained_encoders
from ..patterns import patterns, rules
from ..settings.presets import IA3_INPUTS, PRESETS
from . import norm
from .attach import ranks_in, start_from
from .files import read_tensors
from .methods import Options
from .network import Adapter
from .settings import Rank, Settings
from .shares import Drops

NAMES = {
    "lora": "LoRA",
    "locon": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "dylora": "DyLoRA",
    "ia3": "(IA)^3",
    "oft": "OFT",
    "boft": "BOFT",
    "glora": "GLoRA",
    "full": "full weights",
}
ONE_CLIP: Mapping[str, str] = {"text_encoder": "clip"}
OPTIONS = tuple(Options.__dataclass_fields__)


def weights_of(config: TrainConfig) -> dict[str, torch.Tensor] | None:
    """Read the file that the run starts from, if there is one; raises LG-SAVE-004 if it cannot be read."""
    return read_tensors(Path(config.network_weights)) if config.network_weights else None


def preset_of(config: TrainConfig) -> str:
    """Return the preset that counts: ia3 trains its own modules unless others are named."""
    return config.preset or ("ia3" if config.algo == "ia3" else "")


def convolutions_of(config: TrainConfig) -> Rank | None:
    """Return rank and alpha of 3x3 convolutions, None where they are not trained.

    A preset that has them takes those of the other layers where conv_dim is empty, as LyCORIS does.
    """
    preset = PRESETS.get(preset_of(config))
    if config.conv_dim is not None:
        return config.conv_dim, config.conv_alpha or 1.0
    if preset is not None and preset.convolutions:
        return config.network_dim, config.network_alpha
    return None


def settings_of(
    config: TrainConfig,
    blocks: Blocks | None,
    start: dict[str, torch.Tensor] | None = None,
    encoders: Mapping[str, str] = ONE_CLIP,
) -> Settings:
    """Return the network that a config asks for.

    ``blocks`` and ``encoders``, with the kind of each, are the base's; ``start`` is the run's file.
    """
    trained = trained_encoders(config, encoders)
    conv, ia3 = convolutions_of(config), preset_of(config) == "ia3"
    preset = PRESETS.get(preset_of(config))
    return Settings(
        config.network_dim,
        config.network_alpha,
        None if conv is None else conv[0],
        1.0 if conv is None else conv[1],
        config.seed,
        denoiser=denoiser_lr(config) > 0,
        text_encoder=bool(trained),
        left_out=frozenset(encoders) - trained,
        algo=config.algo,
        options=Options(**{name: getattr(config, name) for name in OPTIONS}),
        drops=Drops(
            config.network_dropout, config.rank_dropout, config.rank_dropout_scale, config.module_dropout
        ),
        rules=tuple(rules(config.network_reg_dims)),
        blocks=_of_blocks(config.block_dims, config.block_alphas, config.network_dim, config.network_alpha),
        conv_blocks=_of_blocks(
            config.conv_block_dims,
            config.conv_block_alphas,
            config.conv_dim or 0,
            config.conv_alpha or 1.0,
        ),
        still=frozenset() if blocks is None else zero_blocks(config, blocks),
        only=tuple(patterns(config.train_modules)),
        norms=config.train_norm
        or (preset is not None and preset.norms)
        or any(name.endswith(norm.WEIGHT) for name in start or ()),
        inputs=IA3_INPUTS if ia3 and config.algo == "ia3" else (),
        given=ranks_in(start) if start is not None and config.dim_from_weights else None,
    )


def begin(adapter: Adapter, config: TrainConfig, start: dict[str, torch.Tensor] | None) -> list[str]:
    """Let a run's modules begin from a file, where it has one; return lines for the log."""
    if start is None:
        return []
    name = Path(config.network_weights).name
    return start_from(adapter, start, name, takes_ranks=config.dim_from_weights)


def described(config: TrainConfig) -> tuple[str, str]:
    """Name the network, and its ranks where it has any, for the log."""
    name = f"{NAMES[config.algo]} with DoRA" if config.dora_wd else NAMES[config.algo]
    if config.algo in ("ia3", "full"):
        return name, ""
    if config.dim_from_weights:
        return name, f"ranks of {Path(config.network_weights).name}, "
    if config.algo in ("oft", "boft"):
        return name, f"blocks up to {config.network_dim}, "
    return name, f"rank {config.network_dim}, alpha {config.network_alpha or config.network_dim:g}, "


# What kohya keeps in ss_network_args: the network's own arguments; the trainer's have keys of their own.
ARGUMENTS = (
    *("algo", "preset", *OPTIONS, "train_norm", "rank_dropout", "rank_dropout_scale", "module_dropout"),
    *("network_reg_dims", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
    *("train_modules",),
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold", "network_reg_lrs"),
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
)


def network_module(config: TrainConfig, lora: str = "networks.lora") -> str:
    """Return the name of the module with which kohya's trainer makes such a network.

    ``lora`` is its module of plain LoRAs, which it has several of: one for each kind of base model.
    """
    if config.algo == "dylora":
        return "networks.dylora"
    own = config.algo in ("lora", "locon") and not (config.dora_wd or config.use_tucker or config.train_norm)
    return lora if own and not config.preset else "lycoris.kohya"


def network_args(config: TrainConfig) -> dict[str, object]:
    """Return the network's arguments that are not at their defaults, by kohya's and LyCORIS' names."""
    default = TrainConfig()
    given = {name: getattr(config, name) for name in ARGUMENTS}
    found: dict[str, object] = {k: v for k, v in given.items() if v != getattr(default, k)}
    found = {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
    if (conv := convolutions_of(config)) is not None:
        found |= {"conv_dim": conv[0], "conv_alpha": conv[1]}
    return found


def numbers(text: str) -> list[float]:
    """Read a list such as 2,4,4; raises ValueError."""
    return [float(item) for item in text.split(",")] if text.strip() else []


def _of_blocks(dims: str, alphas: str, dim: int, alpha: float) -> tuple[Rank, ...]:
    """Pair the blocks' ranks and alphas; what is not given is that of the other layers."""
    given, scales = numbers(dims), numbers(alphas)
    count = max(len(given), len(scales))
    pairs = zip(given or [dim] * count, scales or [alpha] * count, strict=True)
    return tuple((int(rank), scale) for rank, scale in pairs)
