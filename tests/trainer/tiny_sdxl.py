"""A tiny random model of SDXL's structure, as modules, as a single file and as a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from loragraft_tests.trainer import tiny

WIDTHS = {"text_encoder": 64, "text_encoder_2": 128}  # of CLIP-L and OpenCLIP-G; 64 to a head
LAYERS = {"text_encoder": 3, "text_encoder_2": 4}
CONTEXT = sum(WIDTHS.values())
POOLED = WIDTHS["text_encoder_2"]
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": (1, 1),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": POOLED + 6 * 256,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def text_config(part: str, vocabulary: int = tiny.VOCABULARY) -> Any:
    """Return the shape of one of the text encoders."""
    from transformers import CLIPTextConfig

    width = WIDTHS[part]
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS[part],
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        hidden_act="quick_gelu" if part == "text_encoder" else "gelu",
        projection_dim=width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def random_modules(seed: int = 0, vocabulary: int = tiny.VOCABULARY, **changes: Any) -> dict[str, nn.Module]:
    """Build random modules of diffusers' and transformers' classes, by the names of their folders.

    ``changes`` are of the U-Net's shape. Weights that begin as zero are random too.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    modules = {
        "unet": UNet2DConditionModel(**{**UNET, **changes}),
        "vae": tiny.random_modules(seed)[1],
        "text_encoder": CLIPTextModel(text_config("text_encoder", vocabulary)),
        "text_encoder_2": CLIPTextModelWithProjection(text_config("text_encoder_2", vocabulary)),
    }
    for module in modules.values():
        module.eval().requires_grad_(False)
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                p.add_(torch.randn_like(p), alpha=0.02)
    return modules


def single_file_weights(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return the modules' weights under the names of a single file, OpenCLIP's for the second encoder.

    Written out here, not with the converters that are tested with it; the VAE's and the U-Net's names are
    those of `tiny`.
    """
    plain = tiny.single_file_weights(modules["unet"], modules["vae"], modules["text_encoder"])
    old, new = "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."
    weights = {k.replace(old, new): v for k, v in plain.items()}
    second = {k: v.detach() for k, v in modules["text_encoder_2"].state_dict().items()}
    return weights | openclip_weights(second, "conditioner.embedders.1.model.")


def openclip_weights(hf: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return a text encoder's weights with OpenCLIP's names, and what it holds beside them."""
    body = {k.removeprefix("text_model."): v for k, v in hf.items() if not k.endswith("position_ids")}
    weights = {
        "token_embedding.weight": body["embeddings.token_embedding.weight"],
        "positional_embedding": body["embeddings.position_embedding.weight"],
        "ln_final.weight": body["final_layer_norm.weight"],
        "ln_final.bias": body["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    if "text_projection.weight" in hf:
        weights["text_projection"] = hf["text_projection.weight"].T
    layers = 1 + max(int(k.split(".")[2]) for k in body if k.startswith("encoder.layers."))
    for i in range(layers):
        own, block = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            joined = [body[f"{own}self_attn.{head}_proj.{kind}"] for head in "qkv"]
            weights[f"{block}attn.in_proj_{kind}"] = torch.cat(joined)
            weights[f"{block}attn.out_proj.{kind}"] = body[f"{own}self_attn.out_proj.{kind}"]
            weights[f"{block}ln_1.{kind}"] = body[f"{own}layer_norm1.{kind}"]
            weights[f"{block}ln_2.{kind}"] = body[f"{own}layer_norm2.{kind}"]
            weights[f"{block}mlp.c_fc.{kind}"] = body[f"{own}mlp.fc1.{kind}"]
            weights[f"{block}mlp.c_proj.{kind}"] = body[f"{own}mlp.fc2.{kind}"]
    return {prefix + k: v.detach().clone() for k, v in weights.items()}


def write_checkpoint(path: Path, dtype: torch.dtype = torch.float16, seed: int = 0, **marks: Any) -> Path:
    """Write a tiny random checkpoint in SDXL's single-file layout; ``marks`` are further tensors in it."""
    from safetensors.torch import save_file

    weights = single_file_weights(random_modules(seed))
    save_file({**{k: v.to(dtype).contiguous() for k, v in weights.items()}, **marks}, path)
    return path


def write_folder(folder: Path, seed: int = 0) -> Path:
    """Write the modules as a diffusers folder, with tokenizers; the second one pads as OpenCLIP's."""
    for name, module in random_modules(seed).items():
        module.save_pretrained(folder / name)  # type: ignore[operator]
    tiny.write_tokenizer(folder / "tokenizer")
    tiny.write_tokenizer(folder / "tokenizer_2")
    return folder
