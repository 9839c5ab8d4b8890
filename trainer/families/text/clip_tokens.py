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


def in_chunks(
    tokenizer: Any, ids: Sequence[int], max_token_length: int, pad: int | None = None
) -> torch.Tensor:
    """Return (chunks, 77) token ids: what fits, padded, 75 between a start and an end token.

    ``pad`` None is the tokenizer's own padding, CLIP's end token. With OpenCLIP's, as in the reference
    trainer, a chunk of words alone ends in an end token, and one of padding alone begins with one.
    """
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if pad is None else pad
    inside = [*ids[:max_token_length], end][:max_token_length]
    inside += [pad] * (max_token_length - len(inside))
    last = end if len(ids) >= max_token_length else pad
    rows = []
    for i in range(0, max_token_length, CHUNK):
        first, *others = inside[i : i + CHUNK]
        closing = last if others[-1] in (end, pad) else end
        rows.append([start, end if first == pad else first, *others, closing])
    return torch.tensor(rows)


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
