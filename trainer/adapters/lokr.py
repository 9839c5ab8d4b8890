"""LoKr: the Kronecker product of a small matrix and a larger one (Edalati et al. 2022), as LyCORIS has it.

With out = a b and in = c d: dW = (alpha/r) w1 (a, c) x w2 (b, d, ...). Each may be low-rank, w = w_a w_b, and
that of a convolution in Tucker form; where both are whole there is no scale.
"""

from __future__ import annotations

import torch

from .shapes import Shape, factors
from .shares import Start, Tensors, kaiming, zeros


def begin(
    shape: Shape, rank: int, *, factor: int, both: bool, full: bool, unbalanced: bool, tucker: bool
) -> dict[str, Start]:
    """Return how the tensors begin: w2, or its second factor, at zero.

    A matrix is decomposed where the rank is less than half of its longer side; w1 only if ``both``.
    """
    c, d = factors(shape.inputs, factor)
    a, b = factors(shape.outputs, factor)
    if unbalanced:
        a, b = b, a
    result: dict[str, Start] = {}
    if both and rank < max(a, c) / 2 and not full:
        result |= {"lokr_w1_a": kaiming(a, rank), "lokr_w1_b": kaiming(rank, c)}
    else:
        result["lokr_w1"] = kaiming(a, c)
    if full or rank >= max(b, d) / 2:
        result["lokr_w2"] = zeros(b, d, *shape.kernel)
    elif tucker:
        result |= {
            "lokr_w2_a": kaiming(rank, b),
            "lokr_w2_b": zeros(rank, d),
            "lokr_t2": kaiming(rank, rank, *shape.kernel),
        }
    else:
        columns = d
        for side in shape.kernel:
            columns *= side
        result |= {"lokr_w2_a": kaiming(b, rank), "lokr_w2_b": zeros(rank, columns)}
    return result


def delta(t: Tensors, shape: Shape) -> torch.Tensor:
    """Return the unscaled update, (out, in, ...)."""
    small = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        large = t["lokr_w2"]
    elif "lokr_t2" in t:
        large = torch.einsum("ij...,ip,jr->pr...", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        large = t["lokr_w2_a"] @ t["lokr_w2_b"]
    large = large.reshape(large.shape[0], -1, *shape.kernel)
    small = small.view(*small.shape, *shape.ones)
    return torch.kron(small, large.contiguous()).view(shape.weight)


def rank_of(t: Tensors) -> int | None:
    """Return the rank; None where both matrices are whole, and nothing is scaled."""
    if "lokr_w1_b" in t:
        return t["lokr_w1_b"].shape[0]
    return t["lokr_w2_b"].shape[0] if "lokr_w2_b" in t else None


def without_core(t: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors with the Tucker core taken into w2_b: the same update, as ComfyUI can read it."""
    if "lokr_t2" not in t:
        return dict(t)
    joined = torch.einsum("ij...,jq->iq...", t["lokr_t2"], t["lokr_w2_b"]).flatten(1)
    others = {name: tensor for name, tensor in t.items() if name != "lokr_t2"}
    return {**others, "lokr_w2_a": t["lokr_w2_a"].T.contiguous(), "lokr_w2_b": joined}
