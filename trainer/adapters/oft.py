"""OFT turns the weight by orthogonal blocks (Qiu et al. 2023), BOFT by a butterfly of them (Liu et al. 2024).

R = (I + Q) (I - Q)^-1 with Q = B - B^T is a rotation for any trained B (Cayley). A constraint holds Q's
length, over all blocks of a layer, below a limit. As LyCORIS has it, outputs are turned.
"""

from __future__ import annotations

import torch

from .shapes import Shape, butterfly, factors
from .shares import Start, Tensors, ones, zeros

BLOCKS, RESCALE = "oft_blocks", "rescale"


def begin_diagonal(shape: Shape, largest: int) -> dict[str, Start]:
    """Return how OFT begins: no rotation. Blocks have sides up to ``largest`` that divide the outputs."""
    side, count = factors(shape.outputs, largest)
    return {BLOCKS: zeros(count, side, side)}


def begin_butterfly(shape: Shape, largest: int, rescaled: bool) -> dict[str, Start] | None:
    """Return how BOFT begins: no rotation, all factors one; None where the outputs cannot be split."""
    found = butterfly(shape.outputs, largest)
    if found is None:
        return None
    side, count = found
    result = {BLOCKS: zeros(count.bit_length(), count, side, side)}
    if rescaled:
        result[RESCALE] = ones(shape.outputs, *(1 for _ in shape.weight[1:]))
    return result


def skew(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """Return Q, not longer than ``limit`` unless that is 0."""
    q = blocks - blocks.transpose(-1, -2)
    if limit <= 0:
        return q
    norm = q.norm() + 1e-8
    return torch.where(norm > limit, q * (limit / norm), q)


def rotations(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """Return R of each block, (..., side, side)."""
    q = skew(blocks, limit)
    identity = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    return (identity + q) @ torch.linalg.inv(identity - q)


def delta_diagonal(t: Tensors, weight: torch.Tensor, limit: float) -> torch.Tensor:
    """Return R^T W - W, (out, in, ...)."""
    turned = rotations(t[BLOCKS], limit)
    turned = turned - torch.eye(turned.shape[-1], device=turned.device, dtype=turned.dtype)
    rows = weight.view(*turned.shape[:2], *weight.shape[1:])
    return torch.einsum("knm,kn...->km...", turned, rows).reshape(weight.shape)


def delta_butterfly(t: Tensors, weight: torch.Tensor, limit: float) -> torch.Tensor:
    """Return the weight turned by one layer of blocks after the other, minus itself, (out, in, ...).

    Layer i turns together what lies 2^i half blocks apart.
    """
    turned, side = weight, t[BLOCKS].shape[-1]
    for number, blocks in enumerate(rotations(t[BLOCKS], limit)):
        apart = 2**number * (side // 2)
        mixed = turned.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, side))
        mixed = torch.einsum("bij,bj...->bi...", blocks, mixed)
        turned = mixed.flatten(0, 1).unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return turned * t.get(RESCALE, 1.0) - weight


def within(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """Return the blocks scaled so that Q keeps its limit by itself: what a file holds."""
    if limit <= 0:
        return blocks
    norm = (blocks - blocks.transpose(-1, -2)).norm() + 1e-8
    return blocks * (limit / norm).clamp(max=1.0)
