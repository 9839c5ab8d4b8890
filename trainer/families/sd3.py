"""Stable Diffusion 3 and 3.5: MMDiT, up to three text encoders, a VAE of 16 channels, rectified flow.

(Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis".) The shape is
read from the weights; what differs between the released models beside it is a table of three lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..block_weights import Blocks
from ..errors import LoraGraftError
from ..objective import Flow, Objective
from ..parts import DENOISER, Parts, Target
from .base import Look, Reading, Room, Tensors, Texts, untold
from .modules.autoencoder import decoded, load_vae, moments_of, scaled_latents
from .modules.building import assign, built, unfit
from .modules.sd3_blocks import build_mmdit, mmdit_config
from .names.ldm_vae import join_vae, split_vae, vae_from_folder
from .names.pieces import Pieced
from .names.prefixes import above, below
from .names.sd3_keys import MMDIT_PREFIX, from_authors, from_diffusers, to_authors
from .sources.weights import Renamed, joined
from .targets.sd3_targets import find_sd3_targets
from .text.clip_text import PROJECTION, load_clip_text
from .text.openclip import named_by_hf
from .text.sd3_text import (
    CLIP_G,
    CLIP_L,
    T5,
    T5_LENGTH,
    check_widths,
    conditioning,
    context_widths,
    longer,
    num_places,
    room_of,
    tokens_of,
)
from .text.t5_text import check_t5_tokenizer, load_t5, t5_weights

LATENT_CHANNELS = 16
SCALING_FACTOR, SHIFT_FACTOR = 1.5305, 0.0609
SAMPLING_SHIFT = 3.0  # of the noise levels when images are drawn; training's is a setting
ACTIVATIONS = {CLIP_L: "quick_gelu", CLIP_G: "gelu"}
PATCH = 16  # pixels a token
TITLE = "SD3"
TEXTS = {CLIP_L: "clip_l", CLIP_G: "clip_g", T5: "t5xxl"}  # part -> kind in a single file
CONVOLUTIONS = "SD3's blocks have no convolutions"
BLOCK_WEIGHTS = "SD3 has no down, middle and up blocks; network_reg_lrs sets the rates of single blocks"
BLOCK_DIMS = "SD3 has no down, middle and up blocks; network_reg_dims sets the ranks of single blocks"
BLOCK = MMDIT_PREFIX + "joint_blocks.0."
NEEDED = ("joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight", "pos_embed")


@dataclass(frozen=True)
class Version:
    """One of the released models: the reference trainer's name of it, and what images are drawn with."""

    reference: str
    look: Look


VERSIONS: Mapping[str, Version] = {
    "sd3": Version("medium", Look(28, 7.0)),
    "sd35_large": Version("5-large", Look(28, 3.5)),
    "sd35_medium": Version("5-medium", Look(40, 4.5)),
}


def version_of(weights: Tensors) -> str | None:
    """Return which of `VERSIONS` single-file weights are most like; None if they are another model's.

    Positions as a table and patches by a convolution tell it from what else has joint blocks.
    """
    if any(MMDIT_PREFIX + name not in weights for name in NEEDED):
        return None
    if BLOCK + "context_block.attn.ln_k.weight" not in weights:
        return "sd3"
    is_dual = any(k.startswith(MMDIT_PREFIX) and ".x_block.attn2." in k for k in weights)
    return "sd35_medium" if is_dual else "sd35_large"


