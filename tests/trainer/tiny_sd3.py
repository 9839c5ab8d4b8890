"""Tiny random models of SD3's structure, as modules, as a single file and as a diffusers folder.

ComfyUI reads the number of blocks from the width, 64 a block, and fills CLIP's states up to 4096; a file that
its loader takes therefore has ``joint_attention_dim`` 4096, and text encoders of full size or none at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from loragraft_tests.trainer import tiny, tiny_t5

BLOCKS, HEAD_DIM = 2, 64
WIDTHS = {"text_encoder": 8, "text_encoder_2": 16}  # of CLIP-L and CLIP-G
POOLED = sum(WIDTHS.values())
LAYERS = 3
KINDS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
SHAPE: dict[str, Any] = {
    "sample_size": 16,
    "pos_embed_max_size": 16,
    "num_layers": BLOCKS,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": BLOCKS,
    "joint_attention_dim": tiny_t5.WIDTH,
    "caption_projection_dim": BLOCKS * HEAD_DIM,
    "pooled_projection_dim": POOLED,
}
VERSIONS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd35_large": {"qk_norm": "rms_norm"},
    "sd35_medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
}


def text_config(part: str, vocabulary: int = tiny.VOCABULARY) -> Any:
    """Return the shape of one of the CLIPs."""
    from transformers import CLIPTextConfig

    width = WIDTHS[part]
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        max_position_embeddings=77,
        hidden_act="quick_gelu" if part == "text_encoder" else "gelu",
        projection_dim=width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def random_transformer(version: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Build diffusers' model, whose weights that begin as zero or one are random too."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    model: nn.Module = SD3Transformer2DModel(**{**SHAPE, **VERSIONS[version], **changes})
    model.eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("bias") or ".norm_" in name:
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def random_modules(version: str, seed: int = 0, **changes: Any) -> dict[str, nn.Module]:
    """Build random modules of diffusers' and transformers' classes, by the names of their folders."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModelWithProjection

    modules = {"transformer": random_transformer(version, seed, **changes)}
    modules["vae"] = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for part in WIDTHS:
        modules[part] = CLIPTextModelWithProjection(text_config(part))
    with torch.no_grad():  # the projection that SD3 does not use is the identity in its files
        modules["text_encoder"].text_projection.weight.copy_(torch.eye(WIDTHS["text_encoder"]))
    modules["text_encoder_3"] = tiny_t5.random_t5(seed)
    for module in modules.values():
        module.eval().requires_grad_(False)
    return modules


