"""A randomly initialised checkpoint of SD1.5's true size: speed, memory and structure, not quality.

Its keys are those of a published SD1.5 file: U-Net, VAE and text encoder, the text encoder's position
ids and the noise schedule's tables. 2.1 GB in fp16, so it is written once and used again.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

NAME = "sd15_random_fp16.safetensors"
NUM_TENSORS = 686 + 248 + 196 + 1 + 2  # U-Net, VAE, text encoder, position ids, schedule tables
VOCABULARY = 49408


def scratch(default: Path) -> Path:
    """Return the folder for large files: LORAGRAFT_SCRATCH, which outlives a run, else ``default``."""
    given = os.environ.get("LORAGRAFT_SCRATCH")
    folder = Path(given).expanduser() if given else default
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Return the random checkpoint in ``folder``, writing it unless it is there already."""
    from safetensors.torch import save_file

    path = folder / NAME
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(weights(seed), unfinished, metadata={"format": "pt"})
        unfinished.replace(path)
    return path


def shapes() -> dict[str, torch.Tensor]:
    """Return meta tensors of SD1.5's weights under their single-file names."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from loragraft.trainer.families.names import ldm_keys as keys

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        ).state_dict()
        vae = AutoencoderKL(
            sample_size=512,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).state_dict()
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCABULARY,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                hidden_act="quick_gelu",
            )
        ).state_dict()
    named = {keys.UNET_PREFIX + new: unet[old] for new, old in keys.unet_to_ldm(unet).items()}
    for new, old in keys.vae_to_ldm(vae).items():
        named[keys.VAE_PREFIX + new] = (
            vae[old][..., None, None] if keys.is_vae_attention_weight(new) else vae[old]
        )
    for old, tensor in text.items():
        if not old.endswith("position_ids"):
            inner = old if old.startswith("text_model.") else f"text_model.{old}"
            named[keys.TEXT_PREFIX + inner] = tensor
    return named


def weights(seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Return random weights: norms at 1 and 0, the rest uniform in +-1/sqrt(fan_in), embeddings normal."""
    from loragraft.trainer.families.names import ldm_keys as keys
    from loragraft.trainer.objective import NoiseSchedule

    rng = torch.Generator().manual_seed(seed)
    filled: dict[str, torch.Tensor] = {}
    for name, shape in shapes().items():
        values = torch.empty(shape.shape)
        if shape.ndim == 1:
            values.fill_(1.0 if name.endswith(".weight") else 0.0)
        elif "embeddings." in name:
            values.normal_(0.0, 0.02, generator=rng)
        else:
            bound = shape[0].numel() ** -0.5
            values.uniform_(-bound, bound, generator=rng)
        filled[name] = values.to(dtype)
    filled[keys.TEXT_PREFIX + "text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    schedule = NoiseSchedule()
    filled["alphas_cumprod"] = schedule.alphas_cumprod
    filled["betas"] = 1 - schedule.alphas_cumprod / torch.cat([torch.ones(1), schedule.alphas_cumprod[:-1]])
    return filled
