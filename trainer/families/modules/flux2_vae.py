"""FLUX.2's autoencoder: 32 channels, of which squares of 2x2 become 128, each brought to a spread of 1."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..base import Tensors
from ..sources.versions import newer
from .building import assign, built, count

SQUARE = 2
EPS = 1e-4  # beside the variances of the channels


class Statistics(nn.Module):
    """Mean and variance of each packed channel, under the names of the batch norm that they come from."""

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def of(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation, (1, channels, 1, 1) float32."""
        mean, variance = (x.float()[None, :, None, None] for x in (self.running_mean, self.running_var))
        return mean, (variance + EPS).sqrt()


def flux2_vae_config(sd: Tensors) -> dict[str, Any]:
    """Read the autoencoder's shape from its weights; its decoder may be narrower than its encoder."""
    levels = count(sd, r"decoder\.up_blocks\.(\d+)\.")
    encoder = tuple(sd[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels))
    decoder = tuple(
        sd[f"decoder.up_blocks.{levels - 1 - i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)
    )
    return {
        "block_out_channels": encoder,
        "layers_per_block": count(sd, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        "latent_channels": sd["decoder.conv_in.weight"].shape[1],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "use_quant_conv": "quant_conv.weight" in sd,
        "use_post_quant_conv": "post_quant_conv.weight" in sd,
        # an argument that the first releases with this class do not have
        **({"decoder_block_out_channels": decoder} if decoder != encoder else {}),
    }


def load_flux2_vae(sd: Tensors, family: str) -> nn.Module:
    """Build the autoencoder on its weights, shared; raises LG-BASE-010 for an old diffusers."""
    model_class = newer("diffusers", "AutoencoderKLFlux2", family=family, since="0.36")

    def build() -> nn.Module:
        vae = model_class(**flux2_vae_config(sd))
        vae.bn = Statistics(sd["bn.running_mean"].shape[0])
        return cast(nn.Module, vae)

    vae = built("VAE", family, build)
    assign(vae, sd, "VAE", family)
    return vae


def flux2_moments(vae: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Encode pixels (B, 3, H, W) in [-1, 1] into mean and std of latents (B, 128, H/16, W/16), float32."""
    posterior = cast(Any, vae).encode(pixels.float()).latent_dist
    mean, std = cast(Any, vae).bn.of()
    return {
        "mean": (squares(posterior.mean.float()) - mean) / std,
        "std": squares(posterior.std.float()) / std,
    }


def flux2_decoded(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Return pixels (B, 3, H, W), about in [-1, 1], float32, for packed latents."""
    mean, std = cast(Any, vae).bn.of()
    pixels: torch.Tensor = cast(Any, vae).decode(spread(latents * std + mean), return_dict=False)[0]
    return pixels.float()


def squares(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, 4 C, h/2, w/2), the channel outermost."""
    return nn.functional.pixel_unshuffle(latents, SQUARE)


def spread(latents: torch.Tensor) -> torch.Tensor:
    """Undo `squares`."""
    return nn.functional.pixel_shuffle(latents, SQUARE)
