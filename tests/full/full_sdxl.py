"""Random weights of SDXL's true size: in memory as a ComfyUI has them, or as a file as published ones are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from loragraft_tests.full.random_values import Values

NAME = "sdxl_random_checkpoint.safetensors"
VOCABULARY = 49408
TEXTS = {"clip_l": (768, 3072, 12, 12), "clip_g": (1280, 5120, 32, 20)}


def modules() -> dict[str, nn.Module]:
    """Return SDXL's modules in full size, without weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        found: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                layers_per_block=2,
                cross_attention_dim=2048,
                attention_head_dim=(5, 10, 20),
                use_linear_projection=True,
                transformer_layers_per_block=(1, 2, 10),
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            ),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
        }
        for kind, (width, inside, layers, heads) in TEXTS.items():
            config = CLIPTextConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                intermediate_size=inside,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                projection_dim=width,
            )
            found[kind] = (CLIPTextModelWithProjection if kind == "clip_g" else CLIPTextModel)(config)
    return found


def named() -> Iterator[tuple[str, torch.Tensor]]:
    """Yield meta tensors with their names."""
    from loragraft.trainer.families.names import ldm_keys as keys

    of = {name: module.state_dict() for name, module in modules().items()}
    for new, old in keys.unet_to_ldm(of["unet"]).items():
        yield keys.UNET_PREFIX + new, of["unet"][old]
    for new, old in keys.vae_to_ldm(of["vae"]).items():
        kernel = keys.is_vae_attention_weight(new)
        yield keys.VAE_PREFIX + new, of["vae"][old][..., None, None] if kernel else of["vae"][old]
    for kind in TEXTS:
        for key, tensor in of[kind].items():
            outside = key.startswith(("text_model.", "text_projection."))
            if not key.endswith("position_ids"):
                name = key if outside else f"text_model.{key}"
                yield f"text_encoders.{kind}.transformer.{name}", tensor


def weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Return all weights, 7 GB in bf16."""
    values = Values(seed, dtype)
    return {name: values.of(name, tensor.shape) for name, tensor in named()}


def write_checkpoint(folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Return a checkpoint with published names in ``folder``, written tensor by tensor if it is not there."""
    from loragraft.trainer.families import FAMILIES
    from loragraft.trainer.tools.stream import write_stream

    path = folder / NAME
    if path.exists():
        return path
    family, values = FAMILIES["sdxl"], Values(seed, dtype)
    shapes = {name: tensor.shape for name, tensor in family.join(family.split(dict(named()))).items()}
    forms = {name: (dtype, tuple(shape)) for name, shape in shapes.items()}
    write_stream(path, forms, lambda name: values.of(name, shapes[name]), {"format": "pt"})
    return path
