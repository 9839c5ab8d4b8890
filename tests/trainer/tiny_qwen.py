"""Tiny random models of Qwen-Image's and Z-Image's structure, their text encoders, and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 264  # more rows than tokens, as Qwen's own embeddings have
CONTEXT = 128  # Qwen2.5's heads have 128 channels
LATENTS = 16


def write_qwen_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of transformers' Qwen2Tokenizer; a byte is a token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(printable))]
    tokens = [chr(c) for c in printable + others]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {len(tokens) + i: {"content": t, "special": True, **flags} for i, t in enumerate(SPECIAL)}
    config = {
        "added_tokens_decoder": added,
        "pad_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "unk_token": None,
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 131072,
        # what the models' own templates come to for one message of a user
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _text_shape(heads: int, kv_heads: int, hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def random_qwen25_vl(seed: int = 0) -> nn.Module:
    """Build a whole random Qwen2.5-VL, with eyes and head."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    text = _text_shape(1, 1, CONTEXT)
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    vision["out_hidden_size"] = CONTEXT
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope, "rope_scaling": rope}, vision_config=vision
    )
    return shaken(Qwen2_5_VLForConditionalGeneration(config))


def random_qwen3(seed: int = 0, hidden: int = 48) -> nn.Module:
    """Build a random Qwen3 with its head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return shaken(Qwen3ForCausalLM(Qwen3Config(**_text_shape(2, 1, hidden), head_dim=32)))


def random_qwen_vae(seed: int = 0) -> nn.Module:
    """Build a random autoencoder of diffusers' class."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(seed)
    return shaken(AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1))


def random_flux_vae(seed: int = 0) -> nn.Module:
    """Build a random autoencoder of Flux.1's structure."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=LATENTS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def random_qwen_image(seed: int = 0) -> nn.Module:
    """Build a random transformer of diffusers' class."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    return shaken(
        QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=CONTEXT,
            axes_dims_rope=(4, 14, 14),
        )
    )


def random_z_image(seed: int = 0, dim: int = 64, context: int = 48) -> nn.Module:
    """Build a random transformer of diffusers' class."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(seed)
    return shaken(
        ZImageTransformer2DModel(
            dim=dim,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=dim // 32,
            n_kv_heads=dim // 32,
            cap_feat_dim=context,
            axes_dims=[8, 12, 12],
            axes_lens=[1536, 512, 512],
        )
    )


def shaken(model: Any) -> nn.Module:
    """Give norms, pad tokens and zero layers random values too, so that an exchange of two shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return cast(nn.Module, model.eval().requires_grad_(False))


def qwen_image_modules(seed: int = 0) -> dict[str, nn.Module]:
    """Build the parts of a tiny Qwen-Image under diffusers' folder names."""
    return {
        "transformer": random_qwen_image(seed),
        "vae": random_qwen_vae(seed),
        "text_encoder": random_qwen25_vl(seed),
    }


def z_image_modules(seed: int = 0) -> dict[str, nn.Module]:
    """Build the parts of a tiny Z-Image under diffusers' folder names."""
    return {
        "transformer": random_z_image(seed),
        "vae": random_flux_vae(seed),
        "text_encoder": random_qwen3(seed),
    }


def qwen_image_file(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return a tiny Qwen-Image under the names of a complete checkpoint; the VAE's come from a table here."""
    file = {f"model.diffusion_model.{k}": v for k, v in modules["transformer"].state_dict().items()}
    for name, value in modules["vae"].state_dict().items():
        file["vae." + wan_name(name)] = value
    for name, value in modules["text_encoder"].state_dict().items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        file[f"text_encoders.qwen25_7b.transformer.{name}"] = value
    return {k: v.detach().clone() for k, v in file.items()}


def z_image_file(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return a tiny Z-Image under the names of a complete checkpoint."""
    from loragraft.trainer.families.names.ldm_vae import join_vae

    file: dict[str, torch.Tensor] = {}
    own = modules["transformer"].state_dict()
    for name, value in own.items():
        if ".to_q." in name:
            rows = [own[name.replace("to_q", f"to_{x}")] for x in "qkv"]
            file["model.diffusion_model." + name.replace("to_q", "qkv")] = torch.cat(rows)
        elif ".to_k." not in name and ".to_v." not in name:
            for old, new in (
                ("all_x_embedder.2-1", "x_embedder"),
                ("all_final_layer.2-1", "final_layer"),
                ("to_out.0", "out"),
                ("norm_q", "q_norm"),
                ("norm_k", "k_norm"),
            ):
                name = name.replace(old, new)
            file["model.diffusion_model." + name] = value
    vae = join_vae(modules["vae"].state_dict())
    file |= {k.replace("first_stage_model.", "vae."): vae[k] for k in vae}
    for name, value in modules["text_encoder"].state_dict().items():
        file[f"text_encoders.qwen3_4b.transformer.{name}"] = value
    return {k: v.detach().clone() for k, v in file.items()}


def wan_name(name: str) -> str:
    """Return Wan's name of a tensor of the tiny autoencoder: a residual block a level, two on the way up."""
    side, _, rest = name.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return {"quant_conv": "conv1", "post_quant_conv": "conv2"}[side] + "." + rest
    layers = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    layers |= {"conv_shortcut": "shortcut"}
    parts = rest.split(".")
    if parts[0] in ("conv_in", "norm_out", "conv_out"):
        place = {"conv_in": ["conv1"], "norm_out": ["head", "0"], "conv_out": ["head", "2"]}[parts[0]]
        return ".".join([side, *place, *parts[1:]])
    if parts[0] == "mid_block":
        row = ["middle", "1" if parts[1] == "attentions" else str(2 * int(parts[2]))]
        inside = parts[3:]
    elif parts[0] == "down_blocks":
        row, inside = ["downsamples", parts[1]], parts[2:]
    else:
        number = 3 * int(parts[1]) + (int(parts[3]) if parts[2] == "resnets" else 2)
        row, inside = ["upsamples", str(number)], parts[4:]
    return ".".join([side, *row, layers.get(inside[0], inside[0]), *inside[1:]])
