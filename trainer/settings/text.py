"""How captions are read: length, layer, embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from .info import setting


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How captions are read: length, layer, embeddings."""

    max_token_length: int = setting(
        75, "Longest caption in tokens: 75, 150 or 225.", choices=("75", "150", "225"), advanced=True
    )
    clip_skip: int = setting(
        1, "Use the n-th last layer of the text encoder (1 realistic, 2 anime).", minimum=1, maximum=12
    )
