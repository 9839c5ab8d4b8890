"""The names of a LoRA's modules in three worlds: kohya's trainer, diffusers (PEFT), and ComfyUI.

kohya's flat name is the common one: every other naming is brought to it and made from it. Which names a
denoiser has there depends on the architecture: SD1.x and SD2.x diffusers' own, all others those of their
authors' files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from ..errors import LoraGraftError, listed
from ..families.names.ldm_keys import unet_pairs
from .transformer_names import TABLES
from .unflatten import flatten, unflatten

NAMINGS = ("kohya", "diffusers", "comfyui")
UNET_FLAT, UNET_COMFY, DIFFUSERS = "lora_unet_", "diffusion_model.", "transformer."
PEFT = "base_model.model."  # of files that PEFT itself wrote
Prefixes = tuple[tuple[str, str, str], ...]


def _llm(kind: str) -> Prefixes:
    """Return the prefixes of a language model that is the only text encoder."""
    return (("lora_te_", "text_encoder.", f"text_encoders.{kind}.transformer.model."),)


CLIP_L = ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.")
CLIP_G = ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.")
T5 = "text_encoders.t5xxl.transformer."
# What a text encoder's names begin with: kohya's, diffusers', ComfyUI's.
TEXT_PREFIXES: dict[str, Prefixes] = {
    "sd": (("lora_te_", "text_encoder.", "text_encoders.clip_l.transformer."),),
    "sd2": (("lora_te_", "text_encoder.", "text_encoders.clip_h.transformer."),),
    "sdxl": (CLIP_L, CLIP_G),
    "sd3": (CLIP_L, CLIP_G, ("lora_te3_", "text_encoder_3.", T5)),
    "flux": (CLIP_L, ("lora_te3_", "text_encoder_2.", T5)),
    "chroma": (("lora_te3_", "text_encoder.", T5),),
    "flux2": _llm("qwen3_4b"),
    "qwen_image": _llm("qwen25_7b"),
    "z_image": _llm("qwen3_4b"),
    "lumina2": _llm("gemma2_2b"),
    "other": (),
}
# levels of the U-Net, residual blocks a level, levels of its way up that have attention
UNETS = {
    "sd": (4, 2, frozenset({1, 2, 3})),
    "sd2": (4, 2, frozenset({1, 2, 3})),
    "sdxl": (3, 2, frozenset({0, 1})),
}
FLAT_DIFFUSERS = ("sd", "sd2")  # whose U-Net kohya names as diffusers does
OLD_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)$")


def to_kohya(name: str, architecture: str) -> str | None:
    """Return kohya's name of a module, None where it has none of its own: see `whole_of`."""
    name = OLD_PROCESSOR.sub(lambda m: f".{m[1]}{'.0' if m[1] == 'to_out' else ''}", name)
    name = name.removeprefix(PEFT)
    if name.startswith("lora_"):
        return name
    for flat, diffusers, comfy in TEXT_PREFIXES[architecture]:
        for prefix in (diffusers, comfy):
            if name.startswith(prefix):
                return flat + flatten(name[len(prefix) :])
    if architecture in TABLES:
        return _of_transformer(name, architecture)
    if name.startswith(UNET_COMFY):
        path = name[len(UNET_COMFY) :]
        new = _swap(path, architecture, to_ldm=False) if architecture in FLAT_DIFFUSERS else path
        return None if new is None else UNET_FLAT + flatten(new)
    if name.startswith("unet.") and architecture in UNETS:
        path = name[len("unet.") :]
        new = path if architecture in FLAT_DIFFUSERS else _swap(path, architecture, to_ldm=True)
        return None if new is None else UNET_FLAT + flatten(new)
    return None


def from_kohya(name: str, naming: str, architecture: str) -> str | None:
    """Return a module's name in another naming; None where it has none, or lies in several modules there."""
    column = NAMINGS.index(naming)
    for prefixes in TEXT_PREFIXES[architecture]:
        if name.startswith(prefixes[0]):
            return prefixes[column] + unflatten(name[len(prefixes[0]) :])
    if not name.startswith(UNET_FLAT) or architecture == "other":  # whose underscores were dots, nobody tells
        return None
    path = unflatten(name[len(UNET_FLAT) :])
    if naming == "comfyui":
        new = _swap(path, architecture, to_ldm=True) if architecture in FLAT_DIFFUSERS else path
        return None if new is None else UNET_COMFY + new
    if architecture in TABLES:
        parts = parts_of(path, architecture)
        return DIFFUSERS + parts[0] if parts is not None and len(parts) == 1 else None
    new = path if architecture in FLAT_DIFFUSERS else _swap(path, architecture, to_ldm=False)
    return None if new is None else f"unet.{new}"


def parts_of(path: str, architecture: str) -> tuple[str, ...] | None:
    """Return diffusers' modules that hold the rows of a module (double_blocks.0.img_attn.qkv)."""
    return TABLES[architecture].parts_of(path) if architecture in TABLES else None


def whole_of(name: str, architecture: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the module that holds diffusers' module ``name``, with all diffusers' modules of it."""
    return TABLES[architecture].whole_of(bare(name)) if architecture in TABLES else None


def bare(name: str) -> str:
    """Return a denoiser's path without what namings put before it."""
    name = name.removeprefix(PEFT)
    return name.removeprefix(UNET_COMFY) if name.startswith(UNET_COMFY) else name.removeprefix(DIFFUSERS)


def refuse_unknown(names: Iterable[str], naming: str) -> None:
    """Raise LG-TOOL-006 for module names that a naming has no place for."""
    if names := list(names):
        raise LoraGraftError(
            "LG-TOOL-006",
            f"{len(names)} modules have no name in {naming}'s naming.",
            where=listed(names, limit=3),
            why="they would be lost.",
            fix="convert a LoRA for one of the supported base models; those of other models keep their names",
        )


def _of_transformer(name: str, architecture: str) -> str | None:
    """Return kohya's name of a transformer's module that is a whole one; None for parts of a joined one.

    Files below "diffusion_model." have the file's names or diffusers'; without it, diffusers'.
    """
    path = bare(name)
    whole = whole_of(name, architecture)
    if whole is not None:
        return UNET_FLAT + flatten(whole[0]) if len(whole[1]) == 1 else None
    if name.startswith(UNET_COMFY) or parts_of(path, architecture) is not None:
        return UNET_FLAT + flatten(path)
    return None


def _swap(path: str, architecture: str, *, to_ldm: bool) -> str | None:
    """Return a U-Net's path in the other layout, None where it is no path of this architecture."""
    for old, new in _pairs(architecture, to_ldm=to_ldm).items():
        if (path + ".").startswith(old):
            return (new + (path + ".")[len(old) :])[:-1]
    return None


@cache
def _pairs(architecture: str, *, to_ldm: bool) -> dict[str, str]:
    levels, per_level, attended = UNETS[architecture]
    pairs = unet_pairs(levels, per_level, set(attended))
    return {new: old for old, new in pairs} if to_ldm else dict(pairs)