class SD3:
    """The family of one of `VERSIONS`."""

    latent_multiple = PATCH
    blocks: Blocks | None = None
    objective: Objective = Flow(shift=SAMPLING_SHIFT)
    velocity_metadata: Mapping[str, str] = {}
    encoders: Mapping[str, str] = {CLIP_L: "clip", CLIP_G: "clip", T5: "t5"}
    optional: tuple[str, ...] = (CLIP_L, CLIP_G, T5)
    folders: Mapping[str, str] = {DENOISER: "transformer", "vae": "vae", **{part: part for part in TEXTS}}
    velocity_of = zero_terminal_of = staticmethod(untold)
    trains_text = True
    uses_sizes = False
    ignored: Mapping[str, str] = {
        "clip_skip": "SD3 learnt from the last layer but one of both CLIPs",
        "weighted_captions": "SD3's conditioning is made of three encoders",
        "train_embeddings": "a word would need vectors in three encoders",
        "train_norm": "SD3's norms have no weights but those of queries and keys, which stay",
        "guidance_scale": "SD3 is not distilled and is told no guidance",
        **dict.fromkeys(("conv_dim", "conv_block_dims", "conv_block_alphas"), CONVOLUTIONS),
        **dict.fromkeys(("down_lr_weight", "mid_lr_weight", "up_lr_weight"), BLOCK_WEIGHTS),
        **dict.fromkeys(("block_dims", "block_alphas"), BLOCK_DIMS),
    }
    defaults: Mapping[str, Any] = {
        "model_prediction_type": "denoised",
        "timestep_sampling": "uniform",
        "t5xxl_max_token_length": T5_LENGTH,
    }

    def __init__(self, name: str) -> None:
        version = VERSIONS[name]
        self.name, self.look = name, version.look
        self.metadata: Mapping[str, str] = {
            "ss_base_model_version": version.reference,
            "ss_network_module": "networks.lora_sd3",
            "modelspec.architecture": f"stable-diffusion-3-{version.reference}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.prediction_type": "epsilon",  # what the reference trainer writes, though it is a flow
        }

    def detect(self, weights: Tensors) -> bool:
        """Say whether single-file weights belong to this version."""
        return version_of(weights) == self.name

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into state dicts of the parts' modules (views)."""
        mmdit = [k[len(MMDIT_PREFIX) :] for k in weights if k.startswith(MMDIT_PREFIX)]
        names = {ours: MMDIT_PREFIX + theirs for ours, theirs in from_authors(mmdit).items()}
        found: dict[str, Tensors] = {DENOISER: Renamed(weights, names), "vae": split_vae(weights)}
        for part, kind in TEXTS.items():
            text = _named(part, weights, _text_prefix(kind))
            if text:
                found[part] = text
        return found

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return the parts under single-file names (views): what `split` takes apart."""
        mmdit = state_dicts[DENOISER]
        names = {MMDIT_PREFIX + new: old for new, old in to_authors(mmdit).items()}
        files: list[Tensors] = [Renamed(mmdit, names)]
        for part, kind in TEXTS.items():
            if part in state_dicts:
                files.append(above(state_dicts[part], _text_prefix(kind)))
        return joined([*files, join_vae(state_dicts["vae"])])

    def from_folder(self, state_dicts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Bring the parts of a diffusers folder to our names: matrices stacked, two halves swapped."""
        found: dict[str, Tensors] = {
            DENOISER: from_diffusers(state_dicts[DENOISER]),
            "vae": vae_from_folder(state_dicts["vae"]),
        }
        return found | {part: _named(part, state_dicts[part], "") for part in TEXTS if part in state_dicts}

    def load(self, state_dicts: Mapping[str, Tensors], tokenizers: Mapping[str, Any]) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""
        own = [part for part in TEXTS if part in state_dicts]
        sd = state_dicts[DENOISER]
        denoiser = built("transformer", TITLE, lambda: build_mmdit(mmdit_config(sd)))
        assign(denoiser, sd, "transformer", TITLE)
        vae = load_vae(
            state_dicts["vae"],
            TITLE,
            scaling_factor=SCALING_FACTOR,
            shift_factor=SHIFT_FACTOR,
            channels=LATENT_CHANNELS,
        )
        texts = {part: _text(part, state_dicts[part], tokenizers[part]) for part in own}
        parts = Parts(denoiser, vae, nn.ModuleDict(texts), {part: tokenizers[part] for part in own})
        check_widths(parts, TITLE)
        return parts

    def latent_shape(self, parts: Parts, height: int, width: int) -> tuple[int, ...]:
        """Return (16, height / 8, width / 8); raises LG-CFG-004 beyond what the model has positions for."""
        check_size(parts, height, width)
        return (cast(Any, parts.denoiser).config.in_channels, height // 8, width // 8)

    def encode_images(self, parts: Parts, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode pixels (B, 3, H, W) in [-1, 1] into mean and std of their latents, float32, unscaled.

        Raises LG-CFG-004 as `latent_shape` does: before the first step, not within it.
        """
        check_size(parts, *pixels.shape[2:])
        return moments_of(parts.vae, pixels)

    def latents(self, moments: Tensors, noise: torch.Tensor) -> torch.Tensor:
        """Draw scaled latents (B, 16, H/8, W/8) from moments with standard normal ``noise``."""
        return scaled_latents(moments, noise, SCALING_FACTOR, SHIFT_FACTOR)

    def decode(self, parts: Parts, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels (B, 3, H, W), about in [-1, 1], float32, for scaled latents."""
        return decoded(parts.vae, latents, SCALING_FACTOR, SHIFT_FACTOR)

    def tokenize(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Texts:
        """Return the token ids of each text encoder that is there; see `tokens_of`."""
        return tokens_of(parts, captions, reading)

    def reading_for(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Reading:
        """Return the reading with as many chunks for CLIP and tokens for T5 as the longest captions need."""
        return longer(parts, captions, reading)

    def room(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Room:
        """Return how long captions are for T5, or for CLIP where T5 is missing; see `room_of`."""
        return room_of(parts, captions, reading)

    def encode_text(self, parts: Parts, tokens: Texts, reading: Reading) -> Texts:
        """Return the conditioning (B, L, W) and its pooled part (B, P)."""
        return conditioning(parts, tokens, reading)

    def cond_shapes(self, parts: Parts, reading: Reading) -> list[tuple[int, ...]]:
        """Return [(L, W), (P,)]."""
        width, pooled = context_widths(parts)
        return [(num_places(parts, reading), width), (pooled,)]

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
        hidden, pooled = (x.to(parts.dtype) for x in cond)
        out = cast(Any, parts.denoiser)(
            hidden_states=noisy.to(parts.dtype),
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            timestep=t,
            return_dict=False,
        )
        return cast(torch.Tensor, out[0])

    def targets(
        self, parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False
    ) -> list[Target]:
        """List the modules that kohya's trainer trains; see `find_sd3_targets`.

        Blocks have neither convolutions nor weights of normalisation.
        """
        return find_sd3_targets(parts, preset)


def check_size(parts: Parts, height: int, width: int) -> None:
    """Raise LG-CFG-004 for an image, in pixels, that is larger than the model's table of positions."""
    longest = cast(Any, parts.denoiser).config.pos_embed_max_size * PATCH
    if max(height, width) > longest:
        raise LoraGraftError(
            "LG-CFG-004",
            f"An image of {width}x{height} pixels is too large for this model.",
            where="resolution",
            why=f"it knows positions up to {longest} pixels a side.",
            fix=f"choose a resolution and buckets of at most {longest} pixels a side",
        )


def _named(part: str, weights: Tensors, prefix: str) -> Tensors:
    """Return a text encoder's weights below ``prefix``, under its module's names; there may be none."""
    if part != T5:
        names = dict(named_by_hf(weights, prefix))
        if part == CLIP_L:  # SD3 takes its pooled state before the projection, where a host may hold anything
            names.pop(PROJECTION, None)
        return Pieced(weights, names)
    text = below(weights, prefix)
    return t5_weights(text) if text else {}


def _text(part: str, sd: Tensors, tokenizer: Any) -> nn.Module:
    if part == T5:
        encoder = load_t5(sd, TITLE)
        check_t5_tokenizer(tokenizer, encoder)
        return encoder
    if part == CLIP_G and PROJECTION not in sd:
        raise unfit("text encoder CLIP-G", TITLE, f"missing: {PROJECTION}")
    return load_clip_text(sd, tokenizer, TITLE, activation=ACTIVATIONS[part])


def _text_prefix(kind: str) -> str:
    return f"text_encoders.{kind}.transformer."
