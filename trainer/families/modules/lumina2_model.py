"""Lumina-Image 2.0's transformer: Z-Image's blocks with fewer heads of keys, and no padding tokens.

Reference: Alpha-VLLM/Lumina-Image-2.0, with its modules' names. Image and text are refined apart, then run as
one stream. An image stands behind its text in position, so where it stands depends on the text's length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..base import Tensors
from . import z_image_model
from .building import count
from .rotary import Rotation, grid, rotate, rotation
from .stream_blocks import packed, unpacked
from .z_image_model import AXES, EPS, PATCH, FinalLayer, TimeEmbedder

THETA = 10_000.0
STEPS = 1000.0


class GroupedAttention(z_image_model.Attention):
    """Self-attention in which a head of keys and values serves several of queries (Ainslie et al. 2023)."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__(width, heads)
        self.groups = groups
        self.qkv = nn.Linear(width, width // heads * (heads + 2 * groups), bias=False)

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None, rope: Rotation) -> torch.Tensor:
        """(B, L, width) -> the same shape; ``seen`` (B, L) bool says which places are attended to."""
        every = self.qkv(x).unflatten(-1, (self.heads + 2 * self.groups, -1)).transpose(1, 2)
        q, k, v = every.split((self.heads, self.groups, self.groups), dim=1)  # (B, heads, L, width / heads)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        k, v = (shared.repeat_interleave(self.heads // self.groups, dim=1) for shared in (k, v))
        mask = None if seen is None else seen[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


class Block(z_image_model.Block):
    """Attention and feed-forward, each between two norms; ``time`` is the width of what modulates them."""

    def __init__(self, width: int, heads: int, groups: int, inside: int, time: int | None) -> None:
        super().__init__(width, heads, inside, time)
        self.attention = GroupedAttention(width, heads, groups)
        if time is not None:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time, 4 * width))


class Lumina2Transformer(nn.Module):
    """Predicts noise - image, where the authors' code has image - noise."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        groups: int,
        inside: int,
        channels: int,
        context: int,
        time: int,
        layers: int,
        refiners: int,
    ) -> None:
        super().__init__()
        self.axes = (width // heads // AXES,) * AXES  # 32 each of 96
        self.latent_channels = channels // PATCH**2
        shape = (width, heads, groups, inside)
        self.x_embedder = nn.Linear(channels, width)
        self.noise_refiner = nn.ModuleList(Block(*shape, time) for _ in range(refiners))
        self.t_embedder = TimeEmbedder(time, time)
        self.cap_embedder = nn.Sequential(nn.RMSNorm(context, eps=EPS), nn.Linear(context, width))
        self.context_refiner = nn.ModuleList(Block(*shape, None) for _ in range(refiners))
        self.layers = nn.ModuleList(Block(*shape, time) for _ in range(layers))
        self.final_layer = FinalLayer(width, channels, time)

    def forward(
        self, latents: torch.Tensor, t: torch.Tensor, text: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """Return the velocity (B, C, h, w) of noisy latents of that shape.

        t: (B,) float32 in [0, 1000]; text: (B, L, context); seen: (B, L) bool, True where a place is the
        caption's, which begins at place 0 and has no gaps.
        """
        height, width = latents.shape[2:]
        time = self.t_embedder((STEPS - t) / STEPS, latents.dtype)  # counts from noise, 0, to image, 1
        x = self.x_embedder(self._channels_last(packed(latents, PATCH)))
        places = grid(height // PATCH, width // PATCH, AXES, 1, x.device)
        behind = F.pad(seen.sum(1)[:, None, None], (0, AXES - 1))  # (B, 1, 3)
        of_image = rotation(places + behind, self.axes, THETA)
        for block in self.noise_refiner:
            x = block(x, None, of_image, time)
        caption = self.cap_embedder(text)
        numbers = torch.arange(text.shape[1], device=text.device)
        of_text = rotation(F.pad(numbers[None, :, None], (0, AXES - 1)), self.axes, THETA)
        for block in self.context_refiner:
            caption = block(caption, seen, of_text)
        both = torch.cat((caption, x), dim=1)
        all_seen = torch.cat((seen, seen.new_ones(x.shape[:2])), dim=1)
        rope = torch.cat((of_text.expand(len(both), -1, -1, -1), of_image), dim=2)
        for block in self.layers:
            both = block(both, all_seen, rope, time)
        out = self._channels_first(self.final_layer(both[:, text.shape[1] :], time))
        return -unpacked(out, PATCH, height, width)

    def _channels_last(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, N, C p p) -> (B, N, p p C)."""
        return rows.unflatten(-1, (self.latent_channels, -1)).transpose(-1, -2).flatten(-2)

    def _channels_first(self, rows: torch.Tensor) -> torch.Tensor:
        """Undo `_channels_last`."""
        return rows.unflatten(-1, (-1, self.latent_channels)).transpose(-1, -2).flatten(-2)


def lumina2_config(sd: Tensors) -> dict[str, Any]:
    """Read the transformer's shape from its weights."""
    width, context = sd["cap_embedder.1.weight"].shape
    per_head = sd["layers.0.attention.q_norm.weight"].shape[0]
    heads = width // per_head
    return {
        "width": width,
        "heads": heads,
        "groups": (sd["layers.0.attention.qkv.weight"].shape[0] // per_head - heads) // 2,
        "inside": sd["layers.0.feed_forward.w1.weight"].shape[0],
        "channels": sd["x_embedder.weight"].shape[1],
        "context": context,
        "time": sd["t_embedder.mlp.0.weight"].shape[0],
        "layers": count(sd, r"layers\.(\d+)\."),
        "refiners": count(sd, r"noise_refiner\.(\d+)\."),
    }
