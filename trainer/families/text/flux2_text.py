"""Qwen3 as FLUX.2 klein's text encoder: the states of three layers side by side, padding among them.

A caption is put where a user speaks in a chat, and the answer has begun with empty thoughts. The transformer
sees the padding behind it, whose states depend on the caption, so a length of its own belongs to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..base import Reading, Room, Texts
from .qwen_text import BEGIN, END, Chat, chat_room, chat_tokens, long_enough

LAYERS = (9, 18, 27)  # 0 are the embeddings
CHAT = Chat(
    before=f"{BEGIN}user\n",
    after=f"{END}\n{BEGIN}assistant\n<think>\n\n</think>\n\n",
    hidden=False,
    layer=LAYERS[-1],
    padding=None,
)


def klein_tokens(tokenizer: Any, captions: Sequence[str], reading: Reading) -> Texts:
    """Return token ids (B, L) and 1 where one is no padding, both int64."""
    ids, mask = chat_tokens(tokenizer, captions, reading, CHAT)
    return ids.where(mask.bool(), torch.tensor(tokenizer.pad_token_id)), mask


def klein_room(tokenizer: Any, captions: Sequence[str], reading: Reading) -> Room:
    """Return how long captions are with what stands around them, and how much is read."""
    return chat_room(tokenizer, captions, reading, CHAT)


def klein_reading(tokenizer: Any, captions: Sequence[str], reading: Reading) -> Reading:
    """Return the reading with the usual length, or with more for a caption that it would cut."""
    needed = long_enough(tokenizer, captions, reading, CHAT).t5_length or CHAT.length
    return replace(reading, t5_length=max(reading.t5_length or CHAT.length, needed))


def encode_klein(encoder: nn.Module, tokens: Texts) -> Texts:
    """Return the states (B, L, 3 D)."""
    ids, mask = tokens
    out: Any = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return (torch.cat([out.hidden_states[layer] for layer in LAYERS], dim=-1),)


def klein_shapes(encoder: nn.Module, reading: Reading) -> list[tuple[int, ...]]:
    """Return the shapes of `encode_klein`'s tensors without the batch."""
    return [(CHAT.places(reading), len(LAYERS) * cast(Any, encoder).config.hidden_size)]
