"""Train the denoiser and the text encoder together from scratch, on the pool's latents."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from .draw import training_caption
from .keep import TrainState
from .latents import PoolGroup
from .models import MAX_TOKENS, build_text_encoder, build_unet
from .train_vae import SAVE_EVERY_S, cosine_rate

BATCH = 32
LEARNING_RATE = 1e-3
EMPTY_CAPTIONS = 0.1
MIN_SNR_GAMMA = 5.0
EMA_DECAY = 0.999


@dataclass
class TextToLatent:
    """The networks that turn captions into latents."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer


def sd_alphas_cumprod() -> torch.Tensor:
    """Give SD1.5's noise schedule, (1000,) float32: the share of signal left in the variance at t."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Give (B, 77) token ids, padded with the end token as SD1.5 does."""
    ids: torch.Tensor = tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def embed(text_encoder: CLIPTextModel, ids: torch.Tensor) -> torch.Tensor:
    """Give (B, 77, C): the last hidden state after the final norm, as SD1.5 at clip_skip 1."""
    hidden: torch.Tensor = text_encoder(input_ids=ids).last_hidden_state
    return hidden


def diffusion_loss(
    model: TextToLatent, latents: torch.Tensor, captions: list[str], generator: torch.Generator
) -> torch.Tensor:
    """Give the min-SNR-weighted error of the noise predicted (https://arxiv.org/abs/2303.09556)."""
    alphas = sd_alphas_cumprod()
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.randint(0, len(alphas), (len(latents),), generator=generator)
    a = alphas[t].view(-1, 1, 1, 1)
    device = latents.device
    noisy = a.sqrt().to(device) * latents + (1 - a).sqrt().to(device) * noise.to(device)
    snr = a / (1 - a)
    weight = (snr.clamp(max=MIN_SNR_GAMMA) / snr).to(device)
    cond = embed(model.text_encoder, tokenize(model.tokenizer, captions).to(device))
    pred = model.unet(noisy, t.to(device), cond).sample
    return (weight * (pred.float() - noise.to(device)).square()).mean()


def pick_batch(pool: list[PoolGroup], seed: int, step: int) -> tuple[torch.Tensor, list[str]]:
    """Choose latents of one size and write their captions anew: a function of seed and step."""
    rng = np.random.default_rng([seed, 4, step])
    shares = np.array([len(group.scenes) for group in pool], float)
    group = pool[int(rng.choice(len(pool), p=shares / shares.sum()))]
    chosen = rng.integers(0, len(group.scenes), BATCH)
    captions = [
        "" if rng.random() < EMPTY_CAPTIONS else training_caption(group.scenes[int(i)], rng) for i in chosen
    ]
    return group.latents[torch.from_numpy(chosen)], captions


@torch.no_grad()
def update_ema(ema: torch.nn.Module, live: torch.nn.Module, step: int) -> None:
    """Move the averaged weights towards the live ones; early on faster, to forget the random start."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    averaged: list[torch.Tensor] = list(ema.parameters())
    current: list[torch.Tensor] = list(live.parameters())
    torch._foreach_lerp_(averaged, current, 1 - decay)


def train_unet(
    pool: list[PoolGroup],
    tokenizer: CLIPTokenizer,
    work: Path,
    steps: int,
    seed: int,
    device: torch.device,
    say: Callable[[str], None],
) -> TextToLatent:
    """Train, or continue, and give the averaged networks; the state is `work`/unet.safetensors."""
    torch.manual_seed(seed + 1)
    live = TextToLatent(build_unet().to(device), build_text_encoder(len(tokenizer)).to(device), tokenizer)
    ema = TextToLatent(copy.deepcopy(live.unet), copy.deepcopy(live.text_encoder), tokenizer)
    params = [*live.unet.parameters(), *live.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(params, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    modules = {
        "unet": live.unet,
        "text_encoder": live.text_encoder,
        "ema_unet": ema.unet,
        "ema_text_encoder": ema.text_encoder,
    }
    state = TrainState(work / "unet.safetensors", modules, optimizer)
    done, _ = state.load()
    saved, average = time.monotonic(), 0.0
    for step in range(done, steps):
        latents, captions = pick_batch(pool, seed, step)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine_rate(step, steps, 200)
        with torch.autocast(device.type, torch.bfloat16):
            loss = diffusion_loss(live, latents.to(device), captions, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        update_ema(ema.unet, live.unet, step)
        update_ema(ema.text_encoder, live.text_encoder, step)
        value = float(loss.detach())
        average = value if average == 0 else 0.99 * average + 0.01 * value
        if (step + 1) % 100 == 0:
            say(f"unet {step + 1}/{steps} loss {average:.4f}")
        if time.monotonic() - saved > SAVE_EVERY_S or step + 1 == steps:
            state.save(step + 1)
            saved = time.monotonic()
    ema.unet.train(False)
    ema.text_encoder.train(False)
    return ema
