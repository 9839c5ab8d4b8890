"""Optimizers and learning-rate schedules: one table each; schedules are pure functions of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .config import TrainConfig, optimizer_kwargs
from .errors import LoraGraftError, listed

OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {"AdamW": torch.optim.AdamW}

# (share of the run after warm-up that lies behind, config) -> factor on the learning rate
Schedule = Callable[[float, TrainConfig], float]

POLYNOMIAL_END = 1e-7  # the learning rate at the end, as transformers' schedule has it


def _constant(progress: float, config: TrainConfig) -> float:
    return 1.0


def _linear(progress: float, config: TrainConfig) -> float:
    return max(0.0, 1.0 - progress)


def _cosine(progress: float, config: TrainConfig) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def _cosine_with_restarts(progress: float, config: TrainConfig) -> float:
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((config.lr_scheduler_num_cycles * progress) % 1.0))))


def _polynomial(progress: float, config: TrainConfig) -> float:
    floor = min(1.0, POLYNOMIAL_END / config.learning_rate) if config.learning_rate else 0.0
    return float((1.0 - floor) * max(0.0, 1.0 - progress) ** config.lr_scheduler_power + floor)


SCHEDULES: Mapping[str, Schedule] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
}


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Return the warm-up in steps; a setting below 1 is a share of all steps, as kohya reads it."""
    value = config.lr_warmup_steps
    return int(value * total_steps) if isinstance(value, float) and value < 1 else int(value)


def lr_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the factor on the learning rate at ``step`` (counting from 0)."""
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return step / max(1, warmup)
    return SCHEDULES[config.lr_scheduler]((step - warmup) / max(1, total_steps - warmup), config)


def depends_on_total(config: TrainConfig) -> bool:
    """Say whether the learning rate of a step depends on how many steps the run will have."""
    share = isinstance(config.lr_warmup_steps, float) and 0 < config.lr_warmup_steps < 1
    return share or SCHEDULES[config.lr_scheduler] is not _constant


def optimizer_name(config: TrainConfig) -> str:
    """Return the optimizer's dotted name, as a LoRA's metadata gives it."""
    cls = OPTIMIZERS[config.optimizer_type]
    return f"{cls.__module__}.{cls.__name__}"


def build_optimizer(
    config: TrainConfig, groups: Sequence[tuple[list[nn.Parameter], float]]
) -> torch.optim.Optimizer:
    """Build the optimizer over (parameters, base learning rate) groups; unknown options raise LG-CFG-007."""
    cls = OPTIMIZERS[config.optimizer_type]
    options = optimizer_kwargs(config)
    known = [
        p
        for p in inspect.signature(cls).parameters
        if p not in ("params", "lr", "foreach", "fused", "capturable")
    ]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise LoraGraftError(
            "LG-CFG-007",
            f"{config.optimizer_type} has no option {listed(unknown)}.",
            where="optimizer_args",
            why="it would be ignored.",
            fix=f"options: {listed(known)}",
        )
    parameters: list[dict[str, Any]] = [{"params": list(ps), "lr": lr, "base_lr": lr} for ps, lr in groups]
    try:
        return cls(parameters, fused=True, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError, RuntimeError) as error:
        raise LoraGraftError(
            "LG-CFG-007",
            f"{config.optimizer_type} does not take these options.",
            where="optimizer_args: " + " ".join(config.optimizer_args),
            why=str(error),
            fix="correct the named value; torch documents each option",
        ) from None


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to its base rate times ``factor``."""
    for group in optimizer.param_groups:
        rate = group["base_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):  # a captured update reads it where it lies
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
