"""Random values for weights of true size: speed, memory and structure, not quality."""

from __future__ import annotations

import torch

POOL = 2**24 + 61  # random values that all tensors are made of; odd, so that no two begin alike
EMBEDDINGS = ("embedding.weight", "shared.weight", "embed_tokens.weight")
ONES = ("weight", "scale", "running_var")


class Values:
    """Values for one tensor after the other: norms at 1 and 0, the rest uniform in +-1/sqrt(fan_in)."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        drawn = torch.empty(POOL).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
        self.pool, self.begin = drawn.to(dtype), 0

    def of(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return the values of a tensor, cut from one pool."""
        values = torch.empty(shape, dtype=self.pool.dtype)
        if len(shape) == 1:
            return values.fill_(1.0 if name.endswith(ONES) else 0.0)
        flat, done = values.view(-1), 0
        while done < flat.numel():
            piece = self.pool[self.begin : self.begin + flat.numel() - done]
            flat[done : done + piece.numel()] = piece
            done += piece.numel()
            self.begin = (self.begin + piece.numel()) % POOL
        return values.mul_(0.02 if name.endswith(EMBEDDINGS) else shape[1:].numel() ** -0.5)
