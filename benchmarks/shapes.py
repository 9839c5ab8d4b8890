"""The measured models on the meta device: every tensor with its shape, and none with memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
CLIP_WORDS = 49408
VAE_WIDTHS = (128, 256, 512, 512)
Modules = dict[str, nn.Module]


def sd15() -> Modules:
    """Return SD1.5's parts."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=CLIP_L["hidden_size"],
        attention_head_dim=8,
    )
    return {"denoiser": unet, "vae": vae(4), "text_encoder": clip(**CLIP_L)}


def sdxl(
    widths: tuple[int, ...] = (320, 640, 1280),
    depths: tuple[int, ...] = (1, 2, 10),
    clip_l: dict[str, int] | None = None,
    clip_g: dict[str, int] | None = None,
    vae_widths: tuple[int, ...] = VAE_WIDTHS,
) -> Modules:
    """Return SDXL's parts; a head is 64 wide."""
    from diffusers import UNet2DConditionModel

    clip_l, clip_g = clip_l or CLIP_L, clip_g or CLIP_G
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=widths,
        layers_per_block=2,
        cross_attention_dim=clip_l["hidden_size"] + clip_g["hidden_size"],
        attention_head_dim=tuple(max(1, width // 64) for width in widths),
        use_linear_projection=True,
        transformer_layers_per_block=depths,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + clip_g["hidden_size"],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return {
        "denoiser": unet,
        "vae": vae(4, vae_widths),
        "text_encoder": clip(**clip_l),
        "text_encoder_2": clip(projected=True, hidden_act="gelu", **clip_g),
    }


def flux(
    double: int,
    single: int,
    width: int = 3072,
    heads: int = 24,
    clip_l: dict[str, int] | None = None,
    t5_xxl: dict[str, int] | None = None,
    vae_widths: tuple[int, ...] = VAE_WIDTHS,
) -> Modules:
    """Return the parts of Flux.1 dev with so many blocks of each kind."""
    from loragraft.trainer.families.modules.flux_blocks import FluxTransformer

    clip_l, t5_xxl = clip_l or CLIP_L, t5_xxl or T5_XXL
    with torch.device("meta"):
        transformer = FluxTransformer(
            width=width,
            heads=heads,
            inside=4 * width,
            channels=64,
            context=t5_xxl["d_model"],
            pooled=clip_l["hidden_size"],
            double=double,
            single=single,
            guided=True,
        )
    no_convolutions = {"use_quant_conv": False, "use_post_quant_conv": False}
    return {
        "denoiser": transformer,
        "vae": vae(16, vae_widths, **no_convolutions),
        "text_encoder": clip(**clip_l),
        "text_encoder_2": t5(**t5_xxl),
    }


def vae(channels: int, widths: tuple[int, ...] = VAE_WIDTHS, **others: Any) -> nn.Module:
    """Return an autoencoder of so many latent channels."""
    from diffusers import AutoencoderKL

    model: nn.Module = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        **others,
    )
    return model


def clip(
    *, projected: bool = False, hidden_act: str = "quick_gelu", vocab_size: int = CLIP_WORDS, **sizes: int
) -> nn.Module:
    """Return a CLIP text model."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab_size, hidden_act=hidden_act, projection_dim=sizes["hidden_size"], **sizes
    )
    model: nn.Module = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    return model


def t5(**sizes: int) -> nn.Module:
    """Return the encoder of a T5."""
    from transformers import T5Config, T5EncoderModel

    model: nn.Module = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))
    return model


SHAPES = {"sd15": sd15, "sdxl": sdxl, "flux": flux}


def modules_of(shapes: str, sizes: Any) -> Modules:
    """Return a model's parts, without memory."""
    with torch.device("meta"):
        return SHAPES[shapes](**sizes)


def state_dicts(modules: Modules) -> dict[str, dict[str, torch.Tensor]]:
    """Return the parts' tensors under the names that our families give them."""
    return {part: _named(module.state_dict()) for part, module in modules.items()}


def _named(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Bring a CLIP's names to those with the inner module's prefix, which newer transformers left out."""
    if not any("token_embedding" in name for name in tensors):
        return {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name}
    full = ("text_model.", "text_projection.")
    return {
        name if name.startswith(full) else f"text_model.{name}": tensor
        for name, tensor in tensors.items()
        if not name.endswith("position_ids")
    }
