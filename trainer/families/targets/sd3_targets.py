"""Which modules of SD3 are trained, under the reference trainer's names: query, key and value are one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from ...errors import LoraGraftError
from ...parts import DENOISER, Parts, Target
from ...settings.presets import TEXT
from ..names.sd3_keys import ATTENTION, LINEARS, OUTSIDE, Pairs, our_module
from ..text.sd3_text import CLIP_G, CLIP_L, T5
from ..text.t5_text import TARGETS as T5_CLASSES

TEXT_PREFIXES = {CLIP_L: "lora_te1", CLIP_G: "lora_te2", T5: "lora_te3"}
TEXT_CLASSES = TEXT + T5_CLASSES
IN_BLOCK = "joint_blocks."


@dataclass(frozen=True)
class Modules:
    """What a preset trains: modules inside every block, modules outside, classes of the text encoders."""

    inside: Pairs = ()
    outside: Pairs = ()
    text: tuple[str, ...] = ()


ALL = Modules(LINEARS, (), TEXT_CLASSES)
PRESETS: Mapping[str, Modules] = {
    "": ALL,
    "full": ALL,
    "full-lin": ALL,
    "attn-mlp": ALL,
    "attn-only": Modules(ATTENTION, (), tuple(name for name in TEXT_CLASSES if "Attention" in name)),
    "unet-only": Modules(LINEARS),
    "unet-transformer-only": Modules(LINEARS),
    "everything": Modules(LINEARS, OUTSIDE, TEXT_CLASSES),
}


def find_sd3_targets(parts: Parts, preset: str) -> list[Target]:
    """List the trained modules, text encoders first, then blocks, then what lies outside of them.

    Raises LG-CFG-004 for a preset whose modules SD3 does not have.
    """
    if preset not in PRESETS:
        raise LoraGraftError(
            "LG-CFG-004",
            f"The preset {preset} has no modules in SD3.",
            where="preset",
            why="it names layers of U-Nets, of which nothing would be trained.",
            fix=f"choose one of {', '.join(name for name in PRESETS if name)}, or none",
        )
    chosen = PRESETS[preset]
    found: list[Target] = []
    for part, encoder in parts.text_encoders.items():
        found += _in_text(part, encoder, chosen.text)
    return found + list(_in_denoiser(parts.denoiser, chosen))


def _in_denoiser(denoiser: nn.Module, chosen: Modules) -> Iterator[Target]:
    modules = dict(denoiser.named_modules())
    blocks = len(cast(nn.ModuleList, modules["transformer_blocks"]))
    inside = [f"{IN_BLOCK}{i}.{theirs}" for i in range(blocks) for theirs, _ in chosen.inside]
    for theirs in (*inside, *(theirs for theirs, _ in chosen.outside)):
        ours = our_module(theirs)
        if (
            ours is not None and ours in modules
        ):  # the last block's text ends with its keys and values; few blocks attend twice
            kind = "conv" if isinstance(modules[ours], nn.Conv2d) else "linear"
            block = int(theirs.split(".")[1]) if theirs.startswith(IN_BLOCK) else None
            yield Target(DENOISER, ours, f"lora_unet_{theirs.replace('.', '_')}", kind, block)


def _in_text(part: str, encoder: nn.Module, classes: tuple[str, ...]) -> Iterator[Target]:
    for outer_path, outer in encoder.named_modules():
        if type(outer).__name__ not in classes:
            continue
        for inner_path, inner in outer.named_modules():
            if isinstance(inner, nn.Linear):
                path = f"{outer_path}.{inner_path}"
                named = path if part == T5 or path.startswith("text_model.") else f"text_model.{path}"
                yield Target(part, path, f"{TEXT_PREFIXES[part]}_{named.replace('.', '_')}", "linear")
