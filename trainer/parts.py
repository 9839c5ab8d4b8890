"""A base model's modules, and the modules in it that an adapter can train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

DENOISER = "denoiser"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # in order; a base has the first of them


@dataclass
class Parts:
    """A base model's modules, frozen, and its tokenizers; the weights may be a host's, shared.

    ``text_encoders`` and ``tokenizers`` have keys of TEXT_ENCODERS, those that the base has. ``dtype`` is
    that of the denoiser's and the text encoders' arithmetic; the VAE's is float32. ``words`` are placeholders
    in captions, lower case, and the token ids beyond the vocabulary that stand for them.
    """

    denoiser: nn.Module
    vae: nn.Module
    text_encoders: nn.ModuleDict
    tokenizers: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    words: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def text_encoder(self) -> nn.Module:
        """The first text encoder, which is the only one of most bases."""
        return self.text_encoders[TEXT_ENCODERS[0]]

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's tokenizer."""
        return self.tokenizers[TEXT_ENCODERS[0]]

    def part(self, name: str) -> nn.Module:
        """Return the denoiser or a text encoder."""
        return self.denoiser if name == DENOISER else self.text_encoders[name]


@dataclass(frozen=True)
class Target:
    """One module to train: where it lies, its name in a LoRA file, and which settings group it belongs to.

    ``part`` is "denoiser" or one of TEXT_ENCODERS; ``kind`` is "linear" (1x1 convolutions too) or "conv".
    ``block`` is the index of the denoiser's block that it lies in, None outside of them.
    """

    part: str
    path: str
    key: str
    kind: str
    block: int | None = None
