"""The names of a LoRA's modules in three worlds: kohya's trainer, diffusers (PEFT), and ComfyUI.

kohya's flat name is the common one: every other naming is brought to it and made from it. Which names a
U-Net has there depends on the architecture: SD1.x and SD2.x diffusers' own, SDXL, SD3 and Flux those of
their authors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from ..errors import LoraGraftError, listed
from ..families.ldm_keys import unet_pairs
from .unflatten import flatten, unflatten

NAMINGS = ("kohya", "diffusers", "comfyui")
# What a text encoder's names begin with: kohya's, diffusers', ComfyUI's.
TEXT_PREFIXES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "sd": (("lora_te_", "text_encoder.", "text_encoders.clip_l.transformer."),),
    "sd2": (("lora_te_", "text_encoder.", "text_encoders.clip_h.transformer."),),
    "sdxl": (
        ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer."),
        ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer."),
    ),
    "sd3": (
        ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer."),
        ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer."),
        ("lora_te3_", "text_encoder_3.", "text_encoders.t5xxl.transformer."),
    ),
    "flux": (
        ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer."),
        ("lora_te3_", "text_encoder_2.", "text_encoders.t5xxl.transformer."),
    ),
}
UNET_FLAT, UNET_COMFY = "lora_unet_", "diffusion_model."
# levels of the U-Net, residual blocks a level, levels of its way up that have attention
UNETS = {
    "sd": (4, 2, frozenset({1, 2, 3})),
    "sd2": (4, 2, frozenset({1, 2, 3})),
    "sdxl": (3, 2, frozenset({0, 1})),
}
FLAT_DIFFUSERS = ("sd", "sd2")  # whose U-Net kohya names as diffusers does
SD2_LAYERS = re.compile(r"clip_h|encoder[._]layers[._](1[2-9]|2\d)")  # SD1.x's text encoder has 12 layers
DEEP = re.compile(r"transformer_blocks[._][1-9]")  # a block beside the first one: SDXL alone has any
OLD_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)$")

# Transformers: a block's modules under both names. Where diffusers has several, they are the rows of one.
Blocks = tuple[tuple[str, str, tuple[tuple[str, tuple[str, ...]], ...]], ...]
FLUX_BLOCKS: Blocks = (
    (
        "double_blocks",
        "transformer_blocks",
        (
            ("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
            ("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
            ("img_attn.proj", ("attn.to_out.0",)),
            ("txt_attn.proj", ("attn.to_add_out",)),
            ("img_mlp.0", ("ff.net.0.proj",)),
            ("img_mlp.2", ("ff.net.2",)),
            ("txt_mlp.0", ("ff_context.net.0.proj",)),
            ("txt_mlp.2", ("ff_context.net.2",)),
            ("img_mod.lin", ("norm1.linear",)),
            ("txt_mod.lin", ("norm1_context.linear",)),
        ),
    ),
    (
        "single_blocks",
        "single_transformer_blocks",
        (
            ("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
            ("linear2", ("proj_out",)),
            ("modulation.lin", ("norm.linear",)),
        ),
    ),
)
SD3_BLOCKS: Blocks = (
    (
        "joint_blocks",
        "transformer_blocks",
        (
            ("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
            ("context_block.attn.proj", ("attn.to_add_out",)),
            ("context_block.mlp.fc1", ("ff_context.net.0.proj",)),
            ("context_block.mlp.fc2", ("ff_context.net.2",)),
            ("context_block.adaLN_modulation.1", ("norm1_context.linear",)),
            ("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
            ("x_block.attn.proj", ("attn.to_out.0",)),
            ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
            ("x_block.attn2.proj", ("attn2.to_out.0",)),
            ("x_block.mlp.fc1", ("ff.net.0.proj",)),
            ("x_block.mlp.fc2", ("ff.net.2",)),
            ("x_block.adaLN_modulation.1", ("norm1.linear",)),
        ),
    ),
)
JOINED: dict[str, Blocks] = {"sd3": SD3_BLOCKS, "flux": FLUX_BLOCKS}
# SD3 has what Flux has not: blocks of this name, a third text encoder, second attentions, a block 19.
SD3 = re.compile(
    r"joint_blocks|^text_encoder_3\.|^transformer\.transformer_blocks\.(\d+\.attn2|19|[2-9]\d)\."
)


def architecture_of(names: Iterable[str]) -> str:
    """Tell sd (SD1.x), sd2, sdxl, sd3 or flux from module names of any naming."""
    names = list(names)
    if any(SD3.search(n) for n in names):
        return "sd3"
    if any(re.search(r"(double|single)_blocks|^transformer\.|single_transformer_blocks", n) for n in names):
        return "flux"
    if any(
        n.startswith(("lora_te1_", "lora_te2_", "text_encoder_2.", "text_encoders.clip_g."))
        or n.startswith(("lora_unet_input_blocks", "lora_unet_middle_block", "lora_unet_output_blocks"))
        or DEEP.search(n)
        for n in names
    ):
        return "sdxl"
    return "sd2" if any(SD2_LAYERS.search(n) for n in names) else "sd"


def to_kohya(name: str, architecture: str) -> str | None:
    """Return kohya's name of a module, None where it has none of its own (parts of Flux's joined ones)."""
    name = OLD_PROCESSOR.sub(lambda m: f".{m[1]}{'.0' if m[1] == 'to_out' else ''}", name)
    name = name.removeprefix("base_model.model.")
    if name.startswith("lora_"):
        return name
    for flat, diffusers, comfy in TEXT_PREFIXES[architecture]:
        for prefix in (diffusers, comfy):
            if name.startswith(prefix):
                return flat + flatten(name[len(prefix) :])
    if name.startswith(UNET_COMFY):
        path = name[len(UNET_COMFY) :]
        new = _swap(path, architecture, to_ldm=False) if architecture in FLAT_DIFFUSERS else path
        return None if new is None else UNET_FLAT + flatten(new)
    if name.startswith("unet.") and architecture not in JOINED:
        path = name[len("unet.") :]
        new = path if architecture in FLAT_DIFFUSERS else _swap(path, architecture, to_ldm=True)
        return None if new is None else UNET_FLAT + flatten(new)
    if name.startswith("transformer.") and architecture in JOINED:
        for path, parts in whole_of(name[len("transformer.") :], architecture).items():
            if len(parts) == 1:
                return UNET_FLAT + flatten(path)
    return None


def from_kohya(name: str, naming: str, architecture: str) -> str | None:
    """Return a module's name in another naming; None where it has none, or lies in several modules there."""
    column = NAMINGS.index(naming)
    for prefixes in TEXT_PREFIXES[architecture]:
        if name.startswith(prefixes[0]):
            return prefixes[column] + unflatten(name[len(prefixes[0]) :])
    if not name.startswith(UNET_FLAT):
        return None
    path = unflatten(name[len(UNET_FLAT) :])
    if naming == "comfyui":
        new = _swap(path, architecture, to_ldm=True) if architecture in FLAT_DIFFUSERS else path
        return None if new is None else UNET_COMFY + new
    if architecture in JOINED:
        parts = parts_of(path, architecture)
        return f"transformer.{parts[0]}" if parts is not None and len(parts) == 1 else None
    new = path if architecture in FLAT_DIFFUSERS else _swap(path, architecture, to_ldm=False)
    return None if new is None else f"unet.{new}"


