"""CLIP's token ids of captions: placeholder words, emphasis, and chunks of 75."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from .emphasis import parse_emphasis

CHUNK = 75
Words = Mapping[str, Sequence[int]]


def caption_ids(tokenizer: Any, caption: str, words: Words) -> list[int]:
    """Return a caption's token ids without start and end; placeholder ``words`` become their own ids."""
    if not words:
        return _plain(tokenizer, caption)
    ids: list[int] = []
    for number, piece in enumerate(_placeholders(tuple(sorted(words))).split(caption)):
        ids += words[piece.lower()] if number % 2 else _plain(tokenizer, piece)
    return ids


def weighted_ids(tokenizer: Any, caption: str, words: Words) -> tuple[list[int], list[float]]:
    """Return token ids without start and end of a caption with emphasis, and each one's weight."""
    ids: list[int] = []
    weights: list[float] = []
    for piece, weight in parse_emphasis(caption):
        found = caption_ids(tokenizer, piece, words)
        ids += found
        weights += [weight] * len(found)
    return ids, weights


def in_chunks(tokenizer: Any, ids: Sequence[int], max_token_length: int) -> torch.Tensor:
    """Return (chunks, 77) token ids: what fits, padded, 75 between a start and an end token.

    As the reference trainer does it for SD1.x, where end and padding are one token.
    """
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    inside = [*ids[:max_token_length], end][:max_token_length]
    inside += [pad] * (max_token_length - len(inside))
    rows = [inside[i : i + CHUNK] for i in range(0, max_token_length, CHUNK)]
    last = end if len(ids) >= max_token_length else pad
    return torch.tensor([[start, *row, last] for row in rows])


def has_word(text: str, word: str) -> bool:
    """Say whether a text has the placeholder, as a word of its own, in any case."""
    return _placeholders((word,)).search(text) is not None


def _plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False).input_ids
    return ids[1:-1]


@lru_cache(maxsize=64)
def _placeholders(words: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, longest_first))})(?![\w-])", re.IGNORECASE)