def single_file_weights(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return the modules' weights under the names of a single file."""
    from loragraft.trainer.families.names import ldm_keys as keys

    weights = {"model.diffusion_model." + k: v for k, v in mmdit_weights(modules["transformer"]).items()}
    vae = modules["vae"].state_dict()
    for new, old in keys.vae_to_ldm(vae).items():
        is_kernel = keys.is_vae_attention_weight(new)
        weights[keys.VAE_PREFIX + new] = vae[old][..., None, None] if is_kernel else vae[old]
    for part, kind in KINDS.items():
        if part in modules:
            prefix = f"text_encoders.{kind}.transformer."
            weights |= {prefix + k: v for k, v in text_weights(modules[part]).items()}
    return {k: v.detach().clone() for k, v in weights.items()}


def text_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a text encoder's weights, each once."""
    left_out = ("position_ids", "encoder.embed_tokens.weight")
    return {k: v for k, v in module.state_dict().items() if not k.endswith(left_out)}


def mmdit_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights under their authors' names; written out here, not with what is tested with it."""
    sd = model.state_dict()
    weights = {
        "pos_embed": sd["pos_embed.pos_embed"],
        **_layer(sd, "x_embedder.proj", "pos_embed.proj"),
        **_layer(sd, "context_embedder", "context_embedder"),
        **_layer(sd, "final_layer.linear", "proj_out"),
        **_layer(sd, "final_layer.adaLN_modulation.1", "norm_out.linear", turned=True),
    }
    for theirs, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        for i in (0, 2):
            weights |= _layer(sd, f"{theirs}.mlp.{i}", f"time_text_embed.{ours}.linear_{1 + i // 2}")
    blocks = len(model.transformer_blocks)  # type: ignore[arg-type]
    for i in range(blocks):
        old, new, last = f"transformer_blocks.{i}.", f"joint_blocks.{i}.", i == blocks - 1
        image, text = f"{new}x_block.", f"{new}context_block."
        weights |= _attention(sd, f"{image}attn.", f"{old}attn.", ("to_q", "to_k", "to_v"), "norm_")
        weights |= _attention(sd, f"{image}attn2.", f"{old}attn2.", ("to_q", "to_k", "to_v"), "norm_")
        added = ("add_q_proj", "add_k_proj", "add_v_proj")
        weights |= _attention(sd, f"{text}attn.", f"{old}attn.", added, "norm_added_")
        weights |= _layer(sd, f"{image}attn.proj", f"{old}attn.to_out.0")
        weights |= _layer(sd, f"{image}attn2.proj", f"{old}attn2.to_out.0")
        weights |= _layer(sd, f"{text}attn.proj", f"{old}attn.to_add_out")
        weights |= _layer(sd, f"{image}adaLN_modulation.1", f"{old}norm1.linear")
        weights |= _layer(sd, f"{text}adaLN_modulation.1", f"{old}norm1_context.linear", turned=last)
        for side, feed in ((image, "ff"), (text, "ff_context")):
            weights |= _layer(sd, f"{side}mlp.fc1", f"{old}{feed}.net.0.proj")
            weights |= _layer(sd, f"{side}mlp.fc2", f"{old}{feed}.net.2")
    return weights


def write_checkpoint(
    path: Path, version: str, dtype: torch.dtype = torch.float16, seed: int = 0, **changes: Any
) -> Path:
    """Write a tiny random single file; ``changes`` are of the transformer's shape."""
    from safetensors.torch import save_file

    weights = single_file_weights(random_modules(version, seed, **changes))
    save_file({k: v.to(dtype).contiguous() for k, v in weights.items()}, path)
    return path


def write_folder(folder: Path, version: str, seed: int = 0) -> Path:
    """Write the modules as a diffusers folder, with tokenizers."""
    for name, module in random_modules(version, seed).items():
        module.save_pretrained(folder / name)  # type: ignore[operator]
    tokenizers = write_tokenizers(folder)
    tokenizers["clip"].rename(folder / "tokenizer")
    tokenizers["t5"].rename(folder / "tokenizer_3")
    tiny.write_tokenizer(folder / "tokenizer_2")
    return folder


def write_tokenizers(folder: Path) -> dict[str, Path]:
    """Write tokenizers of both kinds; return their folders."""
    return {
        "clip": tiny.write_tokenizer(folder / "clip"),
        "t5": tiny_t5.write_t5_tokenizer(folder / "t5"),
    }


def _layer(
    sd: dict[str, torch.Tensor], theirs: str, ours: str, *, turned: bool = False
) -> dict[str, torch.Tensor]:
    """Return a layer's weight and bias, if there is one; ``turned`` swaps its two halves."""
    found = {kind: sd[f"{ours}.{kind}"] for kind in ("weight", "bias") if f"{ours}.{kind}" in sd}
    return {f"{theirs}.{k}": torch.cat(v.chunk(2)[::-1]) if turned else v for k, v in found.items()}


def _attention(
    sd: dict[str, torch.Tensor], theirs: str, ours: str, names: tuple[str, str, str], norm: str
) -> dict[str, torch.Tensor]:
    """Return the joined projections to query, key and value, and the norms of the first two."""
    if f"{ours}{names[0]}.weight" not in sd:
        return {}
    joined = {
        f"{theirs}qkv.{kind}": torch.cat([sd[f"{ours}{name}.{kind}"] for name in names])
        for kind in ("weight", "bias")
    }
    norms = {f"{theirs}ln_{x}.weight": f"{ours}{norm}{x}.weight" for x in "qk"}
    return joined | {new: sd[old] for new, old in norms.items() if old in sd}
