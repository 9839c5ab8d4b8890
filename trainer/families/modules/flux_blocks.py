"""Flux.1's transformer (Black Forest Labs 2024): each block makes its own modulation.

The modules have the names and the fused layers of the single files, so that a host's tensors are theirs
without a copy, and one LoRA serves query, key and value (and the hidden layer of a single block) at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..base import Tensors
from . import stream_blocks
from .building import count
from .rotary import Rotation, grid, rotation
from .sinusoids import sinusoids
from .stream_blocks import modulated, packed, unpacked

PATCH = 2
THETA = 10_000.0
AXES = 3  # of positions: none, row, column
TIME_CHANNELS = 256
MILLE = 1000.0  # what a guidance scale is multiplied by before it is embedded, as the time is


class Embedder(nn.Module):
    """Two layers that bring a number's sinusoids, or the pooled text, to the transformer's width."""

    def __init__(self, channels: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_layer = nn.Linear(channels, width, bias=bias)
        self.out_layer = nn.Linear(width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels) -> (B, width)."""
        out: torch.Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


class Modulation(nn.Module):
    """``count`` vectors for a block, from the one that all blocks see."""

    def __init__(self, width: int, count: int, *, bias: bool = True) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(width, count * width, bias=bias)

    def forward(self, vec: torch.Tensor) -> torch.Tensor:
        """(B, width) -> (B, count, width)."""
        out: torch.Tensor = self.lin(F.silu(vec))
        return out.unflatten(-1, (self.count, -1))


class DoubleBlock(stream_blocks.DoubleBlock):
    """Two streams that attend to each other, and their modulations."""

    def __init__(self, width: int, heads: int, inside: int) -> None:
        super().__init__(width, heads, inside, gated=False, bias=True)
        self.img_mod = Modulation(width, 6)
        self.txt_mod = Modulation(width, 6)

    def forward(  # type: ignore[override]  # it makes what its parent is given
        self,
        img: torch.Tensor,
        txt: torch.Tensor,
        vec: torch.Tensor,
        rope: Rotation,
        seen: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image (B, N, width) and text (B, L, width) for the vector (B, width)."""
        return super().forward(img, txt, self.img_mod(vec), self.txt_mod(vec), rope, seen)


class SingleBlock(stream_blocks.SingleBlock):
    """One stream, text before image, and its modulation."""

    def __init__(self, width: int, heads: int, inside: int) -> None:
        super().__init__(width, heads, inside, gated=False, bias=True)
        self.modulation = Modulation(width, 3)

    def forward(
        self, x: torch.Tensor, vec: torch.Tensor, rope: Rotation, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the stream (B, L + N, width) for the vector (B, width)."""
        return super().forward(x, self.modulation(vec), rope, seen)


class FinalLayer(nn.Module):
    """The image's rows, modulated once more, as packed latents."""

    def __init__(self, width: int, channels: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, channels, bias=bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width, bias=bias))

    def forward(self, x: torch.Tensor, vec: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> (B, N, channels) for the vector (B, width)."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        out: torch.Tensor = self.linear(modulated(x, shift, scale))
        return out


class FluxTransformer(nn.Module):
    """Predicts noise - image. Modules are named as in Black Forest Labs' files; ``guided`` as dev is."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        inside: int,
        channels: int,
        context: int,
        pooled: int,
        double: int,
        single: int,
        guided: bool,
    ) -> None:
        super().__init__()
        place = 7 * (width // heads) // 32 * 2
        self.axes = (width // heads - 2 * place, place, place)  # 16, 56 and 56 of 128
        self.context, self.pooled, self.latent_channels = context, pooled, channels // PATCH**2
        self.img_in = nn.Linear(channels, width)
        self.time_in = Embedder(TIME_CHANNELS, width)
        self.vector_in = Embedder(pooled, width)
        self.guidance_in = Embedder(TIME_CHANNELS, width) if guided else None
        self.txt_in = nn.Linear(context, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(width, heads, inside) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(width, heads, inside) for _ in range(single))
        self.final_layer = FinalLayer(width, channels)

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor,
        guidance: float,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the velocity (B, C, h, w) of noisy latents of that shape.

        t: (B,) float32 in [0, 1000]; text: (B, L, context); pooled: (B, pooled); ``guidance`` counts where
        the model is guided. seen: (B, L) bool, the text's places that count; None: all do.
        """
        height, width = latents.shape[2:]
        img, txt = self.img_in(packed(latents, PATCH)), self.txt_in(text)
        vec = self.time_in(sinusoids(t, TIME_CHANNELS).to(img.dtype)) + self.vector_in(pooled)
        if self.guidance_in is not None:
            scales = torch.full_like(t, MILLE * guidance)
            vec = vec + self.guidance_in(sinusoids(scales, TIME_CHANNELS).to(img.dtype))
        places = grid(height // PATCH, width // PATCH, AXES, 1, img.device)
        before = places.new_zeros((1, txt.shape[1], AXES))  # text has no place
        rope = rotation(torch.cat((before, places), dim=1), self.axes, THETA)
        if seen is not None:
            seen = torch.cat((seen, seen.new_ones(img.shape[:2])), dim=1)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rope, seen)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vec, rope, seen)
        return unpacked(self.final_layer(x[:, txt.shape[1] :], vec), PATCH, height, width)


def flux_config(sd: Tensors) -> dict[str, Any]:
    """Read the transformer's shape from its weights."""
    width, channels = sd["img_in.weight"].shape
    return {
        "width": width,
        "heads": width // sd["double_blocks.0.img_attn.norm.query_norm.weight"].shape[0],
        "inside": sd["double_blocks.0.img_mlp.0.weight"].shape[0],
        "channels": channels,
        "context": sd["txt_in.weight"].shape[1],
        "pooled": sd["vector_in.in_layer.weight"].shape[1],
        "double": count(sd, r"double_blocks\.(\d+)\."),
        "single": count(sd, r"single_blocks\.(\d+)\."),
        "guided": "guidance_in.in_layer.weight" in sd,
    }
