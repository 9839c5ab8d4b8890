"""The learning rates of an optimizer's groups: set before every step, and as the log shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..config import TrainConfig
from .schedules import rate


def set_learning_rates(
    optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, total_steps: int, scale: float = 1.0
) -> None:
    """Set every group to its scheduled rate at ``step`` (from 0), times ``scale``."""
    for group in optimizer.param_groups:
        if group["lr"] is None:  # Adafactor with relative steps has none
            continue
        now = scale * rate(config, group["base_lr"], step, total_steps)
        if isinstance(group["lr"], torch.Tensor):  # a captured update reads it where it lies
            group["lr"].fill_(now)
        else:
            group["lr"] = now


def logged_rates(
    optimizer: torch.optim.Optimizer,
    labels: Sequence[str],
    config: TrainConfig,
    step: int,
    total_steps: int,
    scale: float = 1.0,
) -> dict[str, float]:
    """Return the rates that ``step`` (from 0) was taken with; d * lr for those that estimate d themselves."""
    groups = zip(labels, optimizer.param_groups, strict=True)
    return {
        label: _relative(optimizer, group)
        if group["lr"] is None
        else float(group.get("d", 1.0)) * (scale * rate(config, group["base_lr"], step, total_steps))
        for label, group in groups
    }


def _relative(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    """Return the rate that Adafactor made for a group's first tensor."""
    for parameter in group["params"]:
        state = optimizer.state.get(parameter)
        if state:
            return float(optimizer._get_lr(group, state))  # type: ignore[attr-defined]
    return 0.0
