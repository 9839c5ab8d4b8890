"""Where a LoRA's modules lie in a single-file checkpoint: kohya's names against the tensors' names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..families.chroma import OLD_T5_PREFIX
from ..families.names.flux_keys import module_name
from ..families.names.ldm_keys import TEXT_PREFIX, unet_to_diffusers
from ..families.sources.sources import BARE, DENOISER_PREFIXES
from .unflatten import flatten

# OpenCLIP's text encoders (SD2.x; SDXL's second): their prefixes, and kohya's names of them.
OPEN_CLIP = {
    "cond_stage_model.model.transformer.resblocks.": "lora_te_",
    "conditioner.embedders.0.model.transformer.resblocks.": "lora_te_",
    "conditioner.embedders.1.model.transformer.resblocks.": "lora_te2_",
}
OPEN_CLIP_LAYERS = {
    "attn.out_proj": "self_attn_out_proj",
    "mlp.c_fc": "mlp_fc1",
    "mlp.c_proj": "mlp_fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
# Text encoders with transformers' names: their prefixes, how what a LoRA can train begins, kohya's names.
TEXTS = (
    (TEXT_PREFIX, "text_model.", "lora_te_"),
    ("conditioner.embedders.0.transformer.", "text_model.", "lora_te1_"),
    ("text_encoders.clip_l.transformer.", "text_model.", "lora_te1_"),
    ("text_encoders.clip_g.transformer.", "text_model.", "lora_te2_"),
    ("text_encoders.clip_h.transformer.", "text_model.", "lora_te_"),
    ("text_encoders.t5xxl.transformer.", "encoder.block.", "lora_te3_"),
    (OLD_T5_PREFIX, "encoder.block.", "lora_te3_"),
)
# Language models, which are a base's only text encoder: what follows are their layers.
LLM = re.compile(r"text_encoders\.\w+\.transformer\.model\.(layers\..+)\.weight")


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

    A transformer's are named after its tensors, whatever model it is. The denoiser may lie in a file of its
    own; {} where none is known.
    """
    keys = [k for k in keys if k.endswith((".weight", ".in_proj_weight")) or module_name(k) != k]
    found = dict(_text_places(keys))
    prefix = denoiser_prefix(keys)
    if prefix is None:
        return found
    inside = [k[len(prefix) :] for k in keys if k.startswith(prefix)]
    if any(k.startswith("input_blocks.") for k in inside):
        for new, old in unet_to_diffusers(inside).items():
            for path in (old, new):  # SDXL's LoRAs have LDM's names, SD1.x's and SD2.x's diffusers'
                found[_denoiser_name(path)] = Place(prefix + old)
    else:
        found |= {_denoiser_name(module_name(k)): Place(prefix + k) for k in inside}
    return found


def denoiser_prefix(keys: Iterable[str]) -> str | None:
    """Return what a denoiser's names begin with in a file; None where there is no denoiser."""
    keys = list(keys)
    for prefix in DENOISER_PREFIXES:
        if any(k.startswith(prefix) for k in keys):
            return prefix
    return "" if any(k in BARE for k in keys) else None


def trained_in(
    keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]], *, convolutions: bool
) -> dict[str, Place]:
    """Return the modules that kohya's LoRA trains, each under its one name; ``convolutions`` adds LoCon's.

    Of a transformer these are all layers.
    """
    keys = list(keys)
    prefix = denoiser_prefix(keys) or ""
    unet = any(k.startswith(f"{prefix}input_blocks.") for k in keys)
    sdxl = f"{prefix}label_emb.0.0.weight" in keys
    ldm = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_")
    wanted: dict[str, Place] = {}
    for name, place in places_in(keys).items():
        if len(shapes[place.key]) not in (2, 4) or "embedding" in name:
            continue
        if name.startswith("lora_te"):
            inside = re.search(r"_(self_attn|mlp|SelfAttention|DenseReluDense)_", name) is not None
            inside = inside and not name.endswith("relative_attention_bias")
        elif unet:
            layer = _is_attention(place.key) or (convolutions and _is_block(place.key))
            inside = layer and (ldm.match(name) is not None) == sdxl
        else:
            inside = True
        if inside:
            wanted[name] = place
    return wanted


def _denoiser_name(key: str) -> str:
    return "lora_unet_" + flatten(key.removesuffix(".weight"))


def _is_attention(key: str) -> bool:
    """Say whether an LDM U-Net's weight lies in a transformer."""
    return re.search(r"\.(transformer_blocks|proj_in|proj_out)\b", key) is not None


def _is_block(key: str) -> bool:
    """Say whether it lies in a residual block, or is a down- or upsampler's convolution."""
    return re.search(r"\.(in_layers|out_layers|emb_layers|skip_connection|op|conv)\.", key) is not None


def _text_places(keys: list[str]) -> Iterator[tuple[str, Place]]:
    for key in keys:
        for prefix, inside, name in TEXTS:
            if key.startswith(prefix + inside):
                yield name + flatten(key[len(prefix) :].removesuffix(".weight")), Place(key)
        if match := LLM.fullmatch(key):
            yield f"lora_te_{flatten(match[1])}", Place(key)
        for prefix, name in OPEN_CLIP.items():
            if key.startswith(prefix):
                number, _, layer = key[len(prefix) :].partition(".")
                where = f"{name}text_model_encoder_layers_{number}"
                if layer == "attn.in_proj_weight":
                    for third, letter in enumerate("qkv"):
                        yield f"{where}_self_attn_{letter}_proj", Place(key, third)
                elif known := OPEN_CLIP_LAYERS.get(layer.removesuffix(".weight")):
                    yield f"{where}_{known}", Place(key)
