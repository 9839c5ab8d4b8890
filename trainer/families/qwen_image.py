"""Qwen-Image: two streams, text and image, Qwen2.5-VL as the text encoder, an autoencoder made for video.

Reference: Qwen/Qwen-Image (Wu et al. 2025). The transformer's modules are diffusers' own and named as in its
files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..block_weights import Blocks
from ..errors import LoraGraftError
from ..objective import Objective
from ..objective.flow import Flow, LinearMu
from ..parts import DENOISER, Parts, Target
from .base import Look, Reading, Room, Tensors, Texts, untold, without_clip
from .modules.building import assign, built, count
from .modules.qwen_vae import (
    FACTOR,
    file_names,
    load_qwen_vae,
    normalised,
    vae_names,
    video_decoded,
    video_moments,
)
from .modules.stream_blocks import packed, unpacked
from .names.ldm_keys import UNET_PREFIX, VAE_PREFIX
from .names.prefixes import above, below
from .names.vae_prefix import with_ldm_prefix, with_newer_prefix
from .sources.versions import newer
from .sources.weights import Renamed, joined
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

TITLE = "Qwen-Image"
PATCH, CHANNELS = 2, 64  # of the transformer's input: 16 latent channels of 2x2 places
THETA = 10_000
TEXT, TEXT_PREFIX = "text_encoder", "text_encoders.qwen25_7b.transformer."
TOP = UNET_PREFIX
# What marks transformers that were trained for something else -> what they are.
RELATED = {
    "__index_timestep_zero__": "Qwen-Image-Edit-2511",
    "time_text_embed.addition_t_embedding.weight": "Qwen-Image-Layered",
}
# Layers of the last block of which nothing reaches the image: its text ends there.
UNREAD = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
MODULATION = (".img_mod.1", ".txt_mod.1")  # kohya's trainer leaves them out
WITH_MODULATION = ("full", "full-lin", "unet-only", "everything")
CHAT = Chat(
    before=f"{BEGIN}system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    f"spatial relationships of the objects and background:{END}\n{BEGIN}user\n",
    after=f"{END}\n{BEGIN}assistant\n",
    hidden=True,
    layer=-1,
)


class QwenImage:
    """The family of Qwen-Image; stateless."""

    name = "qwen_image"
    latent_multiple = FACTOR * PATCH
    blocks: Blocks | None = None
    # the published scheduler's numbers
    objective: Objective = Flow(dynamic=LinearMu(top=0.9, top_tokens=8192), terminal=0.02)
    metadata: Mapping[str, str] = {
        "ss_base_model_version": "qwen_image",
        "ss_network_module": "networks.lora_qwen_image",
        "modelspec.architecture": "Qwen-Image/lora",
        "modelspec.implementation": "https://github.com/QwenLM/Qwen-Image",
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
        **without_clip(TITLE, "brackets are text to Qwen2.5-VL"),
        "guidance_scale": "Qwen-Image is not distilled and is told no guidance",
        "apply_t5_attn_mask": "padding is always hidden from Qwen-Image",
        "attention": "padding is hidden by torch's own attention",
        "train_norm": "the layer norms of Qwen-Image's blocks have no weights",
    }
    defaults: Mapping[str, Any] = {
        "timestep_sampling": "shift",
        "discrete_flow_shift": 2.2,
        "t5xxl_max_token_length": CHAT.length,
    }

    def detect(self, weights: Tensors) -> bool:
        """Say whether single-file weights belong to Qwen-Image."""
        needed = ("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight", "img_in.weight")
        return all(TOP + k in weights for k in needed) and weights[TOP + needed[2]].shape[1] == CHANNELS

    def split(self, weights: Tensors) -> dict[str, Tensors]:
        """Sort single-file weights into state dicts of the parts' modules (views)."""
        weights = with_ldm_prefix(weights)
        vae = [k[len(VAE_PREFIX) :] for k in weights if k.startswith(VAE_PREFIX)]
        names = {new: VAE_PREFIX + old for new, old in vae_names(vae).items()}
        return {
            DENOISER: below(weights, TOP),
            "vae": Renamed(weights, names),
            TEXT: qwen_weights(below(weights, TEXT_PREFIX)),
        }

    def join(self, state_dicts: Mapping[str, Tensors]) -> Tensors:
        """Return the parts under single-file names (views), the text encoder without its eyes."""
        vae = state_dicts["vae"]
        return with_newer_prefix(
            joined(
                [
                    Renamed(vae, {VAE_PREFIX + new: old for new, old in file_names(vae).items()}),
                    above(state_dicts[TEXT], TEXT_PREFIX + "model."),
                    above(state_dicts[DENOISER], TOP),
                ]
            )
        )

    def from_folder(self, state_dicts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Bring the parts of a diffusers folder to the modules' names."""
        return {
            DENOISER: state_dicts[DENOISER],
            "vae": state_dicts["vae"],
            TEXT: qwen_weights(state_dicts[TEXT]),
        }

    def load(self, state_dicts: Mapping[str, Tensors], tokenizers: Mapping[str, Any]) -> Parts:
        """Build the modules on the meta device and assign the given tensors to them, without a copy."""
        denoiser = _load_transformer(state_dicts[DENOISER])
        vae = load_qwen_vae(state_dicts["vae"], TITLE)
        text = load_qwen(state_dicts[TEXT], tokenizers[TEXT], TITLE)
        return Parts(denoiser, vae, nn.ModuleDict({TEXT: text}), {TEXT: tokenizers[TEXT]})

    def latent_shape(self, parts: Parts, height: int, width: int) -> tuple[int, ...]:
        """Return (16, height / 8, width / 8)."""
        return (cast(Any, parts.vae).config.z_dim, height // FACTOR, width // FACTOR)

    def encode_images(self, parts: Parts, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode pixels (B, 3, H, W) in [-1, 1] into mean and std of their latents, float32, unscaled."""
        return video_moments(parts.vae, pixels)

    def latents(self, moments: Tensors, noise: torch.Tensor) -> torch.Tensor:
        """Draw scaled latents (B, 16, H/8, W/8) from moments with standard normal ``noise``."""
        return normalised(moments, noise)

    def decode(self, parts: Parts, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels (B, 3, H, W), in [-1, 1], float32, for scaled latents."""
        return video_decoded(parts.vae, latents)

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
        return velocity(parts.denoiser, noisy.to(parts.dtype), t, text.to(parts.dtype), mask.bool())

    def targets(
        self, parts: Parts, *, convolutions: bool, preset: str = "", norms: bool = False
    ) -> list[Target]:
        """List the layers that kohya's trainer trains, or those of a preset; see `find_block_targets`.

        Without those of the last block that nothing reads.
        """
        first = cast(Any, parts.denoiser).transformer_blocks[0]
        found = find_block_targets(
            parts,
            (type(first),),
            (type(first.attn),),
            family=TITLE,
            convolutions=convolutions,
            preset=preset,
            norms=norms,
        )
        last = f"transformer_blocks.{len(cast(Any, parts.denoiser).transformer_blocks) - 1}."
        left_out = tuple(last + layer for layer in UNREAD)
        if preset not in WITH_MODULATION:
            left_out += MODULATION
        return [target for target in found if not target.path.endswith(left_out)]


def velocity(
    model: Any, noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return noise - image (B, C, h, w) of noisy latents of that shape.

    What diffusers' forward does, but that t (B,), float32 in [0, 1000], is not rounded to the latents' dtype;
    ComfyUI does not round it either. text: (B, L, D); mask: (B, L) bool, True where a place is seen.
    """
    height, width = noisy.shape[2:]
    image = model.img_in(packed(noisy, PATCH))
    text = model.txt_in(model.txt_norm(text))
    time = model.time_text_embed(t / 1000, image)
    size = [[(1, height // PATCH, width // PATCH)]]
    rope = model.pos_embed(size, device=image.device, max_txt_seq_len=text.shape[1])
    for block in model.transformer_blocks:
        text, image = block(image, text, mask, time, rope)
    return unpacked(model.proj_out(model.norm_out(image, time)), PATCH, height, width)


def transformer_config(sd: Tensors) -> dict[str, Any]:
    """Read the transformer's shape from its weights; raises LG-BASE-004 for a relative of Qwen-Image."""
    for name, relative in RELATED.items():
        if name in sd:
            raise LoraGraftError(
                "LG-BASE-004",
                f"This base model is {relative}, which is not supported.",
                where=f"transformer: {name}",
                why="it is made to change pictures that it is shown, and training shows it none.",
                fix="load Qwen-Image itself",
            )
    head = sd["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    width, channels = sd["img_in.weight"].shape
    return {
        "patch_size": PATCH,
        "in_channels": channels,
        "out_channels": sd["proj_out.weight"].shape[0] // PATCH**2,
        "num_layers": count(sd, r"transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": sd["txt_in.weight"].shape[1],
        "axes_dims_rope": (head // 8, 7 * head // 16, 7 * head // 16),  # 16, 56 and 56 of 128
    }


def _load_transformer(sd: Tensors) -> nn.Module:
    module = "diffusers.models.transformers.transformer_qwenimage"
    # The release that brought this function is the first whose attention hides padding.
    newer(module, "compute_text_seq_len_from_mask", family=TITLE, since="0.37")
    model_class = newer(module, "QwenImageTransformer2DModel", family=TITLE, since="0.37")
    rope_class = newer(module, "QwenEmbedRope", family=TITLE, since="0.37")
    config = transformer_config(sd)
    model: Any = built("transformer", TITLE, lambda: cast(nn.Module, model_class(**config)))
    assign(model, sd, "transformer", TITLE)
    # Its tables are no buffers, so they were made on the meta device.
    model.pos_embed = rope_class(theta=THETA, axes_dim=list(config["axes_dims_rope"]), scale_rope=True)
    return cast(nn.Module, model)
