"""Learning-rate schedules: one table; each is a pure function of the step and of how many there are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from ..config import TrainConfig, scheduler_kwargs
from ..errors import LoraGraftError, listed
from ..settings.learning import WARM_RESTARTS, steps_of
from .foreign import foreign_rate, needs_total
from .groups import lr_scale
from .warm_restarts import warm_restarts

# (config, step from 0, all steps) -> factor on the learning rate
Schedule = Callable[..., float]

POLYNOMIAL_END = 1e-7  # the learning rate at the end, as transformers' schedule has it
INVERSE_SQRT_TIMESCALE = 10_000  # without a warm-up


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Return the warm-up in steps; a setting below 1 is a share of all steps, as kohya reads it."""
    return steps_of(config.lr_warmup_steps, total_steps)


def _constant(config: TrainConfig, step: int, total: int) -> float:
    return 1.0


def _with_warmup(shape: Callable[..., float]) -> Schedule:
    """Put a linear rise from 0 before a shape over the rest, progress 0 to 1."""

    def schedule(config: TrainConfig, step: int, total: int, **options: Any) -> float:
        warmup = warmup_steps(config, total)
        if step < warmup:
            return step / max(1, warmup)
        return shape(config, (step - warmup) / max(1, total - warmup), **options)

    schedule.__signature__ = inspect.signature(shape)  # type: ignore[attr-defined]
    return schedule


def _level(config: TrainConfig, progress: float) -> float:
    return 1.0


def _linear(config: TrainConfig, progress: float) -> float:
    return max(0.0, 1.0 - progress)


def _cosine(config: TrainConfig, progress: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def _cosine_with_restarts(config: TrainConfig, progress: float) -> float:
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((config.lr_scheduler_num_cycles * progress) % 1.0))))


def _polynomial(config: TrainConfig, progress: float, lr_end: float = POLYNOMIAL_END) -> float:
    start = config.learning_rate * lr_scale(config)
    floor = min(1.0, lr_end / start) if start else 0.0
    return float((1.0 - floor) * max(0.0, 1.0 - progress) ** config.lr_scheduler_power + floor)


def _cosine_with_min_lr(config: TrainConfig, progress: float, min_lr: float | None = None) -> float:
    start = config.learning_rate * lr_scale(config)
    lowest = config.lr_scheduler_min_lr_ratio or 0.0
    if min_lr is not None:
        lowest = min_lr / start if start else 0.0
    wave = 0.5 * (1.0 + math.cos(math.pi * config.lr_scheduler_num_cycles * progress))
    return max(0.0, wave * (1.0 - lowest) + lowest)


def _inverse_sqrt(config: TrainConfig, step: int, total: int) -> float:
    warmup = warmup_steps(config, total)
    if step < warmup:
        return step / max(1, warmup)
    timescale = config.lr_scheduler_timescale or warmup or INVERSE_SQRT_TIMESCALE
    return 1.0 / math.sqrt(max(1e-9, (step + timescale - warmup) / timescale))


# Progress 0 to 1 of a rise; a decay is 1 minus that of the rest.
RISES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 * (1.0 - math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1.0 - math.sqrt(1.0 - x),
}


def _warmup_stable_decay(
    config: TrainConfig, step: int, total: int, warmup_type: str = "linear", decay_type: str = "cosine"
) -> float:
    """Rise, stay, fall; both ends are at the lowest rate (Hu et al. 2024, arXiv:2404.06395)."""
    warmup, decay = warmup_steps(config, total), steps_of(config.lr_decay_steps, total)
    lowest = config.lr_scheduler_min_lr_ratio or 0.0
    if step < warmup:
        share = RISES[warmup_type](step / max(1, warmup))
    elif step < total - decay:
        return 1.0
    elif step < total:
        x = (step - (total - decay)) / max(1, decay)
        share = {
            "linear": 1.0 - x,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * config.lr_scheduler_num_cycles * x)),
            "1-sqrt": 1.0 - math.sqrt(x),
        }[decay_type]
    else:
        return lowest
    return max(0.0, share * (1.0 - lowest) + lowest)


def _piecewise_constant(config: TrainConfig, step: int, total: int, step_rules: str = "1") -> float:
    """Follow rules such as 1:10,0.1:20,0.01: factor 1 before step 10, 0.1 before step 20, then 0.01."""
    *until, last = step_rules.split(",")
    rules = sorted((int(end), float(factor)) for factor, end in (rule.split(":") for rule in until))
    return next((factor for end, factor in rules if step < end), float(last))


