"""Stable Diffusion XL (Podell et al. 2023): a deep U-Net that reads two text encoders and knows sizes.

Both encoders, CLIP-L and OpenCLIP-G, are read before their last layer and without the final normalisation,
side by side. The pooled state of the second, and six numbers of the picture's sizes, go to every block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..block_weights import SDXL as SDXL_BLOCKS
from ..block_weights import Blocks
from ..objective import NoiseSchedule, Objective
from ..parts import Parts, Target
from .base import Look, Reading, Room, Tensors, Texts
from .modules.autoencoder import decoded, load_vae, moments_of, scaled_latents
from .modules.building import assign, built
from .modules.sdxl_unet import config_of, sdxl_targets
from .modules.unet import check_context, predict_unet
from .names.ldm_keys import UNET_PREFIX, unet_to_diffusers, unet_to_ldm
from .names.ldm_vae import join_vae, split_vae, vae_from_folder
from .names.pieces import Pieced
from .names.prefixes import above
from .names.unet_kinds import refuse_relatives, unet_kind
from .sources.weights import Renamed, joined
from .text import clip_text
from .text.clip_tokens import CHUNK
from .text.emphasis import emphasise
from .text.openclip import HF_PROJECTION, from_hf, named_by_hf, to_hf, without

SCALING_FACTOR = 0.13025
TITLE = "SDXL"
CLIP_L, CLIP_G = "text_encoder", "text_encoder_2"
HF_L, HF_G = "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."
SGM_L, SGM_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
PADS = {CLIP_L: None, CLIP_G: 0}  # OpenCLIP pads with the token of "!", CLIP with its end token
VELOCITY, ZERO_TERMINAL = "v_pred", "ztsnr"  # empty tensors by which a file tells what it predicts


class SDXL:
    """The SDXL family; stateless."""

    name = "sdxl"
    latent_multiple = 8
    blocks: Blocks | None = SDXL_BLOCKS
    objective: Objective = NoiseSchedule()
    metadata: Mapping[str, str] = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "epsilon",
    }
    velocity_metadata: Mapping[str, str] = {}
    encoders: Mapping[str, str] = {CLIP_L: "clip", CLIP_G: "clip"}
    optional: tuple[str, ...] = ()
    folders: Mapping[str, str] = {"denoiser": "unet", "vae": "vae", CLIP_L: CLIP_L, CLIP_G: CLIP_G}
    trains_text = True
    uses_sizes = True
    look = Look(25, 6.0)
    ignored: Mapping[str, str] = {
        "clip_skip": "SDXL always reads both text encoders before their last layer",
        "train_embeddings": "SDXL has two text encoders, and a word would need an embedding for each",
    }
    defaults: Mapping[str, Any] = {}

    def detect(self, weights: Tensors) -> bool:
        """Say whether single-file weights belong to SDXL."""
        return unet_kind(weights) == "sdxl"

    def velocity_of(self, weights: Tensors) -> bool | None:
        """See `Family`: those that predict velocity say so, as ComfyUI reads it."""
        return True if VELOCITY in weights else None

    def zero_terminal_of(self, weights: Tensors) -> bool | None:
        """See `Family`: those that are say so, as ComfyUI reads it."""
        return True if ZERO_TERMINAL in weights else None

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into the four parts (views); raises LG-BASE-004 for SDXL's relatives."""
        refuse_relatives(weights, TITLE)
        unet = [k[len(UNET_PREFIX) :] for k in weights if k.startswith(UNET_PREFIX)]
        names = {new: UNET_PREFIX + old for new, old in unet_to_diffusers(unet).items()}
        text = named_by_hf(weights, HF_L) or named_by_hf(weights, SGM_L)
        text_2 = named_by_hf(weights, HF_G) or to_hf(weights, SGM_G)
        return {
            "denoiser": Renamed(weights, names),
            "vae": split_vae(weights),
            CLIP_L: Pieced(weights, without(text, HF_PROJECTION)),
            CLIP_G: Pieced(weights, text_2),
        }

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return a single file's weights, the second encoder with OpenCLIP's names."""
        unet, text, text_2 = (state_dicts[part] for part in ("denoiser", CLIP_L, CLIP_G))
        return joined(
            [
                join_vae(state_dicts["vae"]),
                above(text, SGM_L),
                Pieced(text_2, {SGM_G + name: recipe for name, recipe in from_hf(text_2).items()}),
                Renamed(unet, {UNET_PREFIX + new: old for new, old in unet_to_ldm(unet).items()}),
            ]
        )

    def from_folder(self, state_dicts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Bring the parts of a diffusers folder to today's names."""
        unet, text, text_2 = (state_dicts[part] for part in ("denoiser", CLIP_L, CLIP_G))
        refuse_relatives(unet, TITLE)
        return {
            "denoiser": unet,
            "vae": vae_from_folder(state_dicts["vae"]),
            CLIP_L: Pieced(text, without(named_by_hf(text), HF_PROJECTION)),
            CLIP_G: Pieced(text_2, named_by_hf(text_2)),
        }

    def load(self, state_dicts: Mapping[str, Tensors], tokenizers: Mapping[str, Any]) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""
        from diffusers import UNet2DConditionModel

        unet_sd = state_dicts["denoiser"]
        unet = built("U-Net", TITLE, lambda: UNet2DConditionModel(**config_of(unet_sd)))
        vae = load_vae(state_dicts["vae"], TITLE, scaling_factor=SCALING_FACTOR)
        encoders = {
            part: clip_text.load_clip_text(state_dicts[part], tokenizers[part], TITLE, activation=activation)
            for part, activation in ((CLIP_L, "quick_gelu"), (CLIP_G, "gelu"))
        }
        assign(unet, unet_sd, "U-Net", TITLE)
        check_context(unet, sum(clip_text.text_width(encoder) for encoder in encoders.values()), TITLE)
        return Parts(unet, vae, nn.ModuleDict(encoders), tokenizers)

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
        """Return both encoders' token ids (B, chunks, 77), and with emphasis the weights (B, chunks*75+2).

        The order is ids, weights of the first encoder, then of the second.
        """
        both = (
            clip_text.clip_tokens(tokenizer, captions, reading, parts.words, pad=PADS[part])
            for part, tokenizer in parts.tokenizers.items()
        )
        return tuple(tensor for texts in both for tensor in texts)

    def reading_for(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Reading:
        """Return the reading with as many chunks as the longest caption needs."""
        return clip_text.long_enough(parts.tokenizer, captions, reading, parts.words)

    def room(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Room:
        """Return how long captions are for CLIP, and how much it reads; see `clip_room`."""
        return clip_text.clip_room(parts.tokenizer, captions, reading, parts.words)

    def encode_text(self, parts: Parts, tokens: Texts, reading: Reading) -> Texts:
        """Return the conditioning (B, chunks*75+2, D1 + D2) and the second encoder's pooled state (B, P).

        As in the reference, the pooled state is that of the first chunk's end, and emphasis leaves it.
        """
        per_encoder = 2 if reading.weighted else 1
        states = []
        pooled = None
        for number, encoder in enumerate(parts.text_encoders.values()):
            ids, *weights = tokens[number * per_encoder : (number + 1) * per_encoder]
            hidden, pooled = _penultimate(encoder, ids)
            hidden = clip_text.chunks_joined(hidden, ids.shape[1])
            for places in weights:
                hidden = emphasise(hidden, places, keep_mean=reading.keep_mean)
            states.append(hidden)
        assert pooled is not None
        return torch.cat(states, dim=-1), pooled

    def cond_shapes(self, parts: Parts, reading: Reading) -> list[tuple[int, ...]]:
        """Return [(chunks*75+2, D1 + D2), (P,)]."""
        chunks = reading.max_token_length // CHUNK
        width = sum(clip_text.text_width(encoder) for encoder in parts.text_encoders.values())
        projection = cast(Any, parts.text_encoders[CLIP_G]).text_projection
        return [(chunks * CHUNK + 2, width), (projection.weight.shape[0],)]

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
        hidden, pooled = cond
        added = {"text_embeds": pooled.to(parts.dtype), "time_ids": sizes}
        return predict_unet(parts.denoiser, parts.dtype, noisy, t, hidden, added_cond_kwargs=added)

    def targets(
        self, parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False
    ) -> list[Target]:
        """List the modules that kohya's trainer trains, or those of a LyCORIS preset; see `find_targets`.

        The U-Net's have LDM's names in a file: lora_unet_input_blocks_4_1_proj_in.
        """
        return sdxl_targets(parts, convolutions=convolutions, preset=preset, norms=norms)


def _penultimate(encoder: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (B * chunks, 77, D) behind the last layer but one, and of the first chunks the pooled (B, P)."""
    out = encoder(ids.flatten(0, 1), output_hidden_states=True)
    hidden: torch.Tensor = out.hidden_states[-2]
    projection = getattr(encoder, "text_projection", None)
    if projection is None:
        return hidden, None
    first = out.last_hidden_state[:: ids.shape[1]]  # (B, 77, D), normalised
    end = clip_text.text_body(encoder).config.eos_token_id
    places = (ids[:, 0] == end).int().argmax(dim=1)  # trained words have higher ids than it
    pooled: torch.Tensor = projection(first[torch.arange(len(first), device=first.device), places])
    return hidden, pooled
