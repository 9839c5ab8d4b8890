"""What contradicts itself in the schedule: settings that it does not read, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TrainConfig, optimizer_kwargs, scheduler_kwargs
from ..settings.learning import WARM_RESTARTS, steps_of
from ..settings.optimizers import Known, has_relative_steps
from .refusals import bad_value, contradiction

# Setting -> (its value where it is not used, the schedules that read it, what to do where another is chosen)
READ_BY: Mapping[str, tuple[Any, tuple[str, ...], str]] = {
    "lr_warmup_steps": (
        0,
        (
            *("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
            *("cosine_with_min_lr", "inverse_sqrt", "warmup_stable_decay", "cosine_with_warm_restarts"),
        ),
        "choose constant_with_warmup, or set lr_warmup_steps to 0",
    ),
    "lr_decay_steps": (0, ("warmup_stable_decay",), "choose warmup_stable_decay, or set lr_decay_steps to 0"),
    "lr_scheduler_num_cycles": (
        1,
        ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay", "cosine_with_warm_restarts"),
        "choose cosine_with_restarts, or set lr_scheduler_num_cycles to 1",
    ),
    "lr_scheduler_power": (1.0, ("polynomial",), "choose polynomial, or set lr_scheduler_power to 1"),
    "lr_scheduler_min_lr_ratio": (
        None,
        ("cosine_with_min_lr", "warmup_stable_decay"),
        "choose cosine_with_min_lr, or clear lr_scheduler_min_lr_ratio",
    ),
    "lr_scheduler_timescale": (
        None,
        ("inverse_sqrt",),
        "choose inverse_sqrt, or clear lr_scheduler_timescale",
    ),
}


def check(config: TrainConfig, entry: Known, where: str) -> None:
    """Raise LG-CFG-002, -003 or -004 for the first fault; ``entry`` is the optimizer's."""
    options = scheduler_kwargs(config)
    _check_type(config, where)
    name = "cosine_with_warm_restarts" if config.lr_scheduler_type == WARM_RESTARTS else config.lr_scheduler
    foreign = bool(config.lr_scheduler_type) and config.lr_scheduler_type != WARM_RESTARTS
    for setting, (unused, readers, fix) in READ_BY.items():
        if getattr(config, setting) != unused and (foreign or name not in readers):
            shown = config.lr_scheduler_type if foreign else name
            raise contradiction(
                f"lr_scheduler is '{shown}', but {setting} is given.",
                where,
                why="a class is given all through lr_scheduler_args."
                if foreign
                else (
                    "a constant schedule has no warm-up."
                    if name == "constant"
                    else f"{name} does not read it."
                ),
                fix=fix
                if not foreign
                else f"put it into lr_scheduler_args, and leave {setting} at its default",
            )
    if foreign:
        return
    _check_needs(config, name, options, where)
    _check_lengths(config, name, where)
    _check_optimizer(config, entry, name, where)


def _check_type(config: TrainConfig, where: str) -> None:
    if not config.lr_scheduler_type:
        return
    default = type(config).__dataclass_fields__["lr_scheduler"].default
    if config.lr_scheduler not in (default, "cosine_with_warm_restarts"):
        raise contradiction(
            f"lr_scheduler is {config.lr_scheduler}, but lr_scheduler_type is given too.",
            where,
            why="lr_scheduler_type replaces lr_scheduler; only one of the two can count.",
            fix=f"clear lr_scheduler_type, or leave lr_scheduler at {default}",
        )
    parts = config.lr_scheduler_type.split(".")
    allowed: tuple[list[str], ...] = (["torch", "optim", "lr_scheduler"], ["diffusers", "optimization"], [])
    if config.lr_scheduler_type != WARM_RESTARTS and (
        parts[:-1] not in allowed or not parts[-1].isidentifier()
    ):
        raise bad_value(
            "lr_scheduler_type",
            config.lr_scheduler_type,
            "a class of torch.optim.lr_scheduler, a function of diffusers.optimization, or empty",
            where,
        )


