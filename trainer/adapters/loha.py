"""LoHa: the elementwise product of two low-rank matrices (Hyeon-Woo et al. 2022), as LyCORIS has it.

dW = (alpha/r) (w1_a w1_b) * (w2_a w2_b); in Tucker form each factor has a core tensor (r, r, kh, kw).
"""

from __future__ import annotations

import torch

from .shapes import Shape
from .shares import Start, Tensors, normal, zeros


def begin(shape: Shape, rank: int, tucker: bool) -> dict[str, Start]:
    """Return how the tensors begin: w2_a at zero, so that the product is."""
    if tucker:
        return {
            "hada_w1_a": normal(0.1, rank, shape.outputs),
            "hada_w1_b": normal(1.0, rank, shape.inputs),
            "hada_w2_a": zeros(rank, shape.outputs),
            "hada_w2_b": normal(1.0, rank, shape.inputs),
            "hada_t1": normal(0.1, rank, rank, *shape.kernel),
            "hada_t2": normal(0.1, rank, rank, *shape.kernel),
        }
    columns = shape.inputs
    for side in shape.kernel:
        columns *= side
    return {
        "hada_w1_a": normal(0.1, shape.outputs, rank),
        "hada_w1_b": normal(1.0, rank, columns),
        "hada_w2_a": zeros(shape.outputs, rank),
        "hada_w2_b": normal(1.0, rank, columns),
    }


def delta(t: Tensors, shape: Shape) -> torch.Tensor:
    """Return the unscaled update, (out, in, ...)."""
    if "hada_t1" in t:
        first = torch.einsum("ij...,jr,ip->pr...", t["hada_t1"], t["hada_w1_b"], t["hada_w1_a"])
        second = torch.einsum("ij...,jr,ip->pr...", t["hada_t2"], t["hada_w2_b"], t["hada_w2_a"])
        return first * second
    product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    return product.view(shape.weight)


def rank_of(t: Tensors) -> int:
    """Return the rank."""
    return t["hada_w1_b"].shape[0]
