"""Embeddings of words beyond a text encoder's vocabulary, trained while the base's rows stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...parts import Parts
from .clip_text import text_body
from .clip_tokens import caption_ids


class WordEmbedding(nn.Module):
    """A token embedding with further rows: ids from the vocabulary's size on are those of ``rows``, in order.

    ``base`` is a frozen embedding; ``rows`` are (n_i, D) float32 and carry gradients.
    """

    def __init__(self, base: Any, rows: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.base, self.rows = base, nn.ParameterList(rows)

    @property
    def weight(self) -> torch.Tensor:
        """The base's rows."""
        weight: torch.Tensor = self.base.weight
        return weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return (..., D) for token ids (...), in the base's dtype; shapes do not depend on the ids."""
        size = self.base.num_embeddings
        known = self.base(ids.clamp(max=size - 1))
        own = F.embedding((ids - size).clamp(min=0), torch.cat(list(self.rows)))
        return torch.where((ids >= size)[..., None], own.to(known.dtype), known)


@torch.no_grad()
def word_rows(parts: Parts, text: str) -> torch.Tensor:
    """Return the embeddings (n, D) of a text's tokens, float32 on the CPU; of "", those of all tokens."""
    embedding = text_body(parts.text_encoder).embeddings.token_embedding
    ids = caption_ids(parts.tokenizer, text, {}) if text else range(len(parts.tokenizer))
    device = next(parts.text_encoder.parameters()).device
    rows: torch.Tensor = embedding(torch.tensor(ids, device=device))
    return rows.float().cpu()


def add_words(parts: Parts, vectors: Mapping[str, nn.Parameter]) -> None:
    """Let captions mean ``vectors``, (n, D) a word, wherever they have one of the words."""
    embeddings = text_body(parts.text_encoder).embeddings
    number = len(parts.tokenizer)
    for word, rows in vectors.items():
        parts.words[word] = tuple(range(number, number + len(rows)))
        number += len(rows)
    embeddings.token_embedding = WordEmbedding(embeddings.token_embedding, list(vectors.values()))
