"""Z-Image: one stream of text and image, Qwen3 as the text encoder, Flux.1's autoencoder.

Reference: Tongyi-MAI/Z-Image (Cai et al. 2025), base and Turbo, which weights do not tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..block_weights import Blocks
from ..errors import LoraGraftError
from ..objective import Objective
from ..objective.flow import Flow
from ..parts import DENOISER, Parts, Target
from .base import Look, Reading, Room, Tensors, Texts, untold, without_clip
from .modules.autoencoder import FLUX_SCALE, FLUX_SHIFT, decoded, load_vae, moments_of, scaled_latents
from .modules.building import assign, built
from .modules.z_image_model import PATCH, Attention, Block, ZImageTransformer, z_image_config
from .names.ldm_keys import UNET_PREFIX
from .names.ldm_vae import join_vae, split_vae, vae_from_folder
from .names.pieces import Pieced, Recipe, stacked
from .names.prefixes import above, below
from .names.vae_prefix import with_ldm_prefix, with_newer_prefix
from .sources.weights import joined
from .targets.block_targets import find_block_targets
from .text.qwen_text import (
    BEGIN,
    END,
    Chat,
    chat_room,
    chat_shapes,
    chat_tokens,
    encode_chat,
    load_qwen,
    long_enough,
    qwen_weights,
)

TITLE = "Z-Image"
LATENT_CHANNELS = 16
SAMPLING_SHIFT = 3.0  # of the noise levels when images are drawn; training's is a setting
TEXT, TEXT_PREFIX = "text_encoder", "text_encoders.qwen3_4b.transformer."
TOP = UNET_PREFIX
UNUSED = ("norm_final.weight",)  # in some files, read by nobody
# What marks transformers that take something else -> what they are.
RELATED = {"siglip_embedder.0.weight": "Z-Image-Omni", "dec_net.cond_embed.weight": "Z-Image in pixel space"}
# diffusers' names of a block's attention and of what lies outside the blocks, and the files'
FROM_DIFFUSERS = (
    ("all_x_embedder.2-1.", "x_embedder."),
    ("all_final_layer.2-1.", "final_layer."),
    (".attention.to_out.0.", ".attention.out."),
    (".attention.norm_q.", ".attention.q_norm."),
    (".attention.norm_k.", ".attention.k_norm."),
)
MODULATION = ".adaLN_modulation."
WITH_ALL = ("full", "full-lin", "unet-only", "everything")  # with modulations, and the refiners too
CHAT = Chat(before=f"{BEGIN}user\n", after=f"{END}\n{BEGIN}assistant\n", hidden=False, layer=-2)


class ZImage:
    """The family of Z-Image; stateless."""

    name = "z_image"
    latent_multiple = 8 * PATCH
    blocks: Blocks | None = None
    objective: Objective = Flow(shift=SAMPLING_SHIFT)
    metadata: Mapping[str, str] = {
        "ss_base_model_version": "z_image",
        "ss_network_module": "networks.lora_zimage",
        "modelspec.architecture": "Z-Image/lora",
        "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
    }
    velocity_metadata: Mapping[str, str] = {}
    encoders: Mapping[str, str] = {TEXT: "qwen"}
    optional: tuple[str, ...] = ()
    folders: Mapping[str, str] = {DENOISER: "transformer", "vae": "vae", TEXT: "text_encoder"}
    velocity_of = zero_terminal_of = staticmethod(untold)
    trains_text = False
    uses_sizes = False
    look = Look(28, 4.0)  # the base's; Turbo draws in 8 steps without a negative prompt
    ignored: Mapping[str, str] = {
        **without_clip(TITLE, "brackets are text to Qwen3"),
        "guidance_scale": "Z-Image is told no guidance",
        "apply_t5_attn_mask": "padding is always hidden from Z-Image, but for its own padding tokens",
        "attention": "padding is hidden by torch's own attention",
    }
    defaults: Mapping[str, Any] = {
        "timestep_sampling": "shift",
        "discrete_flow_shift": 2.0,
        "t5xxl_max_token_length": CHAT.length,
    }

    def detect(self, weights: Tensors) -> bool:
        """Say whether single-file weights belong to Z-Image; Lumina 2 has a SiLU in its modulation."""
        needed = ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight")
        return all(TOP + k in weights for k in (*needed, "layers.0.adaLN_modulation.0.weight"))

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into state dicts of the parts' modules (views)."""
        weights = with_ldm_prefix(weights)
        return {
            DENOISER: below(weights, TOP, but=UNUSED),
            "vae": split_vae(weights),
            TEXT: qwen_weights(below(weights, TEXT_PREFIX)),
        }

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return the parts under single-file names (views): what `split` takes apart."""
        vae = join_vae(state_dicts["vae"])
        text = above(state_dicts[TEXT], TEXT_PREFIX + "model.")
        return with_newer_prefix(joined([vae, text, above(state_dicts[DENOISER], TOP)]))

    def from_folder(self, state_dicts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Bring the parts of a diffusers folder to the modules' names: query, key and value become one."""
        return {
            DENOISER: transformer_from_diffusers(state_dicts[DENOISER]),
            "vae": vae_from_folder(state_dicts["vae"]),
            TEXT: qwen_weights(state_dicts[TEXT]),
        }

    def load(self, state_dicts: Mapping[str, Tensors], tokenizers: Mapping[str, Any]) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""
        sd = state_dicts[DENOISER]
        _refuse_relatives(sd)
        denoiser = built("transformer", TITLE, lambda: ZImageTransformer(**z_image_config(sd)))
        assign(denoiser, sd, "transformer", TITLE)
        vae = load_vae(
            state_dicts["vae"],
            TITLE,
            scaling_factor=FLUX_SCALE,
            shift_factor=FLUX_SHIFT,
            channels=LATENT_CHANNELS,
        )
        text = load_qwen(state_dicts[TEXT], tokenizers[TEXT], TITLE)
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
        """Return token ids of the chat around each caption, and which places count; see `chat_tokens`."""
        return chat_tokens(parts.tokenizer, captions, reading, CHAT)

    def reading_for(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Reading:
        """Return the reading with the places that the longest caption needs, up to the most of all."""
        return long_enough(parts.tokenizer, captions, reading, CHAT)

    def room(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Room:
        """Return how long captions are with what stands around them, and how much is read."""
        return chat_room(parts.tokenizer, captions, reading, CHAT)

    def encode_text(self, parts: Parts, tokens: Texts, reading: Reading) -> Texts:
        """Return the text encoder's states (B, L, D), and 1 for the places (B, L) of the caption, else 0."""
        return encode_chat(parts.text_encoder, tokens, CHAT)

    def cond_shapes(self, parts: Parts, reading: Reading) -> list[tuple[int, ...]]:
        """Return [(L, D), (L,)]."""
        return chat_shapes(parts.text_encoder, reading, CHAT)

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
        text, mask = cond
        out = parts.denoiser(noisy.to(parts.dtype), t, text.to(parts.dtype), mask.bool())
        return cast(torch.Tensor, out)

    def targets(
        self, parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False
    ) -> list[Target]:
        """List the attention and feed-forward layers, as kohya's trainer does, or those of a preset.

        The refiners and the modulations are left to the presets that name all layers; see
        `find_block_targets`.
        """
        found = find_block_targets(
            parts,
            (Block,),
            (Attention,),
            family=TITLE,
            convolutions=convolutions,
            preset=preset,
            norms=norms,
        )
        if preset in WITH_ALL:
            return found
        return [t for t in found if t.path.startswith("layers.") and MODULATION not in t.path]


def transformer_from_diffusers(folder: Tensors) -> Tensors:
    """Bring diffusers' transformer to the modules' names; query, key and value are stacked, a copy."""
    recipes: dict[str, Recipe] = {}
    for name in folder:
        stem, is_query, end = name.partition(".attention.to_q.")
        if is_query:
            recipes[f"{stem}.attention.qkv.{end}"] = stacked(
                *(f"{stem}.attention.to_{x}.{end}" for x in "qkv")
            )
        elif ".attention.to_k." not in name and ".attention.to_v." not in name:
            ours = name
            for theirs, files in FROM_DIFFUSERS:
                ours = ours.replace(theirs, files)
            recipes[ours] = name
    return Pieced(folder, recipes)


def _refuse_relatives(sd: Tensors) -> None:
    for name, relative in RELATED.items():
        if name in sd:
            raise LoraGraftError(
                "LG-BASE-004",
                f"This base model is {relative}, which is not supported.",
                where=f"transformer: {name}",
                why="it takes something else than a caption and Flux.1's latents.",
                fix="load Z-Image or Z-Image-Turbo",
            )
