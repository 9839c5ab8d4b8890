"""Lumina-Image 2.0: Gemma 2 with a system prompt as text encoder, Flux.1's autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..block_weights import Blocks
from ..objective import Objective
from ..objective.flow import Flow
from ..parts import DENOISER, Parts, Target
from .base import Look, Reading, Room, Tensors, Texts, untold, without_clip
from .modules.autoencoder import FLUX_SCALE, FLUX_SHIFT, decoded, load_vae, moments_of, scaled_latents
from .modules.building import assign, built
from .modules.lumina2_model import Block, GroupedAttention, Lumina2Transformer, lumina2_config
from .modules.z_image_model import PATCH, FinalLayer
from .names.ldm_keys import UNET_PREFIX
from .names.ldm_vae import join_vae, split_vae, vae_from_folder
from .names.lumina2_keys import lumina2_from_diffusers
from .names.prefixes import above, below
from .names.vae_prefix import with_ldm_prefix, with_newer_prefix
from .sources.weights import joined
from .targets.block_targets import find_block_targets
from .text.gemma_text import encode_gemma, gemma_lengths, gemma_tokens, gemma_weights, load_gemma

TITLE = "Lumina 2"
LATENT_CHANNELS = 16
SAMPLING_SHIFT = 6.0  # of the noise levels when images are drawn; training's is a setting
TEXT, TEXT_PREFIX = "text_encoder", "text_encoders.gemma2_2b.transformer."
TEXT_LENGTH, TEXT_LONGEST = 256, 1024
# What captions stand behind, in ComfyUI's "superior" and diffusers' words, unless they have a prompt of the
# kind. A text of nothing stands alone: so the model learnt what no text is.
MARK = "<Prompt Start>"
SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text "
    f"alignment based on textual prompts or user prompts. {MARK} "
)
UNUSED = ("norm_final.weight",)  # in the authors' files, read by nobody
MODULATION = "layers.0.adaLN_modulation.1.weight"
OTHERS = ("clip_text_pooled_proj.0.weight",)  # of NewBie, which reads a CLIP too


class Lumina2:
    """The family of Lumina-Image 2.0; stateless."""

    name = "lumina2"
    latent_multiple = 8 * PATCH
    blocks: Blocks | None = None
    objective: Objective = Flow(shift=SAMPLING_SHIFT)
    metadata: Mapping[str, str] = {
        "ss_base_model_version": "lumina2",
        "ss_network_module": "networks.lora_lumina",
        "modelspec.architecture": "lumina-2/lora",
        "modelspec.implementation": "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
        "modelspec.prediction_type": "epsilon",  # what the reference trainer writes, though it is a flow
    }
    velocity_metadata: Mapping[str, str] = {}
    encoders: Mapping[str, str] = {TEXT: "gemma"}
    optional: tuple[str, ...] = ()
    folders: Mapping[str, str] = {DENOISER: "transformer", "vae": "vae", TEXT: "text_encoder"}
    velocity_of = zero_terminal_of = staticmethod(untold)
    trains_text = False  # ComfyUI reads no LoRA of Gemma 2
    uses_sizes = False
    look = Look(36, 4.0)
    ignored: Mapping[str, str] = {
        **without_clip(TITLE, "brackets are text to Gemma 2"),
        "guidance_scale": "Lumina 2 is not distilled and is told no guidance",
        "apply_t5_attn_mask": "padding is always hidden from Lumina 2",
        "attention": "padding is hidden by torch's own attention",
    }
    defaults: Mapping[str, Any] = {
        "timestep_sampling": "nextdit_shift",
        "discrete_flow_shift": 6.0,
        "t5xxl_max_token_length": TEXT_LENGTH,
    }

    def detect(self, weights: Tensors) -> bool:
        """Say whether single-file weights belong to Lumina 2; Z-Image has no SiLU in its modulation."""
        needed = ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight", MODULATION)
        return {name for name in (*needed, *OTHERS) if UNET_PREFIX + name in weights} == set(needed)

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into state dicts of the parts' modules (views)."""
        weights = with_ldm_prefix(weights)
        return {
            DENOISER: below(weights, UNET_PREFIX, but=UNUSED),
            "vae": split_vae(weights),
            TEXT: gemma_weights(below(weights, TEXT_PREFIX)),
        }

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return the parts under single-file names (views): what `split` takes apart."""
        vae = join_vae(state_dicts["vae"])
        text = above(state_dicts[TEXT], TEXT_PREFIX + "model.")
        return with_newer_prefix(joined([vae, text, above(state_dicts[DENOISER], UNET_PREFIX)]))

    def from_folder(self, state_dicts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Bring the parts of a diffusers folder to the modules' names: query, key and value become one."""
        return {
            DENOISER: lumina2_from_diffusers(state_dicts[DENOISER]),
            "vae": vae_from_folder(state_dicts["vae"]),
            TEXT: gemma_weights(state_dicts[TEXT]),
        }

    def load(self, state_dicts: Mapping[str, Tensors], tokenizers: Mapping[str, Any]) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""
        sd = state_dicts[DENOISER]
        denoiser = built("transformer", TITLE, lambda: Lumina2Transformer(**lumina2_config(sd)))
        assign(denoiser, sd, "transformer", TITLE)
        vae = load_vae(
            state_dicts["vae"],
            TITLE,
            scaling_factor=FLUX_SCALE,
            shift_factor=FLUX_SHIFT,
            channels=LATENT_CHANNELS,
        )
        text = load_gemma(state_dicts[TEXT], tokenizers[TEXT], TITLE)
        return Parts(denoiser, vae, nn.ModuleDict({TEXT: text}), {TEXT: tokenizers[TEXT]})

    def latent_shape(self, parts: Parts, height: int, width: int) -> tuple[int, ...]:
        """Return (16, height / 8, width / 8)."""
        return (cast(Any, parts.vae).config.latent_channels, height // 8, width // 8)

    def encode_images(self, parts: Parts, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode pixels (B, 3, H, W) in [-1, 1] into mean and std of their latents, float32, unscaled."""
        return moments_of(parts.vae, pixels)

    def latents(self, moments: Tensors, noise: torch.Tensor) -> torch.Tensor:
        """Draw scaled latents (B, 16, H/8, W/8) from moments with standard normal ``noise``."""
        return scaled_latents(moments, noise, FLUX_SCALE, FLUX_SHIFT)

    def decode(self, parts: Parts, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels (B, 3, H, W), about in [-1, 1], float32, for scaled latents."""
        return decoded(parts.vae, latents, FLUX_SCALE, FLUX_SHIFT)

    def tokenize(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Texts:
        """Return token ids (B, L) and 1 where one is no padding, both int64."""
        return gemma_tokens(parts.tokenizer, _told(captions), reading.t5_length or TEXT_LENGTH)

    def reading_for(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Reading:
        """Return the reading with the tokens that the longest caption needs, up to the most of all."""
        room = self.room(parts, captions, reading)
        return replace(reading, t5_length=min(room.up(max(room.lengths)), TEXT_LONGEST))

    def room(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Room:
        """Return how long captions are for Gemma with the system prompt; padding is hidden."""
        lengths = gemma_lengths(parts.tokenizer, _told(captions))
        return Room(lengths, reading.t5_length or TEXT_LENGTH, TEXT_LONGEST, padding=0)

    def encode_text(self, parts: Parts, tokens: Texts, reading: Reading) -> Texts:
        """Return Gemma's states (B, L, D), and 1 where a place (B, L) is no padding, in their dtype."""
        ids, mask = tokens
        states = encode_gemma(parts.text_encoder, ids, mask)
        return states, mask.to(states.dtype)

    def cond_shapes(self, parts: Parts, reading: Reading) -> list[tuple[int, ...]]:
        """Return [(L, D), (L,)]."""
        length = reading.t5_length or TEXT_LENGTH
        return [(length, cast(Any, parts.text_encoder).config.hidden_size), (length,)]

    def predict(
        self,
        parts: Parts,
        noisy: torch.Tensor,
        t: torch.Tensor,
        cond: Texts,
        sizes: torch.Tensor | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Return the velocity, noise minus image, for noisy latents at timesteps t (B,) in [0, 1000]."""
        text, seen = cond
        out = parts.denoiser(noisy.to(parts.dtype), t, text.to(parts.dtype), seen.bool())
        return cast(torch.Tensor, out)

    def targets(
        self, parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False
    ) -> list[Target]:
        """List the layers that kohya's trainer trains, or those of a preset; see `find_block_targets`."""
        return find_block_targets(
            parts,
            (Block, FinalLayer),
            (GroupedAttention,),
            family=TITLE,
            convolutions=convolutions,
            preset=preset,
            norms=norms,
        )


def _told(captions: Sequence[str]) -> list[str]:
    """Put the system prompt before captions that say something and have none."""
    return [SYSTEM_PROMPT + caption if caption and MARK not in caption else caption for caption in captions]
