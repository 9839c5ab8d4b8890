"""A tiny random model of SD2.x's structure, as modules, as a single file and as a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from loragraft_tests.trainer import tiny
from loragraft_tests.trainer.tiny_sdxl import openclip_weights

LAYERS = 3  # of the text encoder in a single file; the last one is not used
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "cross_attention_dim": tiny.TEXT,
    "attention_head_dim": (1, 1),
    "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def random_modules(
    seed: int = 0, layers: int = LAYERS, vocabulary: int = tiny.VOCABULARY
) -> dict[str, nn.Module]:
    """Build random modules of diffusers' and transformers' classes, by the names of their folders."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=tiny.TEXT,
        intermediate_size=2 * tiny.TEXT,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    modules = {
        "unet": UNet2DConditionModel(**UNET),
        "vae": tiny.random_modules(seed)[1],
        "text_encoder": CLIPTextModel(config),
    }
    for module in modules.values():
        module.eval().requires_grad_(False)
    return modules


def single_file_weights(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return the modules' weights under the names of a single file, OpenCLIP's for the text encoder."""
    plain = tiny.single_file_weights(modules["unet"], modules["vae"], modules["text_encoder"])
    weights = {k: v for k, v in plain.items() if not k.startswith("cond_stage_model.")}
    text = {k: v.detach() for k, v in modules["text_encoder"].state_dict().items()}
    width = text[next(k for k in text if k.endswith("final_layer_norm.bias"))].shape[0]
    unused = {"text_projection.weight": torch.eye(width)}
    return weights | openclip_weights(text | unused, "cond_stage_model.model.")


def write_checkpoint(path: Path, dtype: torch.dtype = torch.float16, seed: int = 0) -> Path:
    """Write a tiny random checkpoint in SD2.x's single-file layout."""
    from safetensors.torch import save_file

    weights = single_file_weights(random_modules(seed))
    save_file({k: v.to(dtype).contiguous() for k, v in weights.items()}, path)
    return path


def write_folder(folder: Path, seed: int = 0) -> Path:
    """Write the modules as a diffusers folder, whose text encoder has the used layers only."""
    for name, module in random_modules(seed, layers=LAYERS - 1).items():
        module.save_pretrained(folder / name)  # type: ignore[operator]
    tiny.write_tokenizer(folder / "tokenizer")
    return folder
