"""Rotary position embedding over several axes (Su et al. 2021): pairs of channels turn by an angle.

Angles are computed in float64, as diffusers and ComfyUI do, and applied in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Rotation = torch.Tensor  # cosine + i sine of each pair's angle, (B or 1, 1, L, D / 2) complex64


def rotation(positions: torch.Tensor, axes: Sequence[int], theta: float) -> Rotation:
    """Return what `rotate` turns channels by: on axis a, pair i by position * theta^(-2 i / axes[a]).

    positions: (B or 1, L, number of axes); ``axes``: how many channels belong to each, even, D in all.
    """
    exact = torch.float32 if positions.device.type == "mps" else torch.float64  # which knows no float64
    angles = []
    for axis, channels in enumerate(axes):
        exponents = torch.arange(0, channels, 2, dtype=exact, device=positions.device) / channels
        angles.append(positions[..., axis, None].to(exact) * theta**-exponents)
    angle = torch.cat(angles, dim=-1)[:, None]  # (B or 1, 1, L, D / 2)
    return torch.complex(angle.cos().float(), angle.sin().float())


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Return queries or keys (B, heads, L, D), turned; in x's dtype."""
    out: torch.Tensor = _Rotate.apply(x, by)
    return out


class _Rotate(torch.autograd.Function):
    """A pair of channels as one complex number, times that of its angle: one product where there were nine.

    The transposed rotation turns by the negative angle, so nothing but the angles is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, by: Rotation) -> torch.Tensor:
        ctx.by = by
        return _turned(x, by)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _turned(grad, ctx.by.conj()), None


def _turned(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = x.new_empty(x.shape, dtype=exact).copy_(x)  # side by side, however x lies
    torch.view_as_complex(pairs.unflatten(-1, (-1, 2))).mul_(by)
    return pairs.to(x.dtype)


def grid(height: int, width: int, axes: int, first: int, device: torch.device) -> torch.Tensor:
    """Return positions (1, height * width, axes) of an image's places, row by row.

    Rows count on axis ``first`` and columns on the next one; the others are 0.
    """
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, device=device)[None].expand(height, width)
    zero = torch.zeros_like(rows)
    by_axis = [rows if a == first else columns if a == first + 1 else zero for a in range(axes)]
    return torch.stack(by_axis, dim=-1).reshape(1, height * width, axes)
