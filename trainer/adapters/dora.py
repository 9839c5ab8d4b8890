"""DoRA: the length of the weight is trained apart from its direction (Liu et al. 2024).

W' = m (W + dW) / |W + dW|, the lengths |.| taken over each input (the paper's columns) or, as LyCORIS can,
over each output. ``dora_scale`` m is (1, in, 1, ...) or (out, 1, 1, ...).
"""

from __future__ import annotations

import torch

NAME = "dora_scale"


def lengths(weight: torch.Tensor, on_output: bool) -> torch.Tensor:
    """Return the lengths of (out, in, ...) over each output, (out, 1, ...), or each input, (1, in, ...)."""
    kept = 0 if on_output else 1
    others = [dim for dim in range(weight.ndim) if dim != kept]
    norm: torch.Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return norm + torch.finfo(weight.dtype).eps


def change(weight: torch.Tensor, delta: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return W' - W for the update ``delta`` and the trained lengths ``scale``."""
    moved = weight + delta
    on_output = scale.shape[0] == weight.shape[0] and scale.shape[1] != weight.shape[1]
    return moved * (scale / lengths(moved, on_output)) - weight
