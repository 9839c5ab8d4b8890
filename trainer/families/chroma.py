"""Chroma: Flux without CLIP and without distilled guidance; T5 with hidden padding, Flux.1's autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..block_weights import Blocks
from ..objective import Objective
from ..objective.flow import FLUX_MU, Flow
from ..parts import DENOISER, Parts, Target
from .base import Look, Reading, Room, Tensors, Texts, untold, without_clip
from .modules.autoencoder import FLUX_SCALE, FLUX_SHIFT, decoded, load_vae, moments_of, scaled_latents
from .modules.building import assign, built
from .modules.chroma_model import PATCH, ChromaTransformer, chroma_config
from .modules.stream_blocks import DoubleBlock, SelfAttention, SingleBlock
from .names.chroma_keys import chroma_from_diffusers
from .names.flux_keys import T5_PREFIX, join_denoiser, split_denoiser
from .names.ldm_keys import UNET_PREFIX
from .names.ldm_vae import join_vae, split_vae, vae_from_folder
from .names.prefixes import above
from .names.vae_prefix import with_ldm_prefix
from .sources.weights import Renamed, joined
from .targets.block_targets import find_block_targets
from .text.t5_text import check_t5_tokenizer, encode_t5, load_t5, t5_room, t5_tokens, t5_weights

TITLE = "Chroma"
LATENT_CHANNELS = 16
T5 = "text_encoder"
T5_LENGTH, T5_LONGEST = 512, 1024
SEEN_PADDING = 1  # places of padding that the transformer sees behind the text
OLD_T5_PREFIX = "cond_stage_model.t5xxl.transformer."  # of ComfyUI's checkpoints
GUIDE, RADIANCE = "distilled_guidance_layer.", "nerf_blocks."


class Chroma:
    """The family of Chroma1 (Base, HD, Flash) and its relatives in latent space; stateless."""

    name = "chroma"
    latent_multiple = 8 * PATCH
    blocks: Blocks | None = None
    objective: Objective = Flow(dynamic=FLUX_MU)
    metadata: Mapping[str, str] = {
        "ss_base_model_version": "chroma",
        "ss_model_type": "chroma",
        "ss_network_module": "networks.lora_flux",
        "modelspec.architecture": "chroma/lora",
        "modelspec.implementation": "https://huggingface.co/lodestones/Chroma",
    }
    velocity_metadata: Mapping[str, str] = {}
    encoders: Mapping[str, str] = {T5: "t5"}
    optional: tuple[str, ...] = ()
    folders: Mapping[str, str] = {DENOISER: "transformer", "vae": "vae", T5: "text_encoder"}
    velocity_of = zero_terminal_of = staticmethod(untold)
    trains_text = False
    uses_sizes = False
    look = Look(26, 4.0)
    ignored: Mapping[str, str] = {
        **without_clip(TITLE, "Chroma learnt from T5's states as they are", "T5"),
        "guidance_scale": "Chroma is not distilled and is told no guidance",
        "apply_t5_attn_mask": "T5's padding is always hidden from Chroma, but for one place",
        "attention": "Chroma's padding is hidden by torch's own attention",
    }
    defaults: Mapping[str, Any] = {
        "timestep_sampling": "sigmoid",
        "discrete_flow_shift": 1.0,
        "t5xxl_max_token_length": T5_LENGTH,
    }

    def detect(self, weights: Tensors) -> bool:
        """Say whether single-file weights belong to Chroma; Radiance, which draws pixels, does not."""
        below = {k[len(UNET_PREFIX) :] for k in weights if k.startswith(UNET_PREFIX)}
        return (
            "img_in.weight" in below
            and any(k.startswith(GUIDE) for k in below)
            and not any(k.startswith(RADIANCE) for k in below)
        )

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into state dicts of the parts' modules (views)."""
        prefix = next((p for p in (T5_PREFIX, OLD_T5_PREFIX) if any(k.startswith(p) for k in weights)), "")
        text = {k.removeprefix(prefix): k for k in weights if prefix and k.startswith(prefix)}
        return {
            DENOISER: split_denoiser(weights),
            "vae": split_vae(with_ldm_prefix(weights)),
            T5: t5_weights(Renamed(weights, text)),
        }

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return the parts under single-file names (views): what `split` takes apart."""
        return joined(
            [
                join_vae(state_dicts["vae"]),
                above(t5_weights(state_dicts[T5]), OLD_T5_PREFIX),
                join_denoiser(state_dicts[DENOISER]),
            ]
        )

    def from_folder(self, state_dicts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Bring the parts of a diffusers folder to the modules' names: query, key and value become one."""
        return {
            DENOISER: chroma_from_diffusers(state_dicts[DENOISER]),
            "vae": vae_from_folder(state_dicts["vae"]),
            T5: t5_weights(state_dicts[T5]),
        }

    def load(self, state_dicts: Mapping[str, Tensors], tokenizers: Mapping[str, Any]) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""
        sd = state_dicts[DENOISER]
        denoiser = built("transformer", TITLE, lambda: ChromaTransformer(**chroma_config(sd)))
        assign(denoiser, sd, "transformer", TITLE)
        vae = load_vae(
            state_dicts["vae"],
            TITLE,
            scaling_factor=FLUX_SCALE,
            shift_factor=FLUX_SHIFT,
            channels=LATENT_CHANNELS,
        )
        text = load_t5(state_dicts[T5], TITLE)
        check_t5_tokenizer(tokenizers[T5], text)
        return Parts(denoiser, vae, nn.ModuleDict({T5: text}), {T5: tokenizers[T5]})

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
        return t5_tokens(parts.tokenizer, captions, reading.t5_length or T5_LENGTH)

    def reading_for(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Reading:
        """Return the reading with the tokens that the longest caption needs, up to the most of all."""
        room = self.room(parts, captions, reading)
        return replace(reading, t5_length=min(room.up(max(room.lengths) + SEEN_PADDING), T5_LONGEST))

    def room(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Room:
        """Return how long captions are for T5; the transformer sees one place of padding."""
        length = reading.t5_length or T5_LENGTH
        return t5_room(parts.tokenizer, captions, length, most=T5_LONGEST, padding=SEEN_PADDING)

    def encode_text(self, parts: Parts, tokens: Texts, reading: Reading) -> Texts:
        """Return T5's states (B, L, D), and 1 where the transformer sees a place (B, L), in their dtype."""
        ids, mask = tokens
        places = torch.arange(ids.shape[1], device=ids.device)
        seen = places < mask.sum(dim=1, keepdim=True) + SEEN_PADDING
        states = encode_t5(parts.text_encoder, ids, mask)
        return states, seen.to(states.dtype)

    def cond_shapes(self, parts: Parts, reading: Reading) -> list[tuple[int, ...]]:
        """Return [(L, D), (L,)]."""
        length = reading.t5_length or T5_LENGTH
        return [(length, cast(Any, parts.text_encoder).config.d_model), (length,)]

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
            (DoubleBlock, SingleBlock),
            (SelfAttention, SingleBlock),
            family=TITLE,
            convolutions=convolutions,
            preset=preset,
            norms=norms,
        )
