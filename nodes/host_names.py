"""What MODEL, CLIP and VAE are made of: which family ComfyUI takes them for, their text encoders, tokenizers.

The trainer tells a family by its weights. Here stands what weights cannot tell, a line a family: which of
ComfyUI's classes sample it as it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.sd1_clip
import comfy.supported_models

from ..trainer.errors import LoraGraftError
from ..trainer.families.text.sentence_pieces import keep_pieces

KL = ("encoder.conv_in.weight", "decoder.conv_in.weight")


@dataclass(frozen=True)
class Known:
    """A family as ComfyUI's classes have it.

    ``config`` and ``model`` name classes of comfy.supported_models and comfy.model_base, the second exactly:
    one derived from it takes other inputs. ``texts`` are the text encoders' names on its CLIP, each of which
    may be missing where ``optional``; ``inputs`` and ``channels`` the denoiser's and the latents' channels;
    ``vae`` tensors that its VAE has. ``layer`` is the text encoder's, counted from its end, that clip_skip 1
    means; 0 where clip_skip means nothing. ``told`` are what its configuration says, where relatives differ.
    """

    title: str
    config: str
    model: str
    texts: tuple[str, ...]
    inputs: int
    channels: int
    vae: tuple[str, ...] = KL
    optional: bool = False
    flow: bool = True
    layer: int = 0
    told: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, model: Any) -> bool:
        """Say whether a MODEL is of these classes."""
        config = getattr(comfy.supported_models, self.config, None)
        inner = getattr(comfy.model_base, self.model, None)
        if config is None or inner is None:  # a ComfyUI from before this family
            return False
        own = model.model.model_config
        is_own = type(model.model) is inner and isinstance(own, config)
        return is_own and all(own.unet_config.get(k) == v for k, v in self.told.items())


CAUSAL = ("encoder.conv1.weight", "decoder.conv1.weight")
WITH_QUANT = (*KL, "post_quant_conv.weight")
SD15 = Known("SD1.x", "SD15", "BaseModel", ("clip_l",), 4, 4, WITH_QUANT, flow=False, layer=1)
KNOWN = (
    SD15,
    Known("SD2.x", "SD20", "BaseModel", ("clip_h",), 4, 4, WITH_QUANT, flow=False, layer=2),
    Known("SDXL", "SDXL", "SDXL", ("clip_l", "clip_g"), 4, 4, WITH_QUANT, flow=False),
    Known("SD3", "SD3", "SD3", ("clip_l", "clip_g", "t5xxl"), 16, 16, optional=True),
    Known("Flux.1", "Flux", "Flux", ("clip_l", "t5xxl"), 16, 16),
    Known("Chroma", "Chroma", "Chroma", ("t5xxl",), 64, 16),
    Known(
        "FLUX.2 klein",
        "Flux2",
        "Flux2",
        ("qwen3_4b", "qwen3_8b"),  # one of them
        128,
        128,
        (*WITH_QUANT, "bn.running_mean"),
        optional=True,
        told={"guidance_embed": False},
    ),
    Known("Qwen-Image", "QwenImage", "QwenImage", ("qwen25_7b",), 64, 16, CAUSAL),
    Known("Z-Image", "ZImage", "Lumina2", ("qwen3_4b",), 16, 16),
    # Behind Z-Image, whose classes are derived from its own; NewBie reads a CLIP too.
    Known("Lumina 2", "Lumina2", "Lumina2", ("gemma2_2b",), 16, 16, told={"clip_text_dim": None}),
)
# A text encoder's name begins so -> what the trainer calls its tokenizer.
TOKENIZERS = {"clip_": "clip", "t5": "t5", "qwen": "qwen", "gemma": "gemma"}
TOKENIZER_FILES = ("vocab.json", "tokenizer.json", "spiece.model", "tokenizer.model")


def family_of(model: Any) -> Known | None:
    """Return the family that ComfyUI takes a MODEL for; None for one that has no line here."""
    return next((known for known in KNOWN if known.fits(model)), None)


def text_encoders(clip: Any) -> dict[str, Any]:
    """Return a CLIP's text encoders by their names: clip_l, clip_g, t5xxl, ..."""
    parts = clip.cond_stage_model.named_children()
    return {name: part for name, part in parts if isinstance(part, comfy.sd1_clip.SDClipModel)}


def token_counter(clip: Any) -> Callable[[str], int] | None:
    """Return a function that counts a caption's tokens as this CLIP does; None where that is not known.

    With several text encoders it is the first one's, which has the least room for them.
    """
    first = next(iter(text_encoders(clip)), "")
    tokenizer = getattr(_tokenizer(clip, first), "tokenizer", None)
    if not callable(tokenizer):
        return None
    marks = len(tokenizer("")["input_ids"])
    return lambda text: max(0, len(tokenizer(text)["input_ids"]) - marks)


def tokenizer_folders(clip: Any) -> dict[str, Path]:
    """Return the folders that this CLIP's own tokenizers were read from, by the trainer's kinds.

    Raises LG-NODE-008 where one is not known.
    """
    found: dict[str, Path] = {}
    for name in text_encoders(clip):
        inner = _tokenizer(clip, name)
        own = getattr(inner, "tokenizer", None)
        folder = Path(str(getattr(own, "name_or_path", "")))
        came_with_weights = getattr(own, "serialize_model", None)
        if came_with_weights is not None:
            folder = keep_pieces(came_with_weights().numpy().tobytes())
        kind = next((kind for start, kind in TOKENIZERS.items() if name.startswith(start)), None)
        if kind is None or not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise LoraGraftError(
                "LG-NODE-008",
                "The CLIP's tokenizer cannot be found.",
                where=f"CLIP: {name}, {type(inner).__name__}",
                why="captions must be read with the words that this text encoder knows.",
                fix="load the CLIP with ComfyUI's own loader",
            )
        found.setdefault(kind, folder)
    return found


def _tokenizer(clip: Any, name: str) -> Any:
    """Return a text encoder's tokenizer, which a few CLIPs have under a longer name."""
    return getattr(clip.tokenizer, name, None) or getattr(clip.tokenizer, f"clip_{name}", None)
