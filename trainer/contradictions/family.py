"""What contradicts the base model: settings that its family or its objective has no use for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from ..block_weights import Blocks
from ..config import ENCODER_RATES, TrainConfig
from ..errors import one_line
from ..objective import Flow, Objective
from . import flow
from .refusals import contradiction

DEFAULT = TrainConfig()
CLIP = "clip"
# Settings of a schedule of noise, and why a flow has no use for them.
OF_NOISE: Mapping[str, str] = {
    "min_snr_gamma": "it weighs by a signal-to-noise ratio; weighting_scheme weighs a flow's noise levels",
    "v_parameterization": "a flow always predicts its own velocity",
    "zero_terminal_snr": "a flow ends in noise alone already",
    "debiased_estimation_loss": "it weighs by a signal-to-noise ratio; weighting_scheme weighs noise levels",
    "scale_v_pred_loss_like_noise_pred": "it is about v-prediction along a schedule of noise",
    "v_pred_like_loss": "it is about v-prediction along a schedule of noise",
}
_TIMES = "its timesteps are drawn alike; min_timestep and max_timestep bound them"
# Settings of a flow, and why a schedule of noise has no use for them.
OF_FLOW: Mapping[str, str] = {
    **dict.fromkeys(("timestep_sampling", "sigmoid_scale", "logit_mean", "logit_std", "mode_scale"), _TIMES),
    "discrete_flow_shift": "it moves the noise levels of a flow, such as SD3 and Flux have",
    "weighting_scheme": "it weighs the noise levels of a flow; min_snr_gamma weighs its timesteps",
    "model_prediction_type": "it is about a flow's velocity; v_parameterization says what it predicts",
    "guidance_scale": "only distilled flow models are told a guidance",
}
OF_BLOCKS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
OF_CLIP = ("clip_skip", "max_token_length", "tokenizer_repeats", "network_train_text_encoder_only")
OF_SENTENCES = ("t5xxl_max_token_length", "apply_t5_attn_mask")
THRESHOLDS = ("huber", "smooth_l1")


class Trained(Protocol):
    """What is asked here of a family."""

    @property
    def name(self) -> str: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def encoders(self) -> Mapping[str, str]: ...
    @property
    def trains_text(self) -> bool: ...
    @property
    def blocks(self) -> Blocks | None: ...
    @property
    def ignored(self) -> Mapping[str, str]: ...
    @property
    def defaults(self) -> Mapping[str, Any]: ...


def check(
    config: TrainConfig, family: Trained, parts: Collection[str] | None = None, where: str = "settings"
) -> None:
    """Raise LG-CFG-004 for the first setting that this base model makes impossible or idle.

    ``config`` is as it was given, before what is open in it is decided; ``parts`` are those that the base
    has, None where that is not known.
    """
    is_flow = isinstance(family.objective, Flow)
    of_other = OF_NOISE if is_flow else OF_FLOW
    for name, why in {**of_other, **family.ignored}.items():
        _refuse_given(config, name, why, family, where)
    kinds = {kind for part, kind in family.encoders.items() if parts is None or part in parts}
    if kinds == {CLIP}:
        for name in OF_SENTENCES:
            why = "it is about T5 and its like, and this base model reads captions with CLIP alone"
            _refuse_given(config, name, why, family, where)
    if kinds and CLIP not in kinds:
        for name in OF_CLIP:
            why = "it is about CLIP, and this base model reads captions without it"
            _refuse_given(config, name, why, family, where)
    _check_rates(config, family, parts, where)
    _check_blocks(config, family, where)
    if is_flow:
        _check_flow(config, family, where)


def _refuse_given(config: TrainConfig, name: str, why: str, family: Trained, where: str) -> None:
    value, usual = getattr(config, name), getattr(DEFAULT, name)
    if value != usual:
        back = "clear it" if usual in (None, (), "") else f"set {name} back to {_text(usual)}"
        raise contradiction(
            f"{name} is {one_line(_text(value), 30)}, but the base model is '{family.name}'.",
            where,
            why=f"{why}.",
            fix=f"{back}, or take another base model",
        )


def _check_rates(config: TrainConfig, family: Trained, parts: Collection[str] | None, where: str) -> None:
    """Refuse a rate for a text encoder that is not there, or that cannot be trained."""
    for part, name in ENCODER_RATES.items():
        if not getattr(config, name):
            continue
        if part not in family.encoders:
            why = f"it has {len(family.encoders)} text encoder{'s' if len(family.encoders) > 1 else ''}"
            _refuse_given(config, name, why, family, where)
        if not family.trains_text:
            _refuse_given(config, name, "its text encoders are not trained here", family, where)
        if parts is not None and part not in parts:
            _refuse_given(config, name, f"this base has no {part}", family, where)
    if not family.trains_text and config.network_train_text_encoder_only:
        why = "its text encoders are not trained here, so nothing would be"
        _refuse_given(config, "network_train_text_encoder_only", why, family, where)


def _check_blocks(config: TrainConfig, family: Trained, where: str) -> None:
    """Refuse ranks or alphas of blocks that are not as many as the base model has."""
    count = 0 if family.blocks is None else len(family.blocks.names)
    for name in OF_BLOCKS:
        text = getattr(config, name)
        if text and len(text.split(",")) != count:
            raise contradiction(
                f"{name} has {len(text.split(','))} values, but '{family.name}' has {count} blocks.",
                where,
                why="which block a value is for would not be known.",
                fix=f"give {count} values" if count else f"clear {name}; network_reg_dims has patterns",
            )


def _check_flow(config: TrainConfig, family: Trained, where: str) -> None:
    if config.loss_type in THRESHOLDS and config.huber_schedule == "snr":
        raise contradiction(
            f"loss_type is {config.loss_type} with huber_schedule snr, but the base model is a flow.",
            where,
            why="a flow has no signal-to-noise ratio for the threshold to fall with.",
            fix="set huber_schedule to exponential or constant",
        )
    sampling = config.timestep_sampling
    if sampling == flow.AUTO:
        flow.check_sampling(config, family.defaults.get("timestep_sampling", flow.AUTO_WITHOUT), where)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
