"""Chroma's transformer: Flux whose modulations one small network gives for all blocks at once.

Reference: lodestones/Chroma1. Text is T5's alone; of its padding the transformer sees one place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..base import Tensors
from .building import count
from .rotary import grid, rotation
from .sinusoids import sinusoids
from .stream_blocks import EPS, DoubleBlock, SingleBlock, modulated, packed, unpacked

PATCH = 2
THETA = 10_000.0
AXES = 3  # of positions: none, row, column


class Residual(nn.Module):
    """What one layer of the approximator adds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(channels, channels)
        self.out_layer = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., channels) -> (..., channels)."""
        out: torch.Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


class Approximator(nn.Module):
    """Gives each modulation vector from the time and the vector's number.

    Its layers lie in `nn.Sequential`, which keeps their names and is no list of the model's blocks.
    """

    def __init__(self, channels: int, inside: int, width: int, depth: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(channels, inside)
        self.layers = nn.Sequential(*(Residual(inside) for _ in range(depth)))
        self.norms = nn.Sequential(*(nn.RMSNorm(inside, eps=EPS) for _ in range(depth)))
        self.out_proj = nn.Linear(inside, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, M, channels) -> (B, M, width)."""
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        out: torch.Tensor = self.out_proj(x)
        return out


class FinalLayer(nn.Module):
    """The last linear layer, modulated once more."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, channels)

    def forward(self, x: torch.Tensor, mod: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> (B, N, channels) for a modulation (B, 2, width): shift, scale."""
        out: torch.Tensor = self.linear(modulated(x, mod[:, :1], mod[:, 1:]))
        return out


class ChromaTransformer(nn.Module):
    """Predicts noise - image. Modules are named as in Chroma's files."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        inside: int,
        channels: int,
        context: int,
        double: int,
        single: int,
        guide_channels: int,
        guide_inside: int,
        guide_depth: int,
    ) -> None:
        super().__init__()
        place = 7 * (width // heads) // 32 * 2
        self.axes = (width // heads - 2 * place, place, place)  # 16, 56 and 56 of 128
        self.guide_channels = guide_channels
        self.num_modulations = 3 * single + 12 * double + 2
        self.img_in = nn.Linear(channels, width)
        self.txt_in = nn.Linear(context, width)
        self.distilled_guidance_layer = Approximator(guide_channels, guide_inside, width, guide_depth)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(width, heads, inside, gated=False, bias=True) for _ in range(double)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(width, heads, inside, gated=False, bias=True) for _ in range(single)
        )
        self.final_layer = FinalLayer(width, channels)

    def forward(
        self, latents: torch.Tensor, t: torch.Tensor, text: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """Return the velocity (B, C, h, w) of noisy latents of that shape.

        t: (B,) float32 in [0, 1000]; text: (B, L, context); seen: (B, L) bool, its places that count.
        """
        height, width = latents.shape[2:]
        img, txt = self.img_in(packed(latents, PATCH)), self.txt_in(text)
        places = grid(height // PATCH, width // PATCH, AXES, 1, img.device)
        before = places.new_zeros((1, txt.shape[1], AXES))  # text has no place
        rope = rotation(torch.cat((before, places), dim=1), self.axes, THETA)
        seen = torch.cat((seen, seen.new_ones(img.shape[:2])), dim=1)
        doubles, singles = len(self.double_blocks), len(self.single_blocks)
        mods = self.modulations(t, img.dtype)
        of_single, of_img, of_txt, of_end = mods.split((3 * singles, 6 * doubles, 6 * doubles, 2), dim=1)
        for i, block in enumerate(self.double_blocks):
            own = slice(6 * i, 6 * i + 6)
            img, txt = block(img, txt, of_img[:, own], of_txt[:, own], rope, seen)
        x = torch.cat((txt, img), dim=1)
        for i, block in enumerate(self.single_blocks):
            x = block(x, of_single[:, 3 * i : 3 * i + 3], rope, seen)
        return unpacked(self.final_layer(x[:, txt.shape[1] :], of_end), PATCH, height, width)

    def modulations(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return all modulation vectors (B, M, width): single blocks', image's, text's, the last layer's.

        The network sees the time, a guidance that is always 0, and the vector's number.
        """
        quarter = self.guide_channels // 4
        numbers = 1000.0 * torch.arange(self.num_modulations, device=t.device)
        told = torch.cat((sinusoids(t, quarter), sinusoids(torch.zeros_like(t), quarter)), dim=1)
        number = sinusoids(numbers, 2 * quarter)
        both = (told[:, None].expand(-1, len(number), -1), number[None].expand(len(t), -1, -1))
        mods: torch.Tensor = self.distilled_guidance_layer(torch.cat(both, dim=-1).to(dtype))
        return mods


def chroma_config(sd: Tensors) -> dict[str, Any]:
    """Read the transformer's shape from its weights."""
    width, channels = sd["img_in.weight"].shape
    guide_inside, guide_channels = sd["distilled_guidance_layer.in_proj.weight"].shape
    return {
        "width": width,
        "heads": width // sd["double_blocks.0.img_attn.norm.query_norm.weight"].shape[0],
        "inside": sd["double_blocks.0.img_mlp.0.weight"].shape[0],
        "channels": channels,
        "context": sd["txt_in.weight"].shape[1],
        "double": count(sd, r"double_blocks\.(\d+)\."),
        "single": count(sd, r"single_blocks\.(\d+)\."),
        "guide_channels": guide_channels,
        "guide_inside": guide_inside,
        "guide_depth": count(sd, r"distilled_guidance_layer\.layers\.(\d+)\."),
    }
