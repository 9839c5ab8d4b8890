"""Settings left open, as the base model has them: what "auto" or an empty value means for its family."""

from __future__ import annotations

import dataclasses
from typing import Any

from .checks import CHECKS
from .config import TrainConfig
from .contradictions.family import CLIP, OF_SENTENCES
from .families.opening import Base
from .objective import SAMPLINGS

OPEN = (None, "auto")
NO_TEXT: dict[str, Any] = {"text_encoder_lr": 0.0}  # where a family's text encoders stay as they are


def for_base(config: TrainConfig, base: Base) -> tuple[TrainConfig, list[str]]:
    """Return the settings with every open one decided, and a line for the log on each.

    A base that says of itself that it predicts velocity, or was trained to a last timestep of noise alone, is
    trained so; the latter counts beside the former alone, as ComfyUI reads it. Raises LG-CFG-004 where a
    setting contradicts what was decided.
    """
    family = base.family
    usual = {**({} if family.trains_text else NO_TEXT), **family.defaults}
    decided: dict[str, Any] = {name: usual[name] for name in usual if getattr(config, name) in OPEN}
    if all(kind == CLIP for part, kind in family.encoders.items() if part in base.state_dicts):
        for name in OF_SENTENCES:
            decided.pop(name, None)  # the text encoder that it is about is missing
    sampling = decided.get("timestep_sampling", config.timestep_sampling)
    if sampling in SAMPLINGS and "shift" not in SAMPLINGS[sampling].settings:
        decided.pop("discrete_flow_shift", None)  # nothing would be moved by it
    lines = [f"{name} is {_told(value)}, as is usual for {family.name}" for name, value in decided.items()]
    velocity = base.velocity or config.v_parameterization
    told = {"v_parameterization": base.velocity, "zero_terminal_snr": velocity and base.zero_terminal}
    for name, is_on in told.items():
        if is_on and not getattr(config, name):
            decided[name] = True
            lines.append(f"{name} is on: the base model says so of itself")
    whole = dataclasses.replace(config, **decided)
    if decided:
        for check in CHECKS[TrainConfig]:
            check(whole, f"settings, with what is usual for {family.name}")
    return whole, lines


def _told(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
