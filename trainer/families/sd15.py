"""Stable Diffusion 1.x: U-Net with cross-attention, CLIP text model, KL VAE, eps-prediction.

Modules are diffusers' and transformers' own classes. Their shapes are read from the weights, so the
same code serves a real SD1.5 checkpoint and the tiny embedded base of the same structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..block_weights import SD1, Blocks
from ..objective import NoiseSchedule, Objective
from ..parts import Parts, Target
from .base import Look, Reading, Room, Tensors, Texts, untold
from .modules.autoencoder import decoded, load_vae, moments_of, scaled_latents
from .modules.building import assign, built
from .modules.unet import block_of, check_context, predict_unet, unet_config
from .names.ldm_keys import (
    TEXT_PREFIX,
    UNET_PREFIX,
    unet_to_diffusers,
    unet_to_ldm,
)
from .names.ldm_vae import join_vae, split_vae, vae_from_folder
from .names.prefixes import above
from .names.unet_kinds import refuse_relatives, unet_kind
from .sources.weights import Renamed, joined
from .targets.targets import find_targets
from .text import clip_text
from .text.clip_tokens import CHUNK
from .text.emphasis import emphasise

SCALING_FACTOR = 0.18215
NUM_HEADS = 8  # of every attention in SD1.x; not visible in the weights
TITLE = "SD1.x"


class SD15:
    """The SD1.x family; stateless."""

    name = "sd15"
    latent_multiple = 8
    blocks: Blocks | None = SD1
    objective: Objective = NoiseSchedule()
    metadata: Mapping[str, str] = {
        "ss_base_model_version": "sd_v1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
    }
    velocity_metadata: Mapping[str, str] = {}
    encoders: Mapping[str, str] = {"text_encoder": "clip"}
    optional: tuple[str, ...] = ()
    folders: Mapping[str, str] = {"denoiser": "unet", "vae": "vae", "text_encoder": "text_encoder"}
    velocity_of = zero_terminal_of = staticmethod(untold)
    trains_text = True
    uses_sizes = False
    look = Look(20, 7.0)
    ignored: Mapping[str, str] = {}
    defaults: Mapping[str, Any] = {}

    def detect(self, weights: Tensors) -> bool:
        """Say whether single-file weights belong to SD1.x."""
        return unet_kind(weights) == "sd15"

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into diffusers-named state dicts of the three parts (views)."""
        unet = [k[len(UNET_PREFIX) :] for k in weights if k.startswith(UNET_PREFIX)]
        text = [k[len(TEXT_PREFIX) :] for k in weights if k.startswith(TEXT_PREFIX)]
        names = {new: UNET_PREFIX + old for new, old in unet_to_diffusers(unet).items()}
        return {
            "denoiser": Renamed(weights, names),
            "vae": split_vae(weights),
            "text_encoder": Renamed(
                weights, {k: TEXT_PREFIX + k for k in text if not k.endswith("position_ids")}
            ),
        }

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return the three parts under single-file names (views): what `split` takes apart."""
        unet, vae, text = (state_dicts[part] for part in ("denoiser", "vae", "text_encoder"))
        return joined(
            [
                join_vae(vae),
                above(text, TEXT_PREFIX),
                Renamed(unet, {UNET_PREFIX + new: old for new, old in unet_to_ldm(unet).items()}),
            ]
        )

    def from_folder(self, state_dicts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Bring the parts of a diffusers folder to today's names."""
        text = state_dicts["text_encoder"]
        names = {
            k if k.startswith("text_model.") else f"text_model.{k}": k
            for k in text
            if not k.endswith("position_ids")  # integers, which the module makes for itself
        }
        return {
            "denoiser": state_dicts["denoiser"],
            "vae": vae_from_folder(state_dicts["vae"]),
            "text_encoder": Renamed(text, names),
        }

    def load(self, state_dicts: Mapping[str, Tensors], tokenizers: Mapping[str, Any]) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""
        from diffusers import UNet2DConditionModel

        unet_sd, text_sd = state_dicts["denoiser"], state_dicts["text_encoder"]
        unet = built("U-Net", TITLE, lambda: UNet2DConditionModel(**config_of(unet_sd)))
        vae = load_vae(state_dicts["vae"], TITLE, scaling_factor=SCALING_FACTOR)
        text = clip_text.load_clip_text(text_sd, tokenizers["text_encoder"], TITLE)
        assign(unet, unet_sd, "U-Net", TITLE)
        check_context(unet, clip_text.text_width(text), TITLE)
        return Parts(unet, vae, nn.ModuleDict({"text_encoder": text}), tokenizers)

    def latent_shape(self, parts: Parts, height: int, width: int) -> tuple[int, ...]:
        """Return (4, height / 8, width / 8)."""
        return (4, height // 8, width // 8)

    def encode_images(self, parts: Parts, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode pixels (B, 3, H, W) in [-1, 1] into mean and std of their latents, float32, unscaled."""
        return moments_of(parts.vae, pixels)

    def latents(self, moments: Tensors, noise: torch.Tensor) -> torch.Tensor:
        """Draw scaled latents (B, 4, H/8, W/8) from moments with standard normal ``noise``."""
        return scaled_latents(moments, noise, SCALING_FACTOR)

    def decode(self, parts: Parts, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels (B, 3, H, W), about in [-1, 1], float32, for scaled latents."""
        return decoded(parts.vae, latents, SCALING_FACTOR)

    def tokenize(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Texts:
        """Return token ids (B, chunks, 77), and with emphasis the weights (B, chunks*75+2) of places."""
        return clip_text.clip_tokens(parts.tokenizer, captions, reading, parts.words)

    def reading_for(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Reading:
        """Return the reading with as many chunks as the longest caption needs."""
        return clip_text.long_enough(parts.tokenizer, captions, reading, parts.words)

    def room(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Room:
        """Return how long captions are for CLIP, and how much it reads; see `clip_room`."""
        return clip_text.clip_room(parts.tokenizer, captions, reading, parts.words)

    def encode_text(self, parts: Parts, tokens: Texts, reading: Reading) -> Texts:
        """Return the conditioning (B, chunks*75+2, D)."""
        ids = tokens[0]
        hidden = clip_text.hidden_states(parts.text_encoder, ids, reading.clip_skip)
        hidden = clip_text.chunks_joined(hidden, ids.shape[1])
        if reading.weighted:
            hidden = emphasise(hidden, tokens[1], keep_mean=reading.keep_mean)
        return (hidden,)

    def cond_shapes(self, parts: Parts, reading: Reading) -> list[tuple[int, ...]]:
        """Return [(chunks*75+2, D)]."""
        chunks = reading.max_token_length // CHUNK
        return [(chunks * CHUNK + 2, clip_text.text_width(parts.text_encoder))]

    def predict(
        self,
        parts: Parts,
        noisy: torch.Tensor,
        t: torch.Tensor,
        cond: Texts,
        sizes: torch.Tensor | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Return what the base predicts, noise or velocity, for noisy latents at integer timesteps t (B,)."""
        return predict_unet(parts.denoiser, parts.dtype, noisy, t, cond[0])

    def targets(
        self, parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False
    ) -> list[Target]:
        """List the modules that kohya's trainer trains, or those of a LyCORIS preset; see `find_targets`."""
        return find_targets(parts, block_of, convolutions=convolutions, preset=preset, norms=norms)


def config_of(sd: Tensors) -> dict[str, Any]:
    """Read the U-Net's shape from diffusers-named weights; raises LG-BASE-004 for SD1.x's relatives."""
    refuse_relatives(sd, TITLE)
    return unet_config(sd, heads=lambda width: NUM_HEADS)
