"""FLUX.2 klein, 4B and 9B: Qwen3 as text encoder, and an autoencoder of 16 pixels a side."""

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
from .modules.building import assign, built, count
from .modules.flux2_model import Flux2Transformer, flux2_config
from .modules.flux2_vae import flux2_decoded, flux2_moments, load_flux2_vae
from .modules.stream_blocks import DoubleBlock, SelfAttention, SingleBlock
from .names.flux2_keys import flux2_from_diffusers, join_flux2_vae, split_flux2_vae, without_counter
from .names.flux_keys import join_denoiser, split_denoiser
from .names.ldm_keys import UNET_PREFIX
from .names.ldm_vae import vae_from_folder
from .names.prefixes import above, below
from .names.vae_prefix import with_ldm_prefix, with_newer_prefix
from .sources.weights import joined
from .targets.block_targets import find_block_targets
from .text.flux2_text import CHAT, LAYERS, encode_klein, klein_reading, klein_room, klein_shapes, klein_tokens
from .text.qwen_text import load_qwen, qwen_weights

TITLE = "FLUX.2 klein"
PIXELS = 16  # a side of a token
TEXT = "text_encoder"
WIDE = 4096  # the width of Qwen3 8B's states; 4B's are 2560 wide
TEXT_PREFIXES = ("text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_8b.transformer.")
SHARED, GUIDANCE = "double_stream_modulation_img.lin.weight", "guidance_in.in_layer.weight"


