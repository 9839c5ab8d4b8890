"""The families: one file per architecture, one line here."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import LoraGraftError
from .base import Family
from .sd15 import SD15

FAMILIES: dict[str, Family] = {"sd15": SD15()}

__all__ = ["FAMILIES", "Family", "detect"]


def detect(keys: Sequence[str], *, where: str) -> Family:
    """Return the family that single-file keys belong to; raises LG-BASE-002 when none does."""
    for family in FAMILIES.values():
        if family.detect(keys):
            return family
    raise LoraGraftError(
        "LG-BASE-002",
        "The base model's architecture is not known.",
        where=f"{where} ({len(keys)} tensors, first: {next(iter(sorted(keys)), 'none')})",
        why=f"its tensor names fit none of the supported families: {', '.join(FAMILIES)}.",
        fix="use a complete checkpoint of a supported family (U-Net, VAE and text encoder in one file)",
    )
