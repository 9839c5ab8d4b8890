"""FLUX.2's transformer (Black Forest Labs 2025): Flux's blocks, all of which share their modulations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base import Tensors
from .building import count
from .flux_blocks import TIME_CHANNELS, Embedder, FinalLayer, Modulation
from .rotary import grid, rotation
from .sinusoids import sinusoids
from .stream_blocks import DoubleBlock, SingleBlock, packed, unpacked

THETA = 2000.0
AXES = 4  # of positions: image, row, column, place in the text


class Flux2Transformer(nn.Module):
    """Predicts noise - image. Modules are named as in Black Forest Labs' files; a latent pixel is a token."""

    def __init__(
        self, *, width: int, heads: int, inside: int, channels: int, context: int, double: int, single: int
    ) -> None:
        super().__init__()
        self.axes = (width // heads // AXES,) * AXES  # 32 each of 128
        self.img_in = nn.Linear(channels, width, bias=False)
        self.time_in = Embedder(TIME_CHANNELS, width, bias=False)
        self.txt_in = nn.Linear(context, width, bias=False)
        self.double_stream_modulation_img = Modulation(width, 6, bias=False)
        self.double_stream_modulation_txt = Modulation(width, 6, bias=False)
        self.single_stream_modulation = Modulation(width, 3, bias=False)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(width, heads, inside, gated=True, bias=False) for _ in range(double)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(width, heads, inside, gated=True, bias=False) for _ in range(single)
        )
        self.final_layer = FinalLayer(width, channels, bias=False)

    def forward(self, latents: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Return the velocity (B, C, h, w) of noisy latents of that shape.

        t: (B,) float32 in [0, 1000]; text: (B, L, context), all of whose places count.
        """
        height, width = latents.shape[2:]
        img, txt = self.img_in(packed(latents, 1)), self.txt_in(text)
        vec = self.time_in(sinusoids(t, TIME_CHANNELS).to(img.dtype))
        places = grid(height, width, AXES, 1, img.device)
        before = places.new_zeros((1, txt.shape[1], AXES))
        before[..., -1] = torch.arange(txt.shape[1], device=img.device)
        rope = rotation(torch.cat((before, places), dim=1), self.axes, THETA)
        of_img, of_txt = self.double_stream_modulation_img(vec), self.double_stream_modulation_txt(vec)
        for block in self.double_blocks:
            img, txt = block(img, txt, of_img, of_txt, rope, None)
        x, mod = torch.cat((txt, img), dim=1), self.single_stream_modulation(vec)
        for block in self.single_blocks:
            x = block(x, mod, rope, None)
        return unpacked(self.final_layer(x[:, txt.shape[1] :], vec), 1, height, width)


def flux2_config(sd: Tensors) -> dict[str, Any]:
    """Read the transformer's shape from its weights."""
    width, channels = sd["img_in.weight"].shape
    return {
        "width": width,
        "heads": width // sd["double_blocks.0.img_attn.norm.query_norm.weight"].shape[0],
        "inside": sd["double_blocks.0.img_mlp.2.weight"].shape[1],
        "channels": channels,
        "context": sd["txt_in.weight"].shape[1],
        "double": count(sd, r"double_blocks\.(\d+)\."),
        "single": count(sd, r"single_blocks\.(\d+)\."),
    }
