"""Normalise the VAE's latents inside its own weights, and encode the pool that the denoiser learns from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from .draw import SIZES_PX, Scene, all_combos, draw_scene, random_scene
from .keep import load_tensors, save_tensors
from .models import SCALING_FACTOR
from .train_vae import to_pixels

# Images per size, in the order of SIZES_PX: mostly square, the rest for buckets of other aspect ratios.
POOL_COUNTS = (12000, 1600, 1600, 1600, 1600)
ENCODE_BATCH = 80


@dataclass
class PoolGroup:
    """Scenes of one size and their latents, (N, 4, H/8, W/8) float32, VAE-scaled."""

    scenes: list[Scene]
    latents: torch.Tensor


def bake_scale(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Rewrite the 1x1 convolutions so that latents times SD's fixed factor have zero mean and unit std.

    mean, std: (4,) of the unscaled latents; encoding and decoding stay inverse to each other.
    """
    gain = 1 / (std * SCALING_FACTOR)
    with torch.no_grad():
        enc, dec = vae.quant_conv, vae.post_quant_conv
        enc.weight[:4].mul_(gain.view(4, 1, 1, 1))
        enc.bias[:4].sub_(mean).mul_(gain)
        enc.bias[4:].add_(2 * gain.log())
        dec.bias.add_(dec.weight[:, :, 0, 0] @ mean)
        dec.weight.div_(gain.view(1, 4, 1, 1))


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels (B, 3, H, W) to scaled latents (B, 4, H/8, W/8), the posterior's mean."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        mean = vae.encode(pixels).latent_dist.mean
    return mean.float() * SCALING_FACTOR


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decode scaled latents to pixels (B, 3, H, W)."""
    with torch.autocast(latents.device.type, torch.bfloat16):
        pixels = vae.decode(latents / SCALING_FACTOR).sample
    return pixels.float()


def normalised_vae(vae: AutoencoderKL, work: Path, seed: int, device: torch.device) -> AutoencoderKL:
    """Bake the statistics of 640 scenes into a trained VAE, once; later calls load the result."""
    path = work / "vae_normalised.safetensors"
    if not path.exists():
        rng = np.random.default_rng([seed, 2])
        chunks = []
        for _ in range(8):
            images = [draw_scene(random_scene(rng)) for _ in range(ENCODE_BATCH)]
            chunks.append(encode(vae, to_pixels(images).to(device)) / SCALING_FACTOR)
        latents = torch.cat(chunks)
        bake_scale(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
        save_tensors(path, vae.state_dict())
    vae.load_state_dict(load_tensors(path)[0])
    return vae


def pool_scenes(seed: int, group: int, combos: list[tuple[str, str, str]]) -> list[Scene]:
    """List the scenes of one pool group."""
    rng = np.random.default_rng([seed, 3, group])
    return [random_scene(rng, SIZES_PX[group], combos) for _ in range(POOL_COUNTS[group])]


def build_pool(
    vae: AutoencoderKL, work: Path, seed: int, device: torch.device, say: Callable[[str], None]
) -> list[PoolGroup]:
    """Draw and encode every scene of training, in pieces kept in `work`/pool."""
    combos = all_combos(held_out=False)
    groups = []
    for group in range(len(SIZES_PX)):
        scenes = pool_scenes(seed, group, combos)
        pieces = []
        for start in range(0, len(scenes), ENCODE_BATCH * 20):
            path = work / "pool" / f"{group}-{start}.safetensors"
            if not path.exists():
                part = scenes[start : start + ENCODE_BATCH * 20]
                batches = [part[i : i + ENCODE_BATCH] for i in range(0, len(part), ENCODE_BATCH)]
                done = [encode(vae, to_pixels([draw_scene(s) for s in b]).to(device)).cpu() for b in batches]
                save_tensors(path, {"latents": torch.cat(done)}, {"about": json.dumps({"seed": seed})})
                say(f"pool group {group}: {start + len(part)}/{len(scenes)}")
            pieces.append(load_tensors(path)[0]["latents"])
        groups.append(PoolGroup(scenes, torch.cat(pieces)))
    return groups
