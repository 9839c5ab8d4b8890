"""Write the three networks as one fp16 file in SD1.5's single-file layout."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ..families.names.ldm_keys import (
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    is_vae_attention_weight,
    unet_to_ldm,
    vae_to_ldm,
)
from .keep import save_tensors
from .train_unet import TextToLatent

BASE_NAME = "demo_base.safetensors"


def single_file_tensors(model: TextToLatent, vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """Name every weight as SD1.5's single file does; all fp16."""
    tensors: dict[str, torch.Tensor] = {}
    unet, autoencoder = model.unet.state_dict(), vae.state_dict()
    for key, own in unet_to_ldm(unet).items():
        tensors[UNET_PREFIX + key] = unet[own]
    for key, own in vae_to_ldm(autoencoder).items():
        weight = autoencoder[own]
        tensors[VAE_PREFIX + key] = weight[..., None, None] if is_vae_attention_weight(key) else weight
    for own, weight in model.text_encoder.state_dict().items():
        if not own.endswith("position_ids"):
            tensors[TEXT_PREFIX + "text_model." + own.removeprefix("text_model.")] = weight
    expected = (
        len(unet) + len(autoencoder) + sum("position_ids" not in k for k in model.text_encoder.state_dict())
    )
    if len(tensors) != expected:
        raise RuntimeError(f"single-file layout: got {len(tensors)} tensors, expected {expected}")
    return {key: weight.detach().to("cpu", torch.float16) for key, weight in sorted(tensors.items())}


def export_base(model: TextToLatent, vae: AutoencoderKL, folder: Path, seed: int) -> str:
    """Write the checkpoint into `folder` and give its sha256."""
    metadata = {
        "modelspec.title": "LoraGraft demo base",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.description": "A tiny model of plain shapes, made by loragraft.trainer.demo.make_base",
        "modelspec.license": "Apache-2.0",
        "modelspec.prediction_type": "epsilon",
        "loragraft_seed": str(seed),
    }
    path = folder / BASE_NAME
    save_tensors(path, single_file_tensors(model, vae), metadata)
    path.chmod(0o644)
    return hashlib.sha256(path.read_bytes()).hexdigest()
