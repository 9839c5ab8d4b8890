"""Key names of the single-file (LDM) layout of SD1.x, SD2.x and SDXL and of diffusers' modules, both ways.

A U-Net or VAE is described by its number of levels and of residual blocks per level; from these a
table of prefix pairs (LDM, diffusers) follows, and small tables name the layers inside a block.
CLIP's text encoders have the same names in both layouts but for a prefix; OpenCLIP's are in openclip.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."

RESNET_LAYERS = (
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
)
VAE_RESNET_LAYERS = (
    ("norm1.", "norm1."),
    ("conv1.", "conv1."),
    ("norm2.", "norm2."),
    ("conv2.", "conv2."),
    ("nin_shortcut.", "conv_shortcut."),
)
VAE_ATTENTION_LAYERS = (
    ("norm.", "group_norm."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
)

Pairs = list[tuple[str, str]]


def unet_to_diffusers(ldm_keys: Iterable[str]) -> dict[str, str]:
    """Map diffusers' U-Net keys to the given LDM keys (both without prefix); unknown keys are left out."""
    keys = list(ldm_keys)
    blocks = 1 + max((int(m[1]) for k in keys if (m := re.match(r"input_blocks\.(\d+)\.", k))), default=0)
    downs = [int(m[1]) for k in keys if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", k))]
    per_level = min(downs) - 1 if downs else blocks - 1
    levels = blocks // (per_level + 1)
    attended = {
        int(m[1]) // (per_level + 1)
        for k in keys
        if (m := re.match(r"output_blocks\.(\d+)\.1\.proj_in\.weight", k))
    }
    pairs = unet_pairs(levels, per_level, attended)
    return {new: key for key in keys if (new := _replace(key, pairs)) is not None}


def unet_to_ldm(diffusers_keys: Iterable[str]) -> dict[str, str]:
    """Map LDM U-Net keys to the given diffusers keys."""
    keys = list(diffusers_keys)
    levels = 1 + max(int(m[1]) for k in keys if (m := re.match(r"down_blocks\.(\d+)\.", k)))
    per_level = 1 + max(int(m[1]) for k in keys if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", k)))
    attended = {int(m[1]) for k in keys if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", k))}
    pairs = [(new, old) for old, new in unet_pairs(levels, per_level, attended)]
    return {new: key for key in keys if (new := _replace(key, pairs)) is not None}


def vae_to_diffusers(ldm_keys: Iterable[str]) -> dict[str, str]:
    """Map diffusers' VAE keys to the given LDM keys; attention weights change shape, see ``vae_shape``."""
    keys = list(ldm_keys)
    levels = 1 + max((int(m[1]) for k in keys if (m := re.match(r"decoder\.up\.(\d+)\.", k))), default=0)
    return {new: key for key in keys if (new := _replace(key, _vae_pairs(levels))) is not None}


def vae_to_ldm(diffusers_keys: Iterable[str]) -> dict[str, str]:
    """Map LDM VAE keys to the given diffusers keys; attention weights become 1x1 convolutions there."""
    keys = list(diffusers_keys)
    levels = 1 + max(int(m[1]) for k in keys if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", k)))
    pairs = [(new, old) for old, new in _vae_pairs(levels)]
    return {new: key for key in keys if (new := _replace(key, pairs)) is not None}


def is_vae_attention_weight(ldm_key: str) -> bool:
    """Say whether this LDM VAE weight is stored as (C, C, 1, 1) where diffusers holds (C, C)."""
    return re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", ldm_key) is not None


def unet_pairs(levels: int, per_level: int, attended: set[int]) -> Pairs:
    """Pair the prefixes of a U-Net's modules, LDM's and diffusers'.

    ``attended`` levels count from the way up.
    """
    pairs: Pairs = [
        ("input_blocks.0.0.", "conv_in."),
        ("time_embed.0.", "time_embedding.linear_1."),
        ("time_embed.2.", "time_embedding.linear_2."),
        ("label_emb.0.0.", "add_embedding.linear_1."),  # SDXL: pooled text and sizes
        ("label_emb.0.2.", "add_embedding.linear_2."),
        ("out.0.", "conv_norm_out."),
        ("out.2.", "conv_out."),
        ("middle_block.1.", "mid_block.attentions.0."),
        *_inside("middle_block.0.", "mid_block.resnets.0.", RESNET_LAYERS),
        *_inside("middle_block.2.", "mid_block.resnets.1.", RESNET_LAYERS),
    ]
    stride = per_level + 1
    for level in range(levels):
        for i in range(per_level):
            block = f"input_blocks.{1 + level * stride + i}"
            pairs += _inside(f"{block}.0.", f"down_blocks.{level}.resnets.{i}.", RESNET_LAYERS)
            pairs.append((f"{block}.1.", f"down_blocks.{level}.attentions.{i}."))
        if level < levels - 1:
            pairs.append(
                (f"input_blocks.{(level + 1) * stride}.0.op.", f"down_blocks.{level}.downsamplers.0.conv.")
            )
        for i in range(stride):
            block = f"output_blocks.{level * stride + i}"
            pairs += _inside(f"{block}.0.", f"up_blocks.{level}.resnets.{i}.", RESNET_LAYERS)
            if level in attended:
                pairs.append((f"{block}.1.", f"up_blocks.{level}.attentions.{i}."))
        if level < levels - 1:
            place = 2 if level in attended else 1
            last = f"output_blocks.{level * stride + per_level}"
            pairs.append((f"{last}.{place}.conv.", f"up_blocks.{level}.upsamplers.0.conv."))
    return pairs


def _vae_pairs(levels: int) -> Pairs:
    pairs: Pairs = [("quant_conv.", "quant_conv."), ("post_quant_conv.", "post_quant_conv.")]
    for part in ("encoder", "decoder"):
        pairs += [
            (f"{part}.conv_in.", f"{part}.conv_in."),
            (f"{part}.norm_out.", f"{part}.conv_norm_out."),
            (f"{part}.conv_out.", f"{part}.conv_out."),
            *_inside(f"{part}.mid.block_1.", f"{part}.mid_block.resnets.0.", VAE_RESNET_LAYERS),
            *_inside(f"{part}.mid.block_2.", f"{part}.mid_block.resnets.1.", VAE_RESNET_LAYERS),
            *_inside(f"{part}.mid.attn_1.", f"{part}.mid_block.attentions.0.", VAE_ATTENTION_LAYERS),
        ]
    for level in range(levels):
        up = levels - 1 - level  # LDM counts the decoder's levels from the output side
        for i in range(8):  # more residual blocks per level than any known VAE has
            pairs += _inside(
                f"encoder.down.{level}.block.{i}.",
                f"encoder.down_blocks.{level}.resnets.{i}.",
                VAE_RESNET_LAYERS,
            )
            pairs += _inside(
                f"decoder.up.{level}.block.{i}.", f"decoder.up_blocks.{up}.resnets.{i}.", VAE_RESNET_LAYERS
            )
        pairs += [
            (f"encoder.down.{level}.downsample.conv.", f"encoder.down_blocks.{level}.downsamplers.0.conv."),
            (f"decoder.up.{level}.upsample.conv.", f"decoder.up_blocks.{up}.upsamplers.0.conv."),
        ]
    return pairs


def _inside(old: str, new: str, layers: tuple[tuple[str, str], ...]) -> Pairs:
    return [(old + a, new + b) for a, b in layers]


def _replace(key: str, pairs: Pairs) -> str | None:
    for old, new in pairs:
        if key.startswith(old):
            return new + key[len(old) :]
    return None
