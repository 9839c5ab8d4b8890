"""Polish the VAE's decoder on whole images, while the encoder, and so every latent, stays as it is.

Independent of the denoiser, so both can train at the same time, each on a core of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from .keep import TrainState
from .latents import encode
from .models import SCALING_FACTOR
from .train_vae import SAVE_EVERY_S, cosine_rate, draw_batch, pixel_loss

LEARNING_RATE = 1e-3
# Latents have unit spread here; each image draws its own strength of noise up to this.
MAX_NOISE = 0.15


def train_decoder(
    vae: AutoencoderKL, work: Path, steps: int, seed: int, device: torch.device, say: Callable[[str], None]
) -> AutoencoderKL:
    """Train, or continue, the decoder of a normalised VAE; the state is `work`/decoder.safetensors."""
    vae.requires_grad_(False)
    params = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for param in params:
        param.requires_grad_(True)
    optimizer = torch.optim.AdamW(params, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    state = TrainState(work / "decoder.safetensors", modules, optimizer)
    done, _ = state.load()
    saved, average = time.monotonic(), 0.0
    for step in range(done, steps):
        # Seeds and steps beyond those of the first stage: no picture is met twice.
        pixels = draw_batch(seed + 1000, step + steps, steps).to(device)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        latents = encode(vae, pixels)
        strength = MAX_NOISE * torch.rand(len(pixels), 1, 1, 1, generator=generator).square()
        latents = latents + (strength * torch.randn(latents.shape, generator=generator)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine_rate(step, steps, 30)
        with torch.autocast(device.type, torch.bfloat16):
            recon = vae.decode(latents / SCALING_FACTOR).sample
        loss = pixel_loss(recon.float(), pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        l1 = float((recon.detach().float() - pixels).abs().mean())
        average = l1 if average == 0 else 0.98 * average + 0.02 * l1
        if (step + 1) % 50 == 0:
            say(f"decoder {step + 1}/{steps} l1 {average:.4f}")
        if time.monotonic() - saved > SAVE_EVERY_S or step + 1 == steps:
            state.save(step + 1)
            saved = time.monotonic()
    return vae.requires_grad_(False).train(False)