def _warm_restarts(config: TrainConfig, step: int, total: int, **options: Any) -> float:
    """See `warm_restarts`; the usual settings stand for T_0 and warmup_steps where these are not given."""
    cycles = math.ceil(total / config.lr_scheduler_num_cycles)
    given = {"T_0": max(1, cycles), "warmup_steps": warmup_steps(config, total), **options}
    return warm_restarts(step, **given)


_warm_restarts.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [p for p in inspect.signature(warm_restarts).parameters.values() if p.name != "step"]
)


def _relative(config: TrainConfig, step: int, total: int) -> float:
    return 1.0  # Adafactor makes its own steps; see `curve`


SCHEDULES: Mapping[str, Schedule] = {
    "constant": _constant,
    "constant_with_warmup": _with_warmup(_level),
    "linear": _with_warmup(_linear),
    "cosine": _with_warmup(_cosine),
    "cosine_with_restarts": _with_warmup(_cosine_with_restarts),
    "polynomial": _with_warmup(_polynomial),
    "cosine_with_min_lr": _with_warmup(_cosine_with_min_lr),
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
    "piecewise_constant": _piecewise_constant,
    "cosine_with_warm_restarts": _warm_restarts,
    "adafactor": _relative,
}
NO_TOTAL = ("constant", "constant_with_warmup", "inverse_sqrt", "piecewise_constant", "adafactor")


def rate(config: TrainConfig, base_lr: float, step: int, total_steps: int) -> float:
    """Return the learning rate at ``step`` (from 0) of what has ``base_lr``; raises LG-CFG-007.

    Classes from outside may know absolute rates, so that they are asked with the base rate.
    """
    if _is_foreign(config):
        return foreign_rate(config.lr_scheduler_type, _frozen(config), base_lr, step, total_steps)
    return base_lr * lr_factor(config, step, total_steps)


def lr_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the factor on the learning rate at ``step`` (from 0); raises LG-CFG-007 for bad options."""
    if _is_foreign(config):
        start = config.learning_rate * lr_scale(config) or 1.0
        return rate(config, start, step, total_steps) / start
    options = schedule_options(config)
    try:
        factor = SCHEDULES[schedule_name(config)](config, step, total_steps, **options)
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise bad_options(config, str(error)) from error
    if not (math.isfinite(factor) and factor >= 0):
        raise bad_options(config, f"the factor on the learning rate at step {step} would be {factor}")
    return factor


def schedule_name(config: TrainConfig) -> str:
    """Return the schedule's name in the table; a class that guides name is ours."""
    return "cosine_with_warm_restarts" if config.lr_scheduler_type == WARM_RESTARTS else config.lr_scheduler


def schedule_options(config: TrainConfig) -> dict[str, Any]:
    """Return lr_scheduler_args as the schedule takes them; raises LG-CFG-007 for others."""
    takes = [
        name
        for name in inspect.signature(SCHEDULES[schedule_name(config)]).parameters
        if name not in ("config", "step", "total", "progress")
    ]
    options = scheduler_kwargs(config)
    if unknown := [key for key in options if key not in takes]:
        known = f"options: {listed(takes)}" if takes else "clear lr_scheduler_args: it has no options"
        raise LoraGraftError(
            "LG-CFG-007",
            f"The schedule {schedule_name(config)} has no option {listed(unknown)}.",
            where="lr_scheduler_args",
            why="it would be ignored.",
            fix=known,
        )
    return options


def depends_on_total(config: TrainConfig) -> bool:
    """Say whether the learning rate of a step depends on how many steps the run will have."""
    if _is_foreign(config):
        return needs_total(config.lr_scheduler_type, _frozen(config))
    name = schedule_name(config)
    warms_up = name not in ("constant", "adafactor", "piecewise_constant")
    share = isinstance(config.lr_warmup_steps, float) and 0 < config.lr_warmup_steps < 1
    if name == "cosine_with_warm_restarts":
        given = scheduler_kwargs(config)
        return "T_0" not in given or (share and "warmup_steps" not in given)
    return (warms_up and share) or name not in NO_TOTAL


def bad_options(config: TrainConfig, why: str) -> LoraGraftError:
    """Return the refusal of a schedule's options."""
    return LoraGraftError(
        "LG-CFG-007",
        f"The schedule {schedule_name(config)} does not take these options.",
        where="lr_scheduler_args: " + " ".join(config.lr_scheduler_args),
        why=f"{why}.",
        fix="correct the named value; step_rules are written as 1:10,0.1:20,0.01",
    )


def _is_foreign(config: TrainConfig) -> bool:
    return bool(config.lr_scheduler_type) and config.lr_scheduler_type != WARM_RESTARTS


def _frozen(config: TrainConfig) -> tuple[str, ...]:
    return config.lr_scheduler_args
