"""Stable Diffusion 2.x: SD1.x's U-Net with wider attention, OpenCLIP-H as text encoder, noise or velocity.

The text encoder is read at its last layer but one, behind the final normalisation: the last layer of a
single file is left out, as diffusers' folders leave it out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..block_weights import SD1, Blocks
from ..objective import NoiseSchedule, Objective
from ..parts import Parts, Target
from .base import Look, Reading, Room, Tensors, Texts, untold
from .modules.autoencoder import decoded, load_vae, moments_of, scaled_latents
from .modules.building import assign, built, count
from .modules.unet import block_of, check_context, predict_unet, unet_config
from .names.ldm_keys import UNET_PREFIX, unet_to_diffusers, unet_to_ldm
from .names.ldm_vae import join_vae, split_vae, vae_from_folder
from .names.pieces import Pieced, Recipe
from .names.unet_kinds import heads_of, refuse_relatives, unet_kind
from .sources.weights import Renamed, joined
from .targets.targets import find_targets
from .text import clip_text
from .text.clip_tokens import CHUNK
from .text.emphasis import emphasise
from .text.openclip import HF_LAYER, HF_PROJECTION, from_hf, named_by_hf, to_hf, without

SCALING_FACTOR = 0.18215
TITLE = "SD2.x"
HF_TEXT = "text_encoders.clip_h.transformer."
# Where its authors keep the text encoder, and where SDXL's authors do.
OPENCLIP_TEXTS = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
PAD = 0  # OpenCLIP's padding: the token of "!"
CUT_LAYERS = 23  # an encoder of so many layers has lost its last one already
LAYER = r"text_model\.encoder\.layers\.(\d+)\."
# ComfyUI's rule: the spread of this bias, in the last attention block, of models that predict velocity.
VELOCITY_BIAS = re.compile(
    re.escape(UNET_PREFIX) + r"output_blocks\.(\d+)\.1\.transformer_blocks\.0\.norm1\.bias"
)
VELOCITY_SPREAD = 0.09
PROJECTION = re.compile(r"\.proj_(in|out)\.weight$")


class SD2:
    """The SD2.x family; stateless."""

    name = "sd2"
    latent_multiple = 8
    blocks: Blocks | None = SD1
    objective: Objective = NoiseSchedule()
    metadata: Mapping[str, str] = {
        "ss_base_model_version": "sd_v2",
        "ss_v2": "True",
        "modelspec.architecture": "stable-diffusion-v2-512/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
    }
    velocity_metadata: Mapping[str, str] = {
        "ss_base_model_version": "sd_v2_v",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
    }
    encoders: Mapping[str, str] = {"text_encoder": "clip"}
    optional: tuple[str, ...] = ()
    folders: Mapping[str, str] = {"denoiser": "unet", "vae": "vae", "text_encoder": "text_encoder"}
    zero_terminal_of = staticmethod(untold)
    trains_text = True
    uses_sizes = False
    look = Look(20, 7.0)
    ignored: Mapping[str, str] = {}
    defaults: Mapping[str, Any] = {}

    def detect(self, weights: Tensors) -> bool:
        """Say whether single-file weights belong to SD2.x."""
        return unet_kind(weights) == "sd2"

    def velocity_of(self, weights: Tensors) -> bool | None:
        """See `Family`: by the spread of a bias, as ComfyUI tells it; those for 768 pixels do."""
        found = [(int(m[1]), k) for k in weights if (m := VELOCITY_BIAS.fullmatch(k))]
        if not found:
            return None
        bias = weights[max(found)[1]].detach().float()
        return bool(bias.std(unbiased=False) > VELOCITY_SPREAD)

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into the three parts (views); raises LG-BASE-004 for SD2.x's relatives."""
        refuse_relatives(weights, TITLE)
        unet = [k[len(UNET_PREFIX) :] for k in weights if k.startswith(UNET_PREFIX)]
        names = {new: UNET_PREFIX + old for new, old in unet_to_diffusers(unet).items()}
        text = named_by_hf(weights, HF_TEXT)
        for prefix in OPENCLIP_TEXTS:
            text = text or to_hf(weights, prefix)
        return {
            "denoiser": Renamed(weights, names, kernels=_matrices(weights, names)),
            "vae": split_vae(weights),
            "text_encoder": Pieced(weights, _used(text)),
        }

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return a single file's weights, with OpenCLIP's names: what `split` takes apart.

        The text encoder's last layer is the one before once more: readers ask for one, none computes with it.
        """
        unet, text = state_dicts["denoiser"], state_dicts["text_encoder"]
        names = {UNET_PREFIX + new: old for new, old in unet_to_ldm(unet).items()}
        recipes = from_hf(text)
        last = count(text, LAYER)
        copied, before = (f"transformer.resblocks.{i}." for i in (last, last - 1))
        recipes |= {copied + k[len(before) :]: recipes[k] for k in list(recipes) if k.startswith(before)}
        return joined(
            [
                join_vae(state_dicts["vae"]),
                Pieced(text, {OPENCLIP_TEXTS[0] + k: recipe for k, recipe in recipes.items()}),
                Renamed(unet, names, matrices=_kernels(unet, names)),
            ]
        )

    def from_folder(self, state_dicts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Bring the parts of a diffusers folder to today's names, and its projections to kernels."""
        unet, text = state_dicts["denoiser"], state_dicts["text_encoder"]
        refuse_relatives(unet, TITLE)
        names = {k: k for k in unet}
        return {
            "denoiser": Renamed(unet, names, kernels=_matrices(unet, names)),
            "vae": vae_from_folder(state_dicts["vae"]),
            "text_encoder": Pieced(text, without(named_by_hf(text), HF_PROJECTION)),
        }

    def load(self, state_dicts: Mapping[str, Tensors], tokenizers: Mapping[str, Any]) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""
        from diffusers import UNet2DConditionModel

        unet_sd, text_sd = state_dicts["denoiser"], state_dicts["text_encoder"]
        unet = built("U-Net", TITLE, lambda: UNet2DConditionModel(**unet_config(unet_sd, heads=heads_of)))
        vae = load_vae(state_dicts["vae"], TITLE, scaling_factor=SCALING_FACTOR)
        text = clip_text.load_clip_text(text_sd, tokenizers["text_encoder"], TITLE, activation="gelu")
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
        return clip_text.clip_tokens(parts.tokenizer, captions, reading, parts.words, pad=PAD)

    def reading_for(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Reading:
        """Return the reading with as many chunks as the longest caption needs."""
        return clip_text.long_enough(parts.tokenizer, captions, reading, parts.words)

    def room(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Room:
        """Return how long captions are for CLIP, and how much it reads; see `clip_room`."""
        return clip_text.clip_room(parts.tokenizer, captions, reading, parts.words)

    def encode_text(self, parts: Parts, tokens: Texts, reading: Reading) -> Texts:
        """Return the conditioning (B, chunks*75+2, D); clip_skip counts from the last layer that is used."""
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


def _used(text: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Leave out what is not computed with: the projection, and the last layer where it is there."""
    last = count(text, LAYER)
    if last == CUT_LAYERS:
        return without(text, HF_PROJECTION)
    unused = (k for k in text if (m := HF_LAYER.fullmatch(k)) and int(m[1]) == last - 1)
    return without(text, HF_PROJECTION, *unused)


def _matrices(weights: Tensors, names: Mapping[str, str]) -> frozenset[str]:
    """Return which projections of attentions are matrices; the reference trains them as 1x1 convolutions."""
    return frozenset(n for n, old in names.items() if PROJECTION.search(n) and weights[old].ndim == 2)


def _kernels(unet: Tensors, names: Mapping[str, str]) -> frozenset[str]:
    """Return which of a single file's weights are matrices that are 1x1 convolutions here."""
    return frozenset(n for n, old in names.items() if PROJECTION.search(n) and unet[old].ndim == 4)
