"""A tiny random model of SD1.x's structure, its tokenizer, and a small image folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from loragraft.trainer.parts import Parts

TEXT = 64
VOCABULARY = 514


def write_tokenizer(folder: Path) -> Path:
    """Write a CLIP tokenizer that knows single characters only."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(printable))]
    symbols = [chr(c) for c in printable + others]
    tokens = symbols + [s + "</w>" for s in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def random_modules(seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """Build random U-Net, VAE and text encoder of diffusers' and transformers' classes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=2,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=TEXT,
            intermediate_size=2 * TEXT,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=VOCABULARY - 2,
            eos_token_id=VOCABULARY - 1,
            pad_token_id=VOCABULARY - 1,
        )
    )
    return unet, vae, text


def parts_of(unet: torch.nn.Module, vae: torch.nn.Module, text: torch.nn.Module) -> Parts:
    """Return modules as a base's parts, without a tokenizer."""
    return Parts(unet, vae, torch.nn.ModuleDict({"text_encoder": text}), {"text_encoder": None})


def single_file_weights(
    unet: torch.nn.Module, vae: torch.nn.Module, text: torch.nn.Module
) -> dict[str, torch.Tensor]:
    """Return the modules' weights under SD1.5's single-file names."""
    from loragraft.trainer.families.names import ldm_keys as keys

    u, v, t = unet.state_dict(), vae.state_dict(), text.state_dict()
    weights = {keys.UNET_PREFIX + new: u[old] for new, old in keys.unet_to_ldm(u).items()}
    for new, old in keys.vae_to_ldm(v).items():
        weights[keys.VAE_PREFIX + new] = (
            v[old][..., None, None] if keys.is_vae_attention_weight(new) else v[old]
        )
    for old, value in t.items():
        if not old.endswith("position_ids"):
            weights[keys.TEXT_PREFIX + (old if old.startswith("text_model.") else f"text_model.{old}")] = (
                value
            )
    return {k: v.detach().clone() for k, v in weights.items()}


def write_checkpoint(path: Path, dtype: torch.dtype = torch.float16, seed: int = 0) -> Path:
    """Write a tiny random checkpoint in SD1.5's single-file layout."""
    from safetensors.torch import save_file

    weights = single_file_weights(*random_modules(seed))
    save_file({k: v.to(dtype).contiguous() for k, v in weights.items()}, path)
    return path


def write_images(folder: Path, sizes: list[tuple[int, int]], seed: int = 0) -> Path:
    """Write one noise png per (width, height) and a caption file beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            folder / f"image{i}.png"
        )
        (folder / f"image{i}.txt").write_text(f"zibu, tag {i}, blue", encoding="utf-8")
    return folder
