"""A tiny random Flux.1: two double and two single blocks, CLIP, T5 and a VAE of 16 channels.

A head has 128 dimensions, because ComfyUI knows no other; with one head it is as narrow as it can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loragraft_tests.trainer import tiny, tiny_t5

WIDTH = 128
LATENT = 16


@dataclass(frozen=True)
class Folders:
    """Where the tokenizers lie, by kind."""

    clip: Path
    t5: Path

    @property
    def by_kind(self) -> dict[str, str]:
        """As a base model takes them."""
        return {"clip": str(self.clip), "t5": str(self.t5)}


def write_tokenizers(folder: Path) -> Folders:
    """Write a CLIP and a T5 tokenizer that know single characters only."""
    return Folders(tiny.write_tokenizer(folder / "clip"), tiny_t5.write_t5_tokenizer(folder / "t5"))


def random_transformer(
    *, guided: bool = True, seed: int = 0, width: int = WIDTH, head_dim: int = WIDTH, channels: int = LATENT
) -> nn.Module:
    """Build a random transformer of diffusers' class, every weight and bias other than 0."""
    from diffusers import FluxTransformer2DModel

    place = 7 * head_dim // 32 * 2
    model = FluxTransformer2DModel(
        in_channels=4 * channels,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=head_dim,
        num_attention_heads=width // head_dim,
        joint_attention_dim=tiny_t5.WIDTH,
        pooled_projection_dim=tiny.TEXT,
        guidance_embeds=guided,
        axes_dims_rope=(head_dim - 2 * place, place, place),
    )
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            spread = 0.05 if weight.ndim > 1 else 0.1
            weight.copy_(torch.randn(weight.shape, generator=drawn) * spread)
            if ".norm_" in name and weight.ndim == 1 and "norm_out" not in name:
                weight.add_(1.0)
    found: nn.Module = model.eval()
    return found


def random_vae(seed: int = 0) -> nn.Module:
    """Build a random VAE of diffusers' class, without the convolutions around its latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model: nn.Module = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    return model.eval()


def random_folder(*, guided: bool = True, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights of a random model's parts, as a diffusers folder has them."""
    _, _, clip = tiny.random_modules(seed)
    return {
        "denoiser": dict(random_transformer(guided=guided, seed=seed).state_dict()),
        "vae": dict(random_vae(seed).state_dict()),
        "text_encoder": dict(clip.state_dict()),
        "text_encoder_2": dict(tiny_t5.random_t5(seed).state_dict()),
    }


def family(*, guided: bool = True) -> Any:
    """Return the family of dev, or of schnell."""
    from loragraft.trainer.families.flux import Flux

    return Flux("flux" if guided else "flux_schnell")


def single_file_weights(*, guided: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a random model's weights under the names of ComfyUI's checkpoints."""
    own = family(guided=guided)
    joined = own.join(own.from_folder(random_folder(guided=guided, seed=seed)))
    return {name: joined[name].detach().clone().contiguous() for name in joined}


def write_checkpoint(
    path: Path, dtype: torch.dtype = torch.float32, *, guided: bool = True, seed: int = 0
) -> Path:
    """Write a random checkpoint with all parts in one file."""
    from safetensors.torch import save_file

    weights = single_file_weights(guided=guided, seed=seed)
    save_file({k: v.to(dtype) for k, v in weights.items()}, path)
    return path


def load_parts(folders: Folders, *, guided: bool = True, seed: int = 0) -> Any:
    """Return a random model's modules, loaded from single-file weights."""
    from loragraft.trainer.families.text.tokenizers import load_tokenizer

    own = family(guided=guided)
    tokenizers = {
        "text_encoder": load_tokenizer(str(folders.clip), "clip"),
        "text_encoder_2": load_tokenizer(str(folders.t5), "t5"),
    }
    return own.load(own.split(single_file_weights(guided=guided, seed=seed)), tokenizers)
