"""Tiny random models of families that draw with a transformer: Chroma, FLUX.2 klein and Lumina 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.families import FAMILIES
from loragraft_tests.trainer import tiny_qwen, tiny_t5

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
    parts["text_encoder"] = tiny_t5.t5_file_weights(tiny_t5.random_t5())  # one name a tensor, as in files
    return single_file("chroma", parts)


def chroma_base(folder: Path) -> api.Base:
    """Open a tiny Chroma whose tokenizer lies in ``folder``."""
    tokenizer = tiny_t5.write_t5_tokenizer(folder / "t5")
    return api.open_base_from_weights(chroma_weights(), name="tiny", tokenizers={"t5": str(tokenizer)})


KLEIN_TEXT = 32
KLEIN = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 3 * KLEIN_TEXT,
    "axes_dims_rope": (8, 8, 8, 8),
    "guidance_embeds": False,
}


def random_klein(seed: int = 0) -> nn.Module:
    """Build a random transformer of diffusers' class."""
    from diffusers import Flux2Transformer2DModel

    return shaken(Flux2Transformer2DModel(**KLEIN), seed)


def random_klein_vae(seed: int = 1) -> nn.Module:
    """Build a random autoencoder of diffusers' class, of 4 channels, whose squares have 16."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
    )
    shaken(vae, seed, 0.05)
    vae.bn.running_var.abs_().add_(0.5)
    return vae


def random_klein_text(seed: int = 2, layers: int = 28) -> nn.Module:
    """Build a random Qwen3 with its head, deep enough for the layers that the transformer reads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=tiny_qwen.VOCABULARY,
        hidden_size=KLEIN_TEXT,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=False,
    )
    text: nn.Module = Qwen3ForCausalLM(config).eval()
    return text


def klein_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a whole tiny FLUX.2 klein under single-file names."""
    return single_file("flux2", folder_parts(random_klein(seed), random_klein_vae(), random_klein_text()))


def klein_base(folder: Path) -> api.Base:
    """Open a tiny FLUX.2 klein whose tokenizer lies in ``folder``."""
    tokenizer = tiny_qwen.write_qwen_tokenizer(folder / "qwen")
    return api.open_base_from_weights(klein_weights(), name="tiny", tokenizers={"qwen": str(tokenizer)})


GEMMA_TEXT = 24
LUMINA = {
    "sample_size": 8,
    "in_channels": 16,
    "hidden_size": 96,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 32,
    "axes_dim_rope": (8, 8, 8),
    "cap_feat_dim": GEMMA_TEXT,
}
GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *(chr(c) for c in range(33, 127)))


def write_gemma_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of transformers' Gemma class; a character is a token."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    start = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": t, "special": True} | flags for i, t in enumerate(GEMMA_TOKENS[:4])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(GEMMA_TOKENS)},
            "merges": [],
            "unk_token": "<unk>",
            "byte_fallback": False,
            "fuse_unk": False,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = {**special, "tokenizer_class": "GemmaTokenizer", "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def random_lumina(seed: int = 0) -> nn.Module:
    """Build a random transformer of diffusers' class."""
    from diffusers import Lumina2Transformer2DModel

    return shaken(Lumina2Transformer2DModel(**LUMINA), seed)


def random_gemma(seed: int = 2) -> nn.Module:
    """Build a random Gemma 2 of transformers' class."""
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=len(GEMMA_TOKENS) + 5,
        hidden_size=GEMMA_TEXT,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
    )
    text: nn.Module = shaken(Gemma2Model(config), seed)
    return text


def lumina_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a whole tiny Lumina 2 under single-file names."""
    return single_file("lumina2", folder_parts(random_lumina(seed), random_vae(), random_gemma()))


def lumina_base(folder: Path) -> api.Base:
    """Open a tiny Lumina 2 whose tokenizer lies in ``folder``."""
    tokenizer = write_gemma_tokenizer(folder / "gemma")
    return api.open_base_from_weights(lumina_weights(), name="tiny", tokenizers={"gemma": str(tokenizer)})
