"""Sample images from captions: deterministic DDIM with classifier-free guidance."""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers import AutoencoderKL
from PIL import Image

from .latents import decode
from .train_unet import TextToLatent, embed, sd_alphas_cumprod, tokenize
from .train_vae import to_images


def seeded_noise(seeds: list[int], size_px: tuple[int, int]) -> torch.Tensor:
    """Give (B, 4, H/8, W/8) noise, each image's own from its seed."""
    shape = (4, size_px[0] // 8, size_px[1] // 8)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def sample(
    model: TextToLatent,
    vae: AutoencoderKL,
    captions: list[str],
    seeds: list[int],
    size_px: tuple[int, int] = (64, 64),
    steps: int = 20,
    cfg: float = 4.0,
) -> list[Image.Image]:
    """Draw one image per caption and seed; `size_px` is (height, width)."""
    device = next(model.unet.parameters()).device
    alphas = sd_alphas_cumprod()
    x = clean = seeded_noise(seeds, size_px).to(device)
    cond = embed(model.text_encoder, tokenize(model.tokenizer, captions).to(device))
    empty = embed(model.text_encoder, tokenize(model.tokenizer, [""]).to(device)).expand_as(cond)
    both = torch.cat([empty, cond])
    times = torch.linspace(999, 0, steps + 1).round().long()
    for now, after in pairwise(times.tolist()):
        t = torch.full((2 * len(x),), now, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            pred = model.unet(torch.cat([x, x]), t, both).sample.float()
        free, guided = pred.chunk(2)
        noise = free + cfg * (guided - free)
        a, b = float(alphas[now]), float(alphas[after])
        clean = (x - (1 - a) ** 0.5 * noise) / a**0.5
        x = b**0.5 * clean + (1 - b) ** 0.5 * noise
    # The last point keeps a little noise (t = 0 is not sigma 0): the clean estimate does not.
    return to_images(decode(vae, clean))
