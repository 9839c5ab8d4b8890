"""Noise that is more than independent pixels: shifted channels and coarser sizes.

Everything random is handed in, so that one sample's noise is a function of what is drawn for it alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def offset_noise(
    noise: torch.Tensor,
    latents: torch.Tensor,
    shift: torch.Tensor,
    strength: float,
    adaptive_scale: float = 0.0,
) -> torch.Tensor:
    """Return noise (B, C, h, w) whose channels are shifted by ``strength`` times ``shift`` (B, C, 1, 1).

    ``adaptive_scale`` times the absolute mean of each channel of ``latents`` is added to the strength, which
    never falls below 0 then (Guttenberg 2023, "Diffusion with offset noise"; the reference trainer's rule).
    """
    if not adaptive_scale:
        return noise + strength * shift
    mean = latents.mean(dim=(2, 3), keepdim=True).abs()
    return noise + (strength + adaptive_scale * mean).clamp(min=0.0) * shift


def coarse_sizes(height: int, width: int, ratios: Sequence[float]) -> list[tuple[int, int]]:
    """Return the sizes (h, w) of the coarser noises: the i-th is ``ratios[i]`` ** i times smaller.

    The 0-th is as large as the noise itself. The list ends where a side is 1.
    """
    sizes: list[tuple[int, int]] = []
    for i, ratio in enumerate(ratios):
        sizes.append((max(1, int(height / ratio**i)), max(1, int(width / ratio**i))))
        if 1 in sizes[-1]:
            break
    return sizes


def multires_noise(noise: torch.Tensor, coarse: Sequence[torch.Tensor], discount: float) -> torch.Tensor:
    """Return noise plus coarser noises enlarged to its size, the i-th times discount ** i, at std 1.

    ``noise`` is one sample, (1, C, h, w), and so are the entries of ``coarse``, of the sizes of
    `coarse_sizes` (Whitaker 2023, "Multi-resolution noise"). Each sample is brought to std 1 by itself; the
    reference trainer divides by the std of the whole batch.
    """
    size = noise.shape[2:]
    total = noise
    for i, each in enumerate(coarse):
        total = total + F.interpolate(each, size, mode="bilinear") * discount**i
    return total / total.std()
