"""Qwen-Image's autoencoder, Wan 2.1's trained further: its names in files, its shape, to latents and back.

It is made for video, and an image is a video of one frame. Files number all layers of the encoder and of
the decoder in one row, as Wan's do; diffusers' `AutoencoderKLQwenImage` counts the decoder's by level.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from ...errors import LoraGraftError
from ..base import Tensors
from ..sources.versions import newer
from .building import assign, built, count

# Of each channel, from the model's published configuration.
MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
FACTOR = 8  # pixels per latent pixel

RESIDUAL = (
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
)
OF_A_SIDE = (
    ("conv1.", "conv_in."),
    ("middle.1.", "mid_block.attentions.0."),
    ("head.0.", "norm_out."),
    ("head.2.", "conv_out."),
)
OUTSIDE = (("conv1.", "quant_conv."), ("conv2.", "post_quant_conv."))
Pairs = list[tuple[str, str]]


def vae_names(file_keys: Iterable[str]) -> dict[str, str]:
    """Map diffusers' names to the given names of a file (both without prefix); others are left out."""
    keys = list(file_keys)
    upsampler = min(_numbers(keys, r"decoder\.upsamples\.(\d+)\.resample\."), default=0)
    downs = max(_numbers(keys, r"encoder\.downsamples\.(\d+)\."), default=-1) + 1
    ups = max(_numbers(keys, r"decoder\.upsamples\.(\d+)\."), default=-1) + 1
    return _mapped(keys, _pairs(downs, ups, upsampler + 1))


def file_names(diffusers_keys: Iterable[str]) -> dict[str, str]:
    """Map a file's names to the given diffusers names."""
    keys = list(diffusers_keys)
    resnets = max(_numbers(keys, r"decoder\.up_blocks\.0\.resnets\.(\d+)\."), default=-1) + 1
    downs = max(_numbers(keys, r"encoder\.down_blocks\.(\d+)\."), default=-1) + 1
    levels = max(_numbers(keys, r"decoder\.up_blocks\.(\d+)\."), default=-1) + 1
    pairs = _pairs(downs, levels * (resnets + 1), resnets + 1)
    return _mapped(keys, [(new, old) for old, new in pairs])


def _pairs(downs: int, ups: int, per_level: int) -> Pairs:
    """Pair the prefixes of modules, a file's and diffusers'; ``downs`` and ``ups`` count a row's layers."""
    pairs: Pairs = list(OUTSIDE)
    for side in ("encoder.", "decoder."):
        pairs += [(side + old, side + new) for old, new in OF_A_SIDE]
        for i, place in enumerate(("middle.0.", "middle.2.")):
            pairs += [(side + place + old, f"{side}mid_block.resnets.{i}.{new}") for old, new in RESIDUAL]
    rows = [(f"encoder.downsamples.{i}.", f"encoder.down_blocks.{i}.", True) for i in range(downs)]
    for i in range(ups):
        level, number = divmod(i, per_level)
        is_resnet = number < per_level - 1
        inside = f"resnets.{number}." if is_resnet else "upsamplers.0."
        rows.append((f"decoder.upsamples.{i}.", f"decoder.up_blocks.{level}.{inside}", is_resnet))
    for of_file, of_module, may_be_resnet in rows:
        if may_be_resnet:
            pairs += [(of_file + old, of_module + new) for old, new in RESIDUAL]
        pairs += [(of_file + layer, of_module + layer) for layer in ("resample.", "time_conv.")]
    return pairs


def _mapped(keys: list[str], pairs: Pairs) -> dict[str, str]:
    names = {}
    for key in keys:
        pair = next(((old, new) for old, new in pairs if key.startswith(old)), None)
        if pair is not None:
            names[pair[1] + key[len(pair[0]) :]] = key
    return names


def _numbers(keys: list[str], pattern: str) -> list[int]:
    return [int(m[1]) for k in keys if (m := re.match(pattern, k))]


def vae_config(sd: Tensors) -> dict[str, Any]:
    """Read the autoencoder's shape from weights with diffusers' names; raises LG-BASE-004 for 4 channels."""
    channels = sd["encoder.conv_in.weight"].shape[1]
    if channels != 3:
        raise LoraGraftError(
            "LG-BASE-004",
            "This VAE is that of Qwen-Image-Layered, which is not supported.",
            where=f"VAE: {channels} colour channels",
            why="training pictures have no layers with transparency.",
            fix="use Qwen-Image's own VAE (qwen_image_vae.safetensors)",
        )
    per_level = count(
        sd, r"decoder\.up_blocks\.0\.resnets\.(\d+)\."
    )  # the encoder has one less, and a scaler
    levels = count(sd, r"decoder\.up_blocks\.(\d+)\.")
    base = sd["encoder.conv_in.weight"].shape[0]
    widths = [sd[f"encoder.down_blocks.{i * per_level}.conv2.weight"].shape[0] for i in range(levels)]
    return {
        "base_dim": base,
        "z_dim": sd["post_quant_conv.weight"].shape[0],
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": per_level - 1,
        "temperal_downsample": [
            f"encoder.down_blocks.{(i + 1) * per_level - 1}.time_conv.weight" in sd for i in range(levels - 1)
        ],
        "latents_mean": list(MEAN),
        "latents_std": list(STD),
    }


def load_qwen_vae(sd: Tensors, family: str) -> nn.Module:
    """Build the autoencoder on its weights, shared; raises LG-BASE-003, -004, -010."""
    name = "AutoencoderKLQwenImage"
    vae_class = newer("diffusers", name, family=family, since="0.35")
    vae = built("VAE", family, lambda: cast(nn.Module, vae_class(**vae_config(sd))))
    assign(vae, sd, "VAE", family)
    return vae


def video_moments(vae: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Encode pixels (B, 3, H, W) in [-1, 1] into mean and std (B, 16, H/8, W/8), float32, unscaled."""
    posterior = cast(Any, vae).encode(pixels.float()[:, :, None]).latent_dist
    return {"mean": posterior.mean[:, :, 0].float(), "std": posterior.std[:, :, 0].float()}


def normalised(moments: Mapping[str, torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
    """Draw latents from moments with standard normal ``noise``, each channel at mean 0 and std 1."""
    drawn = moments["mean"] + moments["std"] * noise
    return (drawn - _of_channels(MEAN, drawn)) / _of_channels(STD, drawn)


def video_decoded(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Return pixels (B, 3, H, W) in [-1, 1], float32, for latents as `normalised` gives them."""
    latents = latents.float()
    unscaled = latents * _of_channels(STD, latents) + _of_channels(MEAN, latents)
    pixels: torch.Tensor = cast(Any, vae).decode(unscaled[:, :, None], return_dict=False)[0]
    return pixels[:, :, 0].float()


def _of_channels(numbers: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(-1, 1, 1)
