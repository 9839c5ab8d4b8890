"""What contradicts itself in loss and noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ..config import TrainConfig
from ..settings.loss import LossSettings
from .refusals import contradiction

DEFAULTS = {field.name: field.default for field in dataclasses.fields(LossSettings)}
HUBER = ("huber", "smooth_l1")

# A setting, what it has an effect with, why it has none otherwise, and the nearest setting with which it has.
NEEDS: tuple[tuple[str, Callable[[TrainConfig], bool], str, str], ...] = (
    (
        "zero_terminal_snr",
        lambda c: c.v_parameterization,
        "the last timestep is noise alone, and of that a model that predicts noise learns nothing",
        "switch v_parameterization on if the base model predicts velocity",
    ),
    (
        "scale_v_pred_loss_like_noise_pred",
        lambda c: c.v_parameterization,
        "it rescales the loss of a model that predicts velocity",
        "switch v_parameterization on if the base model predicts velocity",
    ),
    (
        "v_pred_like_loss",
        lambda c: not c.v_parameterization,
        "the loss is that of a model that predicts velocity already",
        "switch v_parameterization off if the base model predicts noise",
    ),
    (
        "huber_schedule",
        lambda c: c.loss_type in HUBER,
        "the other losses have no threshold",
        "set loss_type to huber or smooth_l1",
    ),
    (
        "huber_c",
        lambda c: c.loss_type in HUBER,
        "the other losses have no threshold",
        "set loss_type to huber or smooth_l1",
    ),
    (
        "huber_scale",
        lambda c: c.loss_type in HUBER and c.huber_schedule != "snr",
        "only the thresholds of huber and smooth_l1 are scaled, and that of huber_schedule 'snr' is not",
        "set loss_type to huber or smooth_l1 and huber_schedule to exponential or constant",
    ),
    (
        "noise_offset_random_strength",
        lambda c: c.noise_offset > 0,
        "there is no noise offset whose strength could be drawn",
        "set noise_offset, usually to 0.05",
    ),
    (
        "adaptive_noise_scale",
        lambda c: c.noise_offset > 0,
        "it changes the strength of the noise offset, and there is none",
        "set noise_offset, usually to 0.05",
    ),
    (
        "multires_noise_discount",
        lambda c: c.multires_noise_iterations > 0,
        "there is no multires noise that it could weaken",
        "set multires_noise_iterations, usually to 6",
    ),
    (
        "ip_noise_gamma_random_strength",
        lambda c: c.ip_noise_gamma > 0,
        "there is no perturbation whose strength could be drawn",
        "set ip_noise_gamma, usually to 0.1",
    ),
    (
        "mask_range",
        lambda c: c.masked_loss,
        "no mask is used",
        "switch masked_loss on",
    ),
)


def check(config: TrainConfig, where: str) -> None:
    """Raise LG-CFG-004 for the first fault."""
    for name, is_used, why, fix in NEEDS:
        value, default = getattr(config, name), DEFAULTS[name]
        if value != default and not is_used(config):
            raise contradiction(
                f"{name} is {_text(value)}, but has no effect with the other settings.",
                where,
                why=f"{why}.",
                fix=f"{fix}, or set {name} to {_text(default)}",
            )
    if config.min_timestep >= config.max_timestep:
        raise contradiction(
            f"min_timestep {config.min_timestep} is not below max_timestep {config.max_timestep}.",
            where,
            why="no timestep would be left: those from the first up to, but not including, the second are "
            "trained.",
            fix=f"set min_timestep to {config.max_timestep - 1} or less",
        )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