def _check_needs(config: TrainConfig, name: str, options: Mapping[str, Any], where: str) -> None:
    """Check that a schedule which needs a setting has it."""
    needs = {
        "cosine_with_min_lr": (
            config.lr_scheduler_min_lr_ratio is not None or "min_lr" in options,
            "set lr_scheduler_min_lr_ratio, for instance to 0.1, or choose cosine, which ends at 0",
        ),
        "warmup_stable_decay": (
            config.lr_decay_steps > 0,
            "set lr_decay_steps, for instance to 0.2, or choose constant_with_warmup, which never falls",
        ),
        "piecewise_constant": (
            "step_rules" in options,
            "add step_rules=1:100,0.1:200,0.01 to lr_scheduler_args: factor 1 before step 100, and so on",
        ),
    }
    has_it, fix = needs.get(name, (True, ""))
    if not has_it:
        raise contradiction(
            f"lr_scheduler is {name}, and what it needs is not given.",
            where,
            why="it would be another schedule.",
            fix=fix,
        )
    if config.lr_scheduler_min_lr_ratio is not None and "min_lr" in options:
        raise contradiction(
            "lr_scheduler_min_lr_ratio is given together with min_lr.",
            where,
            why="both say what the lowest learning rate is.",
            fix="keep one of the two",
        )
    if name == "cosine_with_warm_restarts" and config.lr_warmup_steps and "warmup_steps" in options:
        raise contradiction(
            "lr_warmup_steps is given together with warmup_steps.",
            where,
            why="both say how long the first warm-up is.",
            fix="set lr_warmup_steps to 0, or take warmup_steps out of lr_scheduler_args",
        )
    if name == "cosine_with_warm_restarts" and config.lr_scheduler_num_cycles > 1 and "T_0" in options:
        raise contradiction(
            "lr_scheduler_num_cycles is given together with T_0.",
            where,
            why="both say how long a cycle is.",
            fix="set lr_scheduler_num_cycles to 1, or take T_0 out of lr_scheduler_args",
        )


def _check_lengths(config: TrainConfig, name: str, where: str) -> None:
    """Check lengths against the run's, as far as it is known before the data is."""
    for setting in ("lr_warmup_steps", "lr_decay_steps"):
        steps = getattr(config, setting)
        if steps > 1 and isinstance(steps, float):  # kohya's trainer takes it as a share, 1.5 runs of warm-up
            expected = "a whole number of steps, or a share of the run below 1"
            raise bad_value(setting, steps, expected, where, str(round(steps)))
    if config.max_train_epochs is not None:
        return
    total = config.max_train_steps
    warmup = steps_of(config.lr_warmup_steps, total)
    decay = steps_of(config.lr_decay_steps, total)
    if warmup > total:
        raise contradiction(
            f"The warm-up takes {warmup} steps, the run has {total}.",
            where,
            why="the learning rate would never be reached.",
            fix="set lr_warmup_steps to 0.05 or 0.1: below 1 it is a share of the run",
        )
    if name == "warmup_stable_decay" and warmup + decay > total:
        raise contradiction(
            f"Warm-up and decay take {warmup + decay} steps, the run has {total}.",
            where,
            why="the schedule would not come to its end.",
            fix="set lr_warmup_steps to 0.05 and lr_decay_steps to 0.2: below 1 they are shares of the run",
        )


def _check_optimizer(config: TrainConfig, entry: Known, name: str, where: str) -> None:
    if entry.schedule_free and name != "constant":
        raise contradiction(
            f"lr_scheduler is {name}, but {config.optimizer_type} follows no schedule.",
            where,
            why="it averages the weights instead; a schedule on top works against it.",
            fix="set lr_scheduler to constant and lr_warmup_steps to 0; its warm-up is warmup_steps=100 in "
            "optimizer_args",
        )
    is_adafactor = entry.module.startswith("transformers") and entry.cls == "Adafactor"
    if name == "adafactor" and not is_adafactor:
        raise contradiction(
            f"lr_scheduler is adafactor, but the optimizer is {config.optimizer_type}.",
            where,
            why="this schedule only shows the steps that Adafactor makes itself.",
            fix="set optimizer_type to Adafactor, or lr_scheduler to constant_with_warmup",
        )
    if name == "adafactor" and not has_relative_steps(entry, optimizer_kwargs(config)):
        raise contradiction(
            "lr_scheduler is adafactor, but relative_step is False.",
            where,
            why="without relative steps, Adafactor takes learning_rate and needs a schedule for it.",
            fix="set lr_scheduler to constant_with_warmup, or take relative_step=False away",
        )
