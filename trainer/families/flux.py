"""Flux.1 (Black Forest Labs 2024): rectified flow, T5 and CLIP's pooled state, a VAE of 16 channels.

dev is told a guidance scale as an input, schnell is not. Kontext is dev in all that training looks at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ..block_weights import Blocks
from ..errors import LoraGraftError
from ..objective import FLUX_MU, Flow, Objective
from ..parts import DENOISER, Parts, Target
from .base import Look, Reading, Room, Tensors, Texts, untold
from .modules.autoencoder import FLUX_SCALE, FLUX_SHIFT, decoded, load_vae, moments_of, scaled_latents
from .modules.building import assign, built, unfit
from .modules.flux_blocks import PATCH, FluxTransformer, flux_config
from .names import flux_keys
from .names.ldm_keys import UNET_PREFIX
from .names.ldm_vae import join_vae, split_vae, vae_from_folder
from .names.prefixes import above, below
from .names.vae_prefix import with_ldm_prefix, with_newer_prefix
from .sources.weights import joined
from .targets.flux_targets import find_flux_targets
from .text.clip_text import clip_tokens, load_clip_text, text_width
from .text.t5_text import check_t5_tokenizer, encode_t5, load_t5, t5_longest, t5_room, t5_tokens, t5_weights

TITLE = "Flux.1"
CLIP_LENGTH = "of CLIP, Flux sees only the pooled state; t5xxl_max_token_length is T5's"
LATENT_CHANNELS = 16
CLIP, T5 = "text_encoder", "text_encoder_2"
DOUBLE, SINGLE = "double_blocks.0.", "single_blocks.0."
# What Flux.1's transformer has and its descendants have not: modulations of each block, and CLIP's state.
OWN = tuple(
    f"{UNET_PREFIX}{name}.weight"
    for name in ("img_in", "txt_in", "vector_in.in_layer", f"{DOUBLE}img_mod.lin", f"{SINGLE}linear1")
)
GUIDANCE = UNET_PREFIX + "guidance_in.in_layer.weight"
BLOCK_WEIGHTS = "Flux has no down, middle and up blocks; network_reg_lrs sets the rates of single blocks"
BLOCK_DIMS = "Flux has no down, middle and up blocks; network_reg_dims sets the ranks of single blocks"


@dataclass(frozen=True)
class Version:
    """One of the released models: how long its captions are, how it is drawn and usually trained."""

    reference: str
    t5_length: int
    look: Look
    objective: Flow
    ignored: Mapping[str, str]
    defaults: Mapping[str, Any]


SHIFTED: Mapping[str, Any] = {  # what the reference trainer's documentation advises
    "timestep_sampling": "shift",
    "discrete_flow_shift": 3.1582,
    "model_prediction_type": "raw",
}
VERSIONS: Mapping[str, Version] = {
    "flux": Version(
        "dev", 512, Look(20, 1.0, 3.5), Flow(dynamic=FLUX_MU), {}, {**SHIFTED, "guidance_scale": 1.0}
    ),
    "flux_schnell": Version(
        "schnell",
        256,
        Look(4, 1.0),
        Flow(),
        {"guidance_scale": "Flux.1 schnell is not told a guidance scale"},
        SHIFTED,
    ),
}


class Flux:
    """The family of one of `VERSIONS`."""

    latent_multiple = 8 * PATCH
    blocks: Blocks | None = None
    velocity_metadata: Mapping[str, str] = {}
    encoders: Mapping[str, str] = {CLIP: "clip", T5: "t5"}
    optional: tuple[str, ...] = ()
    folders: Mapping[str, str] = {DENOISER: "transformer", "vae": "vae", CLIP: CLIP, T5: T5}
    velocity_of = zero_terminal_of = staticmethod(untold)
    trains_text = True
    uses_sizes = False

    def __init__(self, name: str) -> None:
        version = VERSIONS[name]
        self.name, self.look, self.t5_length = name, version.look, version.t5_length
        self.objective: Objective = version.objective
        self.metadata: Mapping[str, str] = {
            "ss_base_model_version": "flux1",
            "ss_model_type": "flux",
            "ss_network_module": "networks.lora_flux",
            "modelspec.architecture": f"flux-1-{version.reference}/lora",
            "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        }
        self.ignored: Mapping[str, str] = {
            "clip_skip": "of CLIP, Flux sees only the pooled state, which is the last layer's",
            **dict.fromkeys(("max_token_length", "tokenizer_repeats"), CLIP_LENGTH),
            "weighted_captions": "Flux learnt from T5's states as they are",
            "train_embeddings": "Flux reads captions with T5, which has no words of its own to learn",
            "attention": "Flux's blocks compute it with torch's own attention",
            **dict.fromkeys(("down_lr_weight", "mid_lr_weight", "up_lr_weight"), BLOCK_WEIGHTS),
            **dict.fromkeys(("block_dims", "block_alphas"), BLOCK_DIMS),
            **dict.fromkeys(("conv_dim", "conv_block_dims", "conv_block_alphas"), "Flux has no convolutions"),
            **version.ignored,
        }
        self.defaults: Mapping[str, Any] = {
            "text_encoder_lr": 0.0,
            "t5xxl_max_token_length": version.t5_length,
            **version.defaults,
        }

    def detect(self, weights: Tensors) -> bool:
        """Say whether single-file weights belong to this version: dev has layers for its guidance scale."""
        return all(name in weights for name in OWN) and (GUIDANCE in weights) == (self.name == "flux")

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into state dicts of the parts' modules (views)."""
        return {
            DENOISER: flux_keys.split_denoiser(weights),
            "vae": split_vae(with_ldm_prefix(weights)),
            CLIP: flux_keys.split_clip(weights),
            T5: t5_weights(below(weights, flux_keys.T5_PREFIX)),
        }

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return the parts under the names of ComfyUI's checkpoints (views): what `split` takes apart."""
        return joined(
            [
                with_newer_prefix(join_vae(state_dicts["vae"])),
                above(t5_weights(state_dicts[T5]), flux_keys.T5_PREFIX),
                above(state_dicts[CLIP], flux_keys.CLIP_PREFIX),
                flux_keys.join_denoiser(state_dicts[DENOISER]),
            ]
        )

    def from_folder(self, state_dicts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Bring a diffusers folder's parts to our names: matrices stacked, two halves swapped (copies)."""
        return {
            DENOISER: flux_keys.from_diffusers(state_dicts[DENOISER]),
            "vae": vae_from_folder(state_dicts["vae"]),
            CLIP: flux_keys.clip_from_folder(state_dicts[CLIP]),
            T5: t5_weights(state_dicts[T5]),
        }

    def load(self, state_dicts: Mapping[str, Tensors], tokenizers: Mapping[str, Any]) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""
        sd = state_dicts[DENOISER]
        denoiser = built("transformer", TITLE, lambda: _transformer(sd))
        assign(denoiser, sd, "transformer", TITLE)
        vae = load_vae(
            state_dicts["vae"],
            TITLE,
            scaling_factor=FLUX_SCALE,
            shift_factor=FLUX_SHIFT,
            channels=LATENT_CHANNELS,
        )
        clip = load_clip_text(state_dicts[CLIP], tokenizers[CLIP], TITLE)
        t5 = load_t5(state_dicts[T5], TITLE)
        check_t5_tokenizer(tokenizers[T5], t5)
        for what, encoder_width, seen in (
            ("CLIP text encoder", text_width(clip), denoiser.pooled),
            ("T5 text encoder", cast(Any, t5).shared.embedding_dim, denoiser.context),
        ):
            if encoder_width != seen:
                raise unfit(what, TITLE, f"its states are {encoder_width} wide, the transformer reads {seen}")
        return Parts(denoiser, vae, nn.ModuleDict({CLIP: clip, T5: t5}), tokenizers)

    def latent_shape(self, parts: Parts, height: int, width: int) -> tuple[int, ...]:
        """Return (16, height / 8, width / 8)."""
        return (cast(FluxTransformer, parts.denoiser).latent_channels, height // 8, width // 8)

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
        """Return CLIP's token ids (B, 77), T5's (B, L) and their mask (B, L), 0 for padding."""
        (ids,) = clip_tokens(parts.tokenizers[CLIP], captions, Reading(), {})
        return ids[:, 0], *t5_tokens(parts.tokenizers[T5], captions, self._length(reading))

    def reading_for(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Reading:
        """Return the reading with as many of T5's tokens as the longest caption needs; CLIP's is cut."""
        longest = t5_longest(parts.tokenizers[T5], captions)
        return replace(reading, t5_length=max(self._length(reading), longest))

    def room(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Room:
        """Return how long captions are for T5; that CLIP reads less is the model's way.

        T5's padding is seen, and was when the model learnt, unless it is hidden.
        """
        padding = 0 if reading.mask_padding else None
        return t5_room(parts.tokenizers[T5], captions, self._length(reading), padding=padding)

    def encode_text(self, parts: Parts, tokens: Texts, reading: Reading) -> Texts:
        """Return T5's states (B, L, D), CLIP's pooled state (B, P), and the mask (B, L) of hidden padding."""
        clip_ids, ids, mask = tokens
        pooled = parts.text_encoders[CLIP](clip_ids).pooler_output
        if not reading.mask_padding:
            return encode_t5(parts.text_encoders[T5], ids), pooled
        return encode_t5(parts.text_encoders[T5], ids, mask), pooled, mask

    def cond_shapes(self, parts: Parts, reading: Reading) -> list[tuple[int, ...]]:
        """Return [(L, D), (P,)], and (L,) where padding is hidden."""
        length, denoiser = self._length(reading), cast(FluxTransformer, parts.denoiser)
        shapes: list[tuple[int, ...]] = [(length, denoiser.context), (text_width(parts.text_encoder),)]
        return [*shapes, (length,)] if reading.mask_padding else shapes

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
        hidden, pooled, *mask = cond
        scale = self.look.guidance if guidance is None else guidance
        out: torch.Tensor = parts.denoiser(
            noisy.to(parts.dtype),
            t.float(),
            hidden.to(parts.dtype),
            pooled.to(parts.dtype),
            scale or 0.0,
            mask[0] != 0 if mask else None,
        )
        return out

    def targets(
        self, parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False
    ) -> list[Target]:
        """List the modules that kohya's trainer trains, or those of a preset; see `find_flux_targets`."""
        return find_flux_targets(parts, convolutions=convolutions, preset=preset, norms=norms)

    def _length(self, reading: Reading) -> int:
        return reading.t5_length or self.t5_length


def _transformer(sd: Tensors) -> FluxTransformer:
    """Build a transformer for these weights; raises LG-BASE-004 for one that sees more than noisy latents."""
    config = flux_config(sd)
    channels = sd["final_layer.linear.weight"].shape[0]
    if config["channels"] != channels:
        raise LoraGraftError(
            "LG-BASE-004",
            "This base model is a Flux.1 for filling in or for control images, which is not supported.",
            where=f"transformer: {config['channels']} input channels, {channels} output channels",
            why="it sees a second picture beside the noisy one, which a text-to-image run does not have.",
            fix="load Flux.1 dev, Krea, Kontext or schnell",
        )
    return FluxTransformer(**config)
