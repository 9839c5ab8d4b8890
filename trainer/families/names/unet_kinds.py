"""Which of Stable Diffusion's U-Nets single-file weights hold, and which relatives are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import LoraGraftError
from ..base import Tensors
from .ldm_keys import UNET_PREFIX

HEAD_DIM = 64  # of every attention in SD2.x and SDXL


def heads_of(width: int) -> int:
    """Return the number of heads of SD2.x's and SDXL's attention at a width."""
    return max(1, width // HEAD_DIM)


def unet_kind(weights: Tensors) -> str | None:
    """Tell "sd15", "sd2" or "sdxl" by the U-Net of single-file weights; None where there is no such U-Net.

    SDXL embeds labels (pooled text and sizes); SD2.x has linear layers where SD1.x has 1x1 convolutions.
    """
    if UNET_PREFIX + "input_blocks.0.0.weight" not in weights:
        return None
    if UNET_PREFIX + "label_emb.0.0.weight" in weights:
        return "sdxl"
    projection = _one(weights, ".1.proj_in.weight")
    if projection is None:
        return None
    return "sd15" if weights[projection].ndim == 4 else "sd2"


@dataclass(frozen=True)
class _Facts:
    """What tells a U-Net's relatives apart: input channels, widths of context and label embedding, names."""

    channels: int
    context: int
    label: int
    names: Tensors

    def has(self, part: str) -> bool:
        return any(part in name for name in self.names)


# A relative's name, and what it is known by. The numbers are those of the published models.
RELATIVES: tuple[tuple[str, Callable[[_Facts], bool]], ...] = (
    ("Stable Video Diffusion", lambda f: f.has(".time_stack.")),
    ("Playground v2.5 (EDM)", lambda f: "edm_mean" in f.names),
    ("CosXL (EDM)", lambda f: "edm_vpred.sigma_max" in f.names),
    ("an inpainting model", lambda f: f.channels == 9),
    ("an editing model (InstructPix2Pix)", lambda f: f.channels == 8),
    ("the x4 upscaler", lambda f: f.channels == 7),
    ("a depth model", lambda f: f.channels == 5),
    ("a model with more than latents as input", lambda f: f.channels != 4),
    ("SDXL's refiner", lambda f: f.context == 1280 and f.label == 2560),
    ("an unCLIP model", lambda f: f.context == 1024 and f.label in (1536, 2048)),
)


def refuse_relatives(weights: Tensors, title: str) -> None:
    """Raise LG-BASE-004 for weights of a relative of ``title``'s U-Net that takes other inputs.

    Takes single-file weights, or a U-Net's with diffusers' names.
    """
    first, context, label = (
        _one(weights, "input_blocks.0.0.weight", "conv_in.weight"),
        _one(weights, ".attn2.to_k.weight"),
        _one(weights, "label_emb.0.0.weight", "add_embedding.linear_1.weight"),
    )
    channels = weights[first].shape[1] if first else 4
    facts = _Facts(
        channels,
        weights[context].shape[1] if context else 0,
        weights[label].shape[1] if label else 0,
        weights,
    )
    for name, fits in RELATIVES:
        if fits(facts):
            raise LoraGraftError(
                "LG-BASE-004",
                f"This base model is {name}, which is not supported.",
                where=f"U-Net: context width {facts.context}, {channels} input channels",
                why=f"of {title}, text-to-image models are trained; this one takes other inputs.",
                fix=f"load a text-to-image checkpoint of {title}",
            )


def _one(weights: Tensors, *endings: str) -> str | None:
    """Return the first name of a denoiser's tensor that ends so."""
    for name in weights:
        if name.endswith(endings) and not name.startswith(("first_stage_model.", "cond", "text_enc")):
            return name
    return None
