"""A base model's modules, and the modules in it that an adapter can train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Parts:
    """A base model's modules, frozen, and its tokenizer; the weights may be a host's, shared.

    ``dtype`` is that of the denoiser's and the text encoder's arithmetic; the VAE's is float32. ``words``
    are placeholders in captions, lower case, and the token ids beyond the vocabulary that stand for them.
    """

    denoiser: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: Any
    dtype: torch.dtype = torch.float32
    words: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """One module to train: where it lies, its name in a LoRA file, and which settings group it belongs to.

    ``part`` is "denoiser" or "text_encoder"; ``kind`` is "linear" (1x1 convolutions too) or "conv".
    ``block`` is the index of the denoiser's block that it lies in, None outside of them.
    """

    part: str
    path: str
    key: str
    kind: str
    block: int | None = None
