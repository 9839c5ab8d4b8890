"""Draw an image with diffusers' own pipelines and LoRA loaders, on the weights of a base of the trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

HEIGHT, WIDTH = 64, 96
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def draw(
    base: Any,
    parts: Any,
    lora: Path,
    text: str,
    negative: str,
    cfg: float,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    pack: Callable[[str], Any],
) -> torch.Tensor:
    """Return pixels (1, H, W, 3) in [0, 1]; ``sigmas`` end with 0, which flows add themselves."""
    pipe, given = PIPES[base.family.name](base, parts, noise, pack)
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipe.set_progress_bar_config(disable=True)
    if cfg != 1:
        given |= {"negative_prompt": negative, "guidance_scale": cfg}
    steps = sigmas if base.velocity is not None else sigmas[:-1]
    images = pipe(text, height=HEIGHT, width=WIDTH, sigmas=steps.tolist(), output_type="pt", **given).images
    return images.movedim(1, -1).float()


def clip_words(tokenizer: Any, *, open_clip: bool = False) -> Any:
    """Return CLIP's tokenizer as diffusers' folders have it; OpenCLIP's fills up with the token 0."""
    own = copy.deepcopy(tokenizer)
    own.model_max_length = 77
    if open_clip:
        own.pad_token = own.convert_ids_to_tokens(0)
    return own


def euler(base: Any) -> Any:
    from diffusers import EulerDiscreteScheduler

    kind = "v_prediction" if base.velocity else "epsilon"
    return EulerDiscreteScheduler(**BETAS, prediction_type=kind, timestep_spacing="leading", steps_offset=1)


def sd2(base: Any, parts: Any, noise: torch.Tensor, pack: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=clip_words(parts.tokenizer, open_clip=True),
        unet=parts.denoiser,
        scheduler=euler(base),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"latents": noise}


def sdxl(base: Any, parts: Any, noise: torch.Tensor, pack: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        text_encoder_2=parts.text_encoders["text_encoder_2"],
        tokenizer=clip_words(parts.tokenizer),
        tokenizer_2=clip_words(parts.tokenizers["text_encoder_2"], open_clip=True),
        unet=parts.denoiser,
        scheduler=euler(base),
        add_watermarker=False,
    )
    return pipe, {"latents": noise}


def flux(base: Any, parts: Any, noise: torch.Tensor, pack: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    sd = base.state_dicts["denoiser"]
    own = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=parts.text_encoders["text_encoder_2"].config.d_model,
        pooled_projection_dim=parts.text_encoder.config.hidden_size,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )
    filled(own, sd, pack("trainer.families.names.flux_keys").from_diffusers)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=clip_words(parts.tokenizer),
        text_encoder_2=parts.text_encoders["text_encoder_2"],
        tokenizer_2=parts.tokenizers["text_encoder_2"],
        transformer=own,
    )
    latents = FluxPipeline._pack_latents(noise, *noise.shape)
    return pipe, {"latents": latents, "guidance_scale": 3.5, "max_sequence_length": 256}


def sd35(base: Any, parts: Any, noise: torch.Tensor, pack: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    own = SD3Transformer2DModel(
        sample_size=16,
        in_channels=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=4096,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        out_channels=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    filled(own, base.state_dicts["denoiser"], pack("trainer.families.names.sd3_keys").from_diffusers)
    # Of CLIP-L SD3 takes the pooled state as it is; diffusers' folder says so by the identity.
    config = copy.deepcopy(parts.text_encoder.config)
    config.projection_dim = config.hidden_size
    clip = CLIPTextModelWithProjection(config)
    clip.text_model.load_state_dict(
        pack("trainer.families.text.clip_text").text_body(parts.text_encoder).state_dict()
    )
    clip.text_projection.load_state_dict({"weight": torch.eye(config.hidden_size)})
    pipe = StableDiffusion3Pipeline(
        transformer=own,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=parts.vae,
        text_encoder=clip.eval(),
        tokenizer=clip_words(parts.tokenizer),
        text_encoder_2=parts.text_encoders["text_encoder_2"],
        tokenizer_2=clip_words(parts.tokenizers["text_encoder_2"], open_clip=True),
        text_encoder_3=parts.text_encoders["text_encoder_3"],
        tokenizer_3=parts.tokenizers["text_encoder_3"],
    )
    return pipe, {"latents": noise, "max_sequence_length": 77}


PIPES: Mapping[str, Any] = {"sd2": sd2, "sdxl": sdxl, "flux": flux, "sd35_medium": sd35}


def filled(model: nn.Module, ours: Mapping[str, torch.Tensor], from_theirs: Callable[..., Any]) -> None:
    """Load our weights into diffusers' module: each value to where ``from_theirs`` takes it from."""
    places, count = {}, 0
    for name, value in model.state_dict().items():
        places[name] = torch.arange(count, count + value.numel()).view(value.shape)
        count += value.numel()
    values = torch.full((count,), torch.nan)
    for name, place in dict(from_theirs(places)).items():
        values[place.flatten()] = ours[name].float().flatten()
    assert not values.isnan().any(), "a place of diffusers' module got no value"
    model.load_state_dict({name: values[place] for name, place in places.items()})
    model.eval()
