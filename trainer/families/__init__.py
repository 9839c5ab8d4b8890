"""The families: one file per architecture, one line here."""

from __future__ import annotations

from ..errors import LoraGraftError
from .base import Family, Tensors
from .chroma import Chroma
from .flux import Flux
from .flux2 import Flux2Klein
from .lumina2 import Lumina2
from .qwen_image import QwenImage
from .sd2 import SD2
from .sd3 import SD3
from .sd15 import SD15
from .sdxl import SDXL
from .z_image import ZImage

FAMILIES: dict[str, Family] = {
    "sd15": SD15(),
    "sd2": SD2(),
    "sdxl": SDXL(),
    "sd3": SD3("sd3"),
    "sd35_large": SD3("sd35_large"),
    "sd35_medium": SD3("sd35_medium"),
    "flux": Flux("flux"),
    "flux_schnell": Flux("flux_schnell"),
    "chroma": Chroma(),
    "flux2": Flux2Klein(),
    "qwen_image": QwenImage(),
    "z_image": ZImage(),
    "lumina2": Lumina2(),
}

__all__ = ["FAMILIES", "Family", "detect"]


def detect(weights: Tensors, *, where: str) -> Family:
    """Return the family that single-file weights belong to; raises LG-BASE-002 when none does."""
    for family in FAMILIES.values():
        if family.detect(weights):
            return family
    raise LoraGraftError(
        "LG-BASE-002",
        "The base model's architecture is not known.",
        where=f"{where} ({len(weights)} tensors, first: {next(iter(sorted(weights)), 'none')})",
        why=f"its tensor names fit none of the supported families: {', '.join(FAMILIES)}.",
        fix="use a complete checkpoint of a supported family (U-Net, VAE and text encoder in one file)",
    )