def parts_of(path: str, architecture: str) -> tuple[str, ...] | None:
    """Return diffusers' modules that hold the rows of a module (double_blocks.0.img_attn.qkv)."""
    for theirs, ours, modules in JOINED.get(architecture, ()):
        if match := re.fullmatch(rf"{theirs}\.(\d+)\.(.+)", path):
            parts = dict(modules).get(match[2])
            return None if parts is None else tuple(f"{ours}.{match[1]}.{part}" for part in parts)
    return None


def whole_of(path: str, architecture: str) -> dict[str, tuple[str, ...]]:
    """Return the module that holds diffusers' module ``path``, with all diffusers' modules of it."""
    for theirs, ours, modules in JOINED.get(architecture, ()):
        if match := re.fullmatch(rf"{ours}\.(\d+)\.(.+)", path):
            for name, parts in modules:
                if match[2] in parts:
                    whole = tuple(f"{ours}.{match[1]}.{part}" for part in parts)
                    return {f"{theirs}.{match[1]}.{name}": whole}
    return {}


def refuse_unknown(names: Iterable[str], naming: str) -> None:
    """Raise LG-TOOL-006 for module names that a naming has no place for."""
    if names := list(names):
        raise LoraGraftError(
            "LG-TOOL-006",
            f"{len(names)} modules have no name in {naming}'s naming.",
            where=listed(names, limit=3),
            why="they would be lost.",
            fix="convert a LoRA for SD1.x, SD2.x, SDXL, SD3 or Flux.1; other architectures keep their names",
        )


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
