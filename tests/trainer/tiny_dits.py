"""Tiny random models of the families that draw with a transformer and an autoencoder of 16 channels or more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.families import FAMILIES
from loragraft_tests.trainer import tiny_t5

CHROMA = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": tiny_t5.WIDTH,
    "in_channels": 64,
    "axes_dims_rope": (4, 14, 14),
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 48,
    "approximator_layers": 2,
}


def shaken(module: nn.Module, seed: int = 0, spread: float = 0.1) -> nn.Module:
    """Give every tensor of a module random values, norms and biases too, so that no part goes unnoticed."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(module.state_dict().items()):
            if tensor.is_floating_point():
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                tensor.copy_(torch.randn(tensor.shape, generator=rng) * spread + centre)
    return module.eval().requires_grad_(False)


def random_chroma(seed: int = 0, **changes: Any) -> nn.Module:
    """Build a random transformer of diffusers' class."""
    from diffusers import ChromaTransformer2DModel

    return shaken(ChromaTransformer2DModel(**{**CHROMA, **changes}), seed)


def random_vae(channels: int = 16, seed: int = 1) -> nn.Module:
    """Build a random autoencoder as Flux.1's, without convolutions around the latents."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return shaken(vae, seed, 0.05)


def folder_parts(denoiser: nn.Module, vae: nn.Module, text: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Return modules as the parts of a diffusers folder."""
    return {
        "denoiser": dict(denoiser.state_dict()),
        "vae": dict(vae.state_dict()),
        "text_encoder": dict(text.state_dict()),
    }


def single_file(family: str, parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a diffusers folder's parts as a single file's weights, in memory of their own."""
    here = FAMILIES[family]
    joined = here.join(here.from_folder(parts))
    return {name: joined[name].detach().clone().contiguous() for name in joined}


def chroma_weights(seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """Return a whole tiny Chroma under single-file names."""
    parts = folder_parts(random_chroma(seed, **changes), random_vae(), tiny_t5.random_t5())
    return single_file("chroma", parts)


def chroma_base(folder: Path) -> api.Base:
    """Open a tiny Chroma whose tokenizer lies in ``folder``."""
    tokenizer = tiny_t5.write_t5_tokenizer(folder / "t5")
    return api.open_base_from_weights(chroma_weights(), name="tiny", tokenizers={"t5": str(tokenizer)})
