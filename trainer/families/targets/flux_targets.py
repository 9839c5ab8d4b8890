"""Which modules of Flux.1 are trained, under the reference trainer's names and in its order."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ...parts import Parts, Target
from ...settings.presets import TEXT
from ..modules.flux_blocks import DoubleBlock, SingleBlock
from ..modules.stream_blocks import SelfAttention
from ..names.flux_keys import DOUBLE, SINGLE, TOP
from ..text.t5_text import TARGETS as T5_CLASSES
from .block_targets import ATTENTION, find_block_targets

TEXT_PREFIXES = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te3"}  # as in SD3, where te2 is CLIP-G
TEXT_CLASSES = TEXT + T5_CLASSES
WITHOUT_TEXT = ("unet-only", "unet-transformer-only")
BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
TABLES = {"double": (0, list(DOUBLE)), "single": (1, list(SINGLE))}


def find_flux_targets(
    parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False
) -> list[Target]:
    """List the trained modules, text encoders first, then blocks, then what lies outside of them.

    Raises LG-CFG-004 for convolutions and for presets whose modules Flux does not have.
    """
    attention = (SelfAttention,)  # of the double blocks; single blocks have it in one layer with the rest
    found = find_block_targets(
        parts,
        (DoubleBlock, SingleBlock),
        attention,
        family="Flux.1",
        convolutions=convolutions,
        preset=preset,
        norms=norms,
    )
    texts = [target for part, root in parts.text_encoders.items() for target in _in_text(part, root, preset)]
    return texts + sorted(found, key=_place)


def _place(target: Target) -> tuple[int, int, int]:
    """Return where the reference trainer has a module: kind of block, its number, the place in it."""
    if found := BLOCK.match(target.path):
        kind, names = TABLES[found[1]]
        return kind, int(found[2]), names.index(found[3])
    return len(TABLES), 0, list(TOP).index(target.path)


def _in_text(part: str, encoder: nn.Module, preset: str) -> Iterator[Target]:
    if preset in WITHOUT_TEXT:
        return
    classes = [name for name in TEXT_CLASSES if preset != ATTENTION or "Attention" in name]
    for outer_path, outer in encoder.named_modules():
        if type(outer).__name__ not in classes:
            continue
        for inner_path, inner in outer.named_modules():
            if isinstance(inner, nn.Linear):
                path = f"{outer_path}.{inner_path}"
                is_clip = part == "text_encoder" and not path.startswith("text_model.")
                named = f"text_model.{path}" if is_clip else path  # transformers 5 dropped that prefix
                yield Target(part, path, f"{TEXT_PREFIXES[part]}_{named.replace('.', '_')}", "linear")