def empirical_mu(tokens: int, steps: int) -> float:
    """Return the logarithm of the shift that FLUX.2's authors fitted for sampling.

    Between 10 and 200 steps it goes in a line from the one number to the other, both linear in the tokens;
    for more than 4300 tokens it is that of 200 steps.
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return many + (many - few) * (steps - 200) / 190


class Flux2Klein:
    """The family of FLUX.2 klein, base and distilled; stateless."""

    name = "flux2"
    latent_multiple = PIXELS
    blocks: Blocks | None = None
    objective: Objective = Flow(dynamic=empirical_mu)
    metadata: Mapping[str, str] = {
        "ss_base_model_version": "flux2",
        "ss_network_module": "networks.lora_flux_2",
        "modelspec.architecture": "flux-2-klein/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
    }
    velocity_metadata: Mapping[str, str] = {}
    encoders: Mapping[str, str] = {TEXT: "qwen"}
    optional: tuple[str, ...] = ()
    folders: Mapping[str, str] = {DENOISER: "transformer", "vae": "vae", TEXT: "text_encoder"}
    velocity_of = zero_terminal_of = staticmethod(untold)
    trains_text = False
    uses_sizes = False
    look = Look(50, 4.0)
    ignored: Mapping[str, str] = {
        **without_clip("FLUX.2", "brackets are text to Qwen3"),
        "guidance_scale": "FLUX.2 klein is told no guidance",
        "apply_t5_attn_mask": "FLUX.2 learnt with the padding behind a text in view",
        "attention": "FLUX.2's blocks take torch's own attention",
    }
    defaults: Mapping[str, Any] = {
        "timestep_sampling": "flux_shift",
        "discrete_flow_shift": 1.0,
        "t5xxl_max_token_length": CHAT.length,
    }

    def detect(self, weights: Tensors) -> bool:
        """Say whether single-file weights belong to FLUX.2 klein; dev, which is told a guidance, does not."""
        return UNET_PREFIX + SHARED in weights and UNET_PREFIX + GUIDANCE not in weights

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into state dicts of the parts' modules (views)."""
        prefix = next((p for p in TEXT_PREFIXES if any(k.startswith(p) for k in weights)), TEXT_PREFIXES[0])
        return {
            DENOISER: split_denoiser(weights),
            "vae": split_flux2_vae(with_ldm_prefix(weights)),
            TEXT: qwen_weights(below(weights, prefix)),
        }

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return the parts under single-file names (views): what `split` takes apart."""
        text = state_dicts[TEXT]
        prefix = TEXT_PREFIXES[text["norm.weight"].shape[0] >= WIDE]
        return joined(
            [
                with_newer_prefix(join_flux2_vae(state_dicts["vae"])),
                above(text, prefix + "model."),
                join_denoiser(state_dicts[DENOISER]),
            ]
        )

    def from_folder(self, state_dicts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Bring the parts of a diffusers folder to the modules' names: query, key and value become one."""
        return {
            DENOISER: flux2_from_diffusers(state_dicts[DENOISER]),
            "vae": vae_from_folder(without_counter(state_dicts["vae"])),
            TEXT: qwen_weights(state_dicts[TEXT]),
        }

    def load(self, state_dicts: Mapping[str, Tensors], tokenizers: Mapping[str, Any]) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""
        sd = state_dicts[DENOISER]
        denoiser = built("transformer", TITLE, lambda: Flux2Transformer(**flux2_config(sd)))
        assign(denoiser, sd, "transformer", TITLE)
        vae = load_flux2_vae(state_dicts["vae"], TITLE)
        text = load_qwen(state_dicts[TEXT], tokenizers[TEXT], TITLE)
        _check_fit(sd, state_dicts[TEXT])
        return Parts(denoiser, vae, nn.ModuleDict({TEXT: text}), {TEXT: tokenizers[TEXT]})

    def latent_shape(self, parts: Parts, height: int, width: int) -> tuple[int, ...]:
        """Return (128, height / 16, width / 16)."""
        return (cast(Any, parts.vae).bn.running_mean.shape[0], height // PIXELS, width // PIXELS)

    def encode_images(self, parts: Parts, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode pixels (B, 3, H, W) in [-1, 1] into mean and std of packed latents, float32, scaled."""
        return flux2_moments(parts.vae, pixels)

    def latents(self, moments: Tensors, noise: torch.Tensor) -> torch.Tensor:
        """Draw latents (B, 128, H/16, W/16) from moments with standard normal ``noise``."""
        return moments["mean"] + moments["std"] * noise

    def decode(self, parts: Parts, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels (B, 3, H, W), about in [-1, 1], float32, for packed latents."""
        return flux2_decoded(parts.vae, latents)

    def tokenize(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Texts:
        """Return token ids (B, L) and 1 where one is no padding, both int64."""
        return klein_tokens(parts.tokenizer, captions, reading)

    def reading_for(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Reading:
        """Return the reading with the model's own length, or with more for a caption that it would cut."""
        return klein_reading(parts.tokenizer, captions, reading)

    def room(self, parts: Parts, captions: Sequence[str], reading: Reading) -> Room:
        """Return how long captions are with what stands around them, and how much is read."""
        return klein_room(parts.tokenizer, captions, reading)

    def encode_text(self, parts: Parts, tokens: Texts, reading: Reading) -> Texts:
        """Return Qwen3's states (B, L, 3 D)."""
        return encode_klein(parts.text_encoder, tokens)

    def cond_shapes(self, parts: Parts, reading: Reading) -> list[tuple[int, ...]]:
        """Return [(L, 3 D)]."""
        return klein_shapes(parts.text_encoder, reading)

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
        return cast(torch.Tensor, parts.denoiser(noisy.to(parts.dtype), t, cond[0].to(parts.dtype)))

    def targets(
        self, parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False
    ) -> list[Target]:
        """List the blocks' layers, or those of a preset; see `find_block_targets`."""
        return find_block_targets(
            parts,
            (DoubleBlock, SingleBlock),
            (SelfAttention, SingleBlock),
            family=TITLE,
            convolutions=convolutions,
            preset=preset,
            norms=norms,
        )


def _check_fit(transformer: Tensors, text: Tensors) -> None:
    """Raise LG-BASE-003 for a text encoder of another size than the transformer reads, or too few layers."""
    wide, narrow = transformer["txt_in.weight"].shape[1], text["norm.weight"].shape[0]
    layers = count(text, r"layers\.(\d+)\.")
    if wide != len(LAYERS) * narrow or layers < LAYERS[-1]:
        raise LoraGraftError(
            "LG-BASE-003",
            f"The text encoder is not the one of this {TITLE}.",
            where=f"text encoder: {layers} layers of width {narrow}; transformer: text of width {wide}",
            why=f"the transformer reads three layers, {', '.join(map(str, LAYERS))}, side by side.",
            fix="take Qwen3 4B with FLUX.2 klein 4B, and Qwen3 8B with FLUX.2 klein 9B",
        )
