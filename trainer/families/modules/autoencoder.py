"""The KL autoencoder that brings images to latents and back (Rombach et al. 2022), with diffusers' class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ...errors import LoraGraftError
from ..base import Tensors
from .building import assign, built, count

FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159  # of Flux.1's autoencoder, which later models took over


def vae_config(sd: Tensors, *, scaling_factor: float, shift_factor: float | None = None) -> dict[str, Any]:
    """Read the VAE's shape from its decoder's weights: the decoder has a block at every level."""
    levels = count(sd, r"decoder\.up_blocks\.(\d+)\.")
    quantised = "post_quant_conv.weight" in sd
    return {
        "block_out_channels": tuple(
            sd[f"decoder.up_blocks.{levels - 1 - i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)
        ),
        "layers_per_block": count(sd, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        "latent_channels": sd["decoder.conv_in.weight"].shape[1],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 32,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "use_quant_conv": quantised,
        "use_post_quant_conv": quantised,
    }


def load_vae(
    sd: Tensors, family: str, *, scaling_factor: float, shift_factor: float | None = None, channels: int = 4
) -> nn.Module:
    """Build the VAE on its weights, shared, not copied.

    Raises LG-BASE-003 for weights that are not whole, and for latents of other than ``channels``.
    """
    from diffusers import AutoencoderKL

    def build() -> nn.Module:
        config = vae_config(sd, scaling_factor=scaling_factor, shift_factor=shift_factor)
        model: nn.Module = AutoencoderKL(**config)
        return model

    vae = built("VAE", family, build)
    assign(vae, sd, "VAE", family)
    found = cast(Any, vae).config.latent_channels
    if found != channels:
        raise LoraGraftError(
            "LG-BASE-003",
            f"The VAE is not the one of {family}.",
            where=f"VAE: latents of {found} channels, where {family} takes {channels}",
            why="the denoiser cannot read its latents.",
            fix=f"name a VAE of {family}, or leave --vae out where the base has one",
        )
    return vae


def moments_of(vae: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Encode pixels (B, 3, H, W) in [-1, 1] into mean and std of their latents, float32, unscaled."""
    posterior = cast(Any, vae).encode(pixels.float()).latent_dist
    return {"mean": posterior.mean.float(), "std": posterior.std.float()}


def scaled_latents(
    moments: Mapping[str, torch.Tensor], noise: torch.Tensor, scale: float, shift: float = 0.0
) -> torch.Tensor:
    """Draw latents (B, C, h, w) from moments with standard normal ``noise``, shifted and scaled."""
    drawn = moments["mean"] + moments["std"] * noise
    return (drawn - shift if shift else drawn) * scale


def decoded(vae: nn.Module, latents: torch.Tensor, scale: float, shift: float = 0.0) -> torch.Tensor:
    """Return pixels (B, 3, H, W), about in [-1, 1], float32, for scaled latents."""
    unscaled = latents / scale + shift if shift else latents / scale
    pixels: torch.Tensor = cast(Any, vae).decode(unscaled, return_dict=False)[0]
    return pixels.float()
