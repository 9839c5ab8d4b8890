"""What contradicts itself in loss and noise."""

from __future__ import annotations

from ..config import TrainConfig


def check(config: TrainConfig, where: str) -> None:
    """Raise LG-CFG-004 for the first fault."""
