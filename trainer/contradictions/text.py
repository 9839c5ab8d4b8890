"""What contradicts itself in how captions are read."""

from __future__ import annotations

from ..config import TrainConfig


def check(config: TrainConfig, where: str) -> None:
    """Raise LG-CFG-004 for the first fault."""
