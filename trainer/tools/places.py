"""Where a LoRA's modules lie in a single-file checkpoint: kohya's names against the tensors' names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..families.ldm_keys import TEXT_PREFIX, UNET_PREFIX, unet_to_diffusers
from .unflatten import flatten

# OpenCLIP's text encoders (SD2.x; SDXL's second): their prefixes, and kohya's names of them.
OPEN_CLIP = {
    "cond_stage_model.model.transformer.resblocks.": "lora_te_",
    "conditioner.embedders.1.model.transformer.resblocks.": "lora_te2_",
}
OPEN_CLIP_LAYERS = {"attn.out_proj": "self_attn_out_proj", "mlp.c_fc": "mlp_fc1", "mlp.c_proj": "mlp_fc2"}
CLIP = {
    TEXT_PREFIX: "lora_te_",
    "conditioner.embedders.0.transformer.": "lora_te1_",
    "text_encoders.clip_l.transformer.": "lora_te1_",
    "text_encoders.clip_g.transformer.": "lora_te2_",
}
T5_PREFIX, T5_NAME = "text_encoders.t5xxl.transformer.", "lora_te3_"
# What tells a transformer whose LoRAs have the names of its tensors: SD3's and Flux's.
TRANSFORMER_KEYS = ("joint_blocks.0.context_block.attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight")


@dataclass(frozen=True)
class Place:
    """A checkpoint's tensor, and which third of its rows where q, k and v lie in one."""

    key: str
    third: int | None = None

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a view of the rows that belong to the module."""
        return weight if self.third is None else weight.chunk(3)[self.third]


def places_in(keys: Iterable[str]) -> dict[str, Place]:
    """Map kohya's module names to a checkpoint's weights; a U-Net's modules are there under both their names.

    Returns {} for a checkpoint that is neither SD1.x, SD2.x, SDXL, SD3 nor Flux.
    """
    keys = [k for k in keys if k.endswith((".weight", ".in_proj_weight"))]
    found = dict(_text_places(keys))
    unet = [k[len(UNET_PREFIX) :] for k in keys if k.startswith(UNET_PREFIX)]
    if any(k.startswith("input_blocks.") for k in unet):
        for new, old in unet_to_diffusers(unet).items():
            place = Place(UNET_PREFIX + old)
            for path in (old, new):  # SDXL's LoRAs have LDM's names, SD1.x's and SD2.x's diffusers'
                found["lora_unet_" + flatten(path.removesuffix(".weight"))] = place
    elif any(key in unet for key in TRANSFORMER_KEYS):
        found |= {f"lora_unet_{flatten(k.removesuffix('.weight'))}": Place(UNET_PREFIX + k) for k in unet}
    elif any(key in keys for key in TRANSFORMER_KEYS):
        found |= {f"lora_unet_{flatten(k.removesuffix('.weight'))}": Place(k) for k in keys}
    return found


def trained_in(
    keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]], *, convolutions: bool
) -> dict[str, Place]:
    """Return the modules that kohya's LoRA trains, each under its one name; ``convolutions`` adds LoCon's."""
    keys = list(keys)
    both = places_in(keys)
    sdxl = any(k.startswith("conditioner.embedders.1.") for k in keys)
    ldm = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks|(joint|double|single)_blocks)_")
    transformer = not any("input_blocks" in k for k in keys)
    wanted: dict[str, Place] = {}
    for name, place in both.items():
        shape = shapes[place.key]
        if len(shape) not in (2, 4) or "token_embedding" in name or "position_embedding" in name:
            continue
        if name.startswith("lora_te"):
            inside = "_self_attn_" in name or "_mlp_" in name
        elif bool(ldm.match(name)) != (sdxl or transformer):
            continue
        else:
            inside = transformer or _is_attention(place.key) or (convolutions and _is_block(place.key))
        if inside:
            wanted[name] = place
    return wanted


def _is_attention(key: str) -> bool:
    """Say whether an LDM U-Net's weight lies in a transformer."""
    return re.search(r"\.(transformer_blocks|proj_in|proj_out)\b", key) is not None


def _is_block(key: str) -> bool:
    """Say whether it lies in a residual block, or is a down- or upsampler's convolution."""
    return re.search(r"\.(in_layers|out_layers|emb_layers|skip_connection|op|conv)\.", key) is not None


def _text_places(keys: list[str]) -> Iterator[tuple[str, Place]]:
    for key in keys:
        for prefix, name in CLIP.items():
            if key.startswith(prefix + "text_model."):
                yield name + flatten(key[len(prefix) :].removesuffix(".weight")), Place(key)
        if key.startswith(f"{T5_PREFIX}encoder.block."):
            yield T5_NAME + flatten(key[len(T5_PREFIX) :].removesuffix(".weight")), Place(key)
        for prefix, name in OPEN_CLIP.items():
            if key.startswith(prefix):
                number, _, layer = key[len(prefix) :].partition(".")
                where = f"{name}text_model_encoder_layers_{number}"
                if layer == "attn.in_proj_weight":
                    for third, letter in enumerate("qkv"):
                        yield f"{where}_self_attn_{letter}_proj", Place(key, third)
                elif known := OPEN_CLIP_LAYERS.get(layer.removesuffix(".weight")):
                    yield f"{where}_{known}", Place(key)
