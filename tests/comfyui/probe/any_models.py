"""Tiny random models that the trainer has no family for: AuraFlow, and Wan, whose latents have a time."""

from __future__ import annotations

import json
from typing import Any

import comfy.ldm.wan.vae as wan_vae
import comfy.sd
import comfy.supported_models as supported
import comfy.text_encoders.sd2_clip as sd2_text
import torch

from . import tiny_models as tiny

TEXTS = {"clip_h": tiny.clip_config(128)}  # any encoder will do: these models see a row of vectors
MODELS = {
    "auraflow": tiny.Tiny(
        supported.AuraFlow,
        {
            "cond_seq_dim": 128,
            "n_double_layers": 1,
            "n_layers": 3,
            "dim": 256,
            "n_heads": 2,
            "global_conddim": 256,
            "patch_size": 2,
            "in_channels": 4,
            "max_seq": 256,
        },
        sd2_text.SD2Tokenizer,
        sd2_text.SD2ClipModel,
        TEXTS,
    ),
    "wan": tiny.Tiny(
        supported.WAN21_T2V,
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 256,
            "in_dim": 16,
            "out_dim": 16,
            "num_heads": 2,
            "ffn_dim": 256,
            "num_layers": 2,
            "patch_size": (1, 2, 2),
            "freq_dim": 64,
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "text_dim": 128,
        },
        sd2_text.SD2Tokenizer,
        sd2_text.SD2ClipModel,
        TEXTS,
        latent_channels=16,
    ),
}


def filled(module: torch.nn.Module) -> torch.nn.Module:
    for name, weight in module.state_dict().items():
        if weight.is_floating_point():
            weight.copy_(tiny.drawn(name, weight.shape, 0, 0.05))
    return module


def load(name: str) -> tuple[Any, Any, Any]:
    made = MODELS[name]
    model, clip = tiny.model_of(made, disable_dynamic=True), tiny.clip_of(made)
    filled(model.model.diffusion_model)
    filled(clip.cond_stage_model)
    if name == "wan":
        levels = {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}
        inside = wan_vae.WanVAE(dim=8, z_dim=16, num_res_blocks=2, attn_scales=[], dropout=0.0, **levels)
        return model, clip, comfy.sd.VAE(sd=filled(inside).state_dict())
    return model, clip, tiny.vae_of(made, filled(tiny.autoencoder_of(made)).state_dict())


class ProbeAnyBase:
    """Hand out a tiny random base of a kind that the trainer does not know."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "load", ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"kind": (list(MODELS),)}}

    def load(self, kind: str) -> tuple[Any, Any, Any]:
        return load(kind)


class ProbeAnyForward:
    """Compare what the trainer predicts with what ComfyUI's own model makes of the same."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "look", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)}}

    def look(self, model: Any, clip: Any, vae: Any) -> dict[str, Any]:
        from . import pack

        before = {name: w.data_ptr() for name, w in model.model.diffusion_model.state_dict().items()}
        with torch.inference_mode(False), torch.no_grad():
            base = pack("nodes.host_bases").open_base(model, clip, vae)
            family, parts = base.family, base.load()
            shape = family.latent_shape(parts, 64, 96)
            x = torch.randn((1, *shape), generator=torch.Generator().manual_seed(5))
            tokens = family.tokenize(parts, ["a red circle"], None)
            cond = family.encode_text(parts, tokens, None)
            t = torch.tensor([400.0])
            found = family.predict(parts, x, t, cond)
            encoded, more = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))[0]
            deep = family._deep(x)
            extra = model.model.extra_conds(
                cross_attn=encoded, noise=deep, device=x.device, width=96, height=64, **more
            )
            inputs = {
                k: v.process_cond(batch_size=1, device=x.device, area=None).cond for k, v in extra.items()
            }
            sigma = torch.tensor([0.4])
            estimate = model.model.apply_model(deep, sigma, **inputs)
            wanted = family._flat((deep - estimate) / 0.4)
            shared = {name: w.data_ptr() for name, w in parts.denoiser.state_dict().items()}
            pixels = torch.rand((1, 3, 64, 96), generator=torch.Generator().manual_seed(6)) * 2 - 1
            latents = family.latents(family.encode_images(parts, pixels), x)
            drawn = family.decode(parts, latents)
        report = {
            "apart": float((found - wanted).abs().max() / wanted.abs().max()),
            "copied": [name for name in before if before[name] != shared[name]],
            "latents": list(latents.shape),
            "drawn": list(drawn.shape),
            "kept": all(
                w.data_ptr() == before[name] for name, w in model.model.diffusion_model.state_dict().items()
            ),
        }
        return {"ui": {"text": [json.dumps(report)]}}


NODES = {"ProbeAnyBase": ProbeAnyBase, "ProbeAnyForward": ProbeAnyForward}
