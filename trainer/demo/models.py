"""Build the demo base's three networks: SD1.5's structure at about a hundredth of its size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

SCALING_FACTOR = 0.18215
MAX_TOKENS = 77

VAE_CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    # GroupNorm has 32 groups, and a flat colour survives it only where a group holds three channels or more:
    # with 64 channels the VAE saw little but luminance. Zero layers per block (the decoder adds one) pay.
    "block_out_channels": (96, 96, 96, 96),
    "layers_per_block": 0,
    "latent_channels": 4,
    "sample_size": 64,
    "scaling_factor": SCALING_FACTOR,
}
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (64, 64, 128),
    "layers_per_block": 2,
    # As in SD1.5's own config, diffusers reads this as the number of heads.
    "attention_head_dim": 8,
    "cross_attention_dim": 128,
}
TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "projection_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "hidden_act": "quick_gelu",
}


def build_vae() -> AutoencoderKL:
    """Build the VAE: 8 times down, four latent channels."""
    return AutoencoderKL(**VAE_CONFIG)


def build_unet() -> UNet2DConditionModel:
    """Build the denoiser."""
    unet = UNet2DConditionModel(**UNET_CONFIG)
    # With so few tokens, plain matrix products are twice as fast on CPU as fused attention is.
    unet.set_attn_processor(AttnProcessor())
    return unet


def build_text_encoder(vocab_size: int) -> CLIPTextModel:
    """Build the text encoder; the last two of `vocab_size` ids are start and end of text."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
        **TEXT_CONFIG,
    )
    return CLIPTextModel._from_config(config, attn_implementation="eager")


def count_parameters(module: torch.nn.Module) -> int:
    """Count a module's parameters."""
    return sum(p.numel() for p in module.parameters())
