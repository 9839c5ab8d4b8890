"""The sinusoidal embedding of timesteps (Vaswani et al. 2017, as Ho et al. 2020 use it)."""

from __future__ import annotations

import math

import torch

MAX_PERIOD = 10_000.0


def sinusoids(t: torch.Tensor, channels: int) -> torch.Tensor:
    """Return (B, channels) float32, cosines before sines, for timesteps (B,) in [0, 1000]."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
