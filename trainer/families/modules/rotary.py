"""Rotary position embedding over several axes (Su et al. 2021): pairs of channels turn by an angle.

Angles are computed in float64, as diffusers and ComfyUI do, and applied in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each (B or 1, 1, L, D / 2) float32


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
    return angle.cos().float(), angle.sin().float()


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Return queries or keys (B, heads, L, D), turned; in x's dtype."""
    cos, sin = by
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def grid(height: int, width: int, axes: int, first: int, device: torch.device) -> torch.Tensor:
    """Return positions (1, height * width, axes) of an image's places, row by row.

    Rows count on axis ``first`` and columns on the next one; the others are 0.
    """
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, device=device)[None].expand(height, width)
    zero = torch.zeros_like(rows)
    by_axis = [rows if a == first else columns if a == first + 1 else zero for a in range(axes)]
    return torch.stack(by_axis, dim=-1).reshape(1, height * width, axes)
