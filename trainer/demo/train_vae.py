"""Train the VAE on scenes and clutter drawn as it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from .creatures import draw_clutter
from .draw import BIG_SIZES_PX, SIZES_PX, draw_scene, random_scene
from .keep import TrainState
from .models import build_vae

BATCH = 8
LEARNING_RATE = 1e-3
# Most steps see small crops: four times the steps in the same time, and edges and colours are local.
CROP_SHARE = 0.82
CROP_PX = 32
KL_WEIGHT = 2e-4
# Noise on the latents, as a share of their spread, so that the decoder forgives the denoiser's errors.
LATENT_NOISE = 0.05
SAVE_EVERY_S = 60.0


def cosine_rate(step: int, steps: int, warmup: int) -> float:
    """Give the share of the learning rate at a step: linear warm-up, then half a cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """Stack images of one size: (B, 3, H, W) float32 in [-1, 1]."""
    array = np.stack([np.asarray(image, np.float32) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Turn (B, 3, H, W) in [-1, 1] into images."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in array]


def _busy_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut the busiest of three random squares: bare background teaches little."""
    corners = rng.integers(0, 64 - CROP_PX + 1, (3, 2)).tolist()
    crops = [image.crop((x, y, x + CROP_PX, y + CROP_PX)) for x, y in corners]
    return max(crops, key=lambda crop: float(np.asarray(crop, np.float32).std((0, 1)).sum()))


def draw_batch(seed: int, step: int, steps: int) -> torch.Tensor:
    """Draw one batch: 55 % clutter, the rest scenes of any combination; one size for all."""
    rng = np.random.default_rng([seed, 1, step])
    kind, count, cropped = rng.random(), BATCH, step < CROP_SHARE * steps
    if cropped or kind < 0.75:
        size_px = SIZES_PX[0]
    elif kind < 0.95:
        size_px = SIZES_PX[rng.integers(1, len(SIZES_PX))]
    else:
        size_px = BIG_SIZES_PX[rng.integers(len(BIG_SIZES_PX))]
        count = max(2, BATCH * 64 * 64 // (size_px[0] * size_px[1]))
    images = [
        draw_clutter(rng, size_px) if rng.random() < 0.55 else draw_scene(random_scene(rng, size_px))
        for _ in range(count * 2 if cropped else count)
    ]
    if cropped:
        images = [_busy_crop(image, rng) for image in images]
    return to_pixels(images)


def _edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def pixel_loss(recon: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Compare pixels, edges and coarse colour."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(_edges(recon), _edges(pixels), strict=True))
    coarse = F.l1_loss(F.avg_pool2d(recon, 4), F.avg_pool2d(pixels, 4))
    return F.l1_loss(recon, pixels) + 0.5 * edges + coarse + 0.5 * F.mse_loss(recon, pixels)


def vae_loss(
    vae: AutoencoderKL, pixels: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Encode, disturb, decode; give the loss and the plain mean absolute error."""
    posterior = vae.encode(pixels).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    spread = LATENT_NOISE * mean.detach().std((0, 2, 3), keepdim=True)
    recon = vae.decode(mean + ((0.5 * logvar).exp() + spread) * noise).sample.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return pixel_loss(recon, pixels) + KL_WEIGHT * kl, float(F.l1_loss(recon.detach(), pixels))


def train_vae(
    work: Path, steps: int, seed: int, device: torch.device, say: Callable[[str], None]
) -> AutoencoderKL:
    """Train, or continue, the VAE; its state lives in `work`/vae.safetensors."""
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    state = TrainState(work / "vae.safetensors", {"vae": vae}, optimizer)
    done, _ = state.load()
    saved = time.monotonic()
    average = 0.0
    for step in range(done, steps):
        pixels = draw_batch(seed, step, steps).to(device)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine_rate(step, steps, 50)
        with torch.autocast(device.type, torch.bfloat16):
            loss, l1 = vae_loss(vae, pixels, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average = l1 if average == 0 else 0.98 * average + 0.02 * l1
        if (step + 1) % 50 == 0:
            say(f"vae {step + 1}/{steps} l1 {average:.4f}")
        if time.monotonic() - saved > SAVE_EVERY_S or step + 1 == steps:
            state.save(step + 1)
            saved = time.monotonic()
    return vae.train(False)
