"""What contradicts itself in the settings of rectified flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..config import TrainConfig
from ..objective import SAMPLINGS
from ..settings.flow import FlowSettings
from .refusals import contradiction

DEFAULTS = {field.name: field.default for field in dataclasses.fields(FlowSettings)}
# The open value, and what it stands for where a family does not say (Esser et al. 2024).
AUTO, AUTO_WITHOUT = "auto", "logit_normal"
# A setting of a distribution of noise levels -> its name there.
NUMBERS: Mapping[str, str] = {
    "sigmoid_scale": "sigmoid_scale",
    "logit_mean": "logit_mean",
    "logit_std": "logit_std",
    "mode_scale": "mode_scale",
    "discrete_flow_shift": "shift",
}


def check(config: TrainConfig, where: str) -> None:
    """Raise LG-CFG-004 for the first fault; what "auto" stands for is checked where the base is known."""
    if config.timestep_sampling != AUTO:
        check_sampling(config, config.timestep_sampling, where)


def check_sampling(config: TrainConfig, sampling: str, where: str) -> None:
    """Raise LG-CFG-004 for a number that this distribution of noise levels does not use."""
    for name, number in NUMBERS.items():
        value = getattr(config, name)
        if value == DEFAULTS[name] or number in SAMPLINGS[sampling].settings:
            continue
        users = [each for each, entry in SAMPLINGS.items() if number in entry.settings]
        is_auto = config.timestep_sampling == AUTO
        meant = f"auto means {sampling} with this base" if is_auto else f"is {sampling}"
        raise contradiction(
            f"{name} is {value:g}, but timestep_sampling {meant}.",
            where,
            why=f"it is a number of timestep_sampling {' and '.join(users)}, and would have no effect.",
            fix=f"set timestep_sampling to {' or '.join(users)}, or take {name} back",
        )
