"""Embeddings of words beyond a text encoder's vocabulary, trained while the base's rows stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


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
