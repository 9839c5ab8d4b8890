"""Z-Image's transformer: one stream of image and text, each refined by itself before they meet.

Reference: Tongyi-MAI/Z-Image, as ComfyUI has it and with its modules' names. Text and image are padded to
multiples of 32 places with tokens that were trained and are seen. Captions of a batch differ in length, so
here each has its own count of them; what lies behind is hidden. Images stand behind the text in position.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...engine.made import made, through
from ...engine.makes import SiluTimes
from ..base import Tensors
from .building import count
from .rotary import Rotation, grid, rotate, rotation
from .sinusoids import sinusoids
from .stream_blocks import finite, split_heads

PATCH = 2
PADDED_TO = 32
THETA = 256.0
AXES = 3  # of positions: text, row, column
EPS = 1e-5
TIME_CHANNELS, STEPS = 256, 1000.0
SILU_TIMES = SiluTimes()


class Attention(nn.Module):
    """Self-attention with normalised queries and keys; query, key and value are one matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads, eps=EPS)
        self.k_norm = nn.RMSNorm(width // heads, eps=EPS)

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None, rope: Rotation) -> torch.Tensor:
        """(B, L, width) -> the same shape; ``seen`` (B, L) bool says which places are attended to."""
        q, k, v = split_heads(self.qkv(x), self.heads)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        mask = None if seen is None else seen[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x) (SwiGLU, Shazeer 2020)."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inside, bias=False)
        self.w2 = nn.Linear(inside, width, bias=False)
        self.w3 = nn.Linear(width, inside, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width)."""
        gate, value = self.w1(x), self.w3(x)
        if x.dtype == torch.float16:
            out: torch.Tensor = self.w2(finite(made(SILU_TIMES, gate, value)))
            return out
        return through(self.w2, SILU_TIMES, gate, value)


class Block(nn.Module):
    """Attention and feed-forward, each between two norms; time scales the input and gates the result."""

    def __init__(self, width: int, heads: int, inside: int, time: int | None) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, inside)
        self.attention_norm1 = nn.RMSNorm(width, eps=EPS)
        self.ffn_norm1 = nn.RMSNorm(width, eps=EPS)
        self.attention_norm2 = nn.RMSNorm(width, eps=EPS)
        self.ffn_norm2 = nn.RMSNorm(width, eps=EPS)
        self.adaLN_modulation = None if time is None else nn.Sequential(nn.Linear(time, 4 * width))

    def forward(
        self,
        x: torch.Tensor,
        seen: torch.Tensor | None,
        rope: Rotation,
        time: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L, width) -> the same shape, for a time (B, channels) where the block has a modulation."""
        if self.adaLN_modulation is None:
            x = x + self.attention_norm2(finite(self.attention(self.attention_norm1(x), seen, rope)))
            return x + self.ffn_norm2(finite(self.feed_forward(self.ffn_norm1(x))))
        mods = self.adaLN_modulation(time)[:, None].chunk(4, dim=-1)
        scale, gate, scale_ff, gate_ff = mods[0] + 1, mods[1].tanh(), mods[2] + 1, mods[3].tanh()
        attended = self.attention(self.attention_norm1(x) * scale, seen, rope)
        x = torch.addcmul(x, gate, self.attention_norm2(finite(attended)))
        fed = self.feed_forward(self.ffn_norm1(x) * scale_ff)
        return torch.addcmul(x, gate_ff, self.ffn_norm2(finite(fed)))


class FinalLayer(nn.Module):
    """The last linear layer, its input scaled by time."""

    def __init__(self, width: int, channels: int, time: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time, width))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> (B, N, channels)."""
        scale = 1 + self.adaLN_modulation(time)[:, None]
        out: torch.Tensor = self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale)
        return out


class TimeEmbedder(nn.Module):
    """Two linear layers with SiLU between them, on sinusoids."""

    def __init__(self, inside: int, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_CHANNELS, inside), nn.SiLU(), nn.Linear(inside, channels))

    def forward(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """t: (B,) in [0, 1000] -> (B, channels) in ``dtype``."""
        out: torch.Tensor = self.mlp(sinusoids(t, TIME_CHANNELS).to(dtype))
        return out


class ZImageTransformer(nn.Module):
    """Predicts noise - image. Modules are named as in the files that ComfyUI reads."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        inside: int,
        channels: int,
        context: int,
        time: int,
        time_inside: int,
        layers: int,
        noise_refiners: int,
        context_refiners: int,
    ) -> None:
        super().__init__()
        per_head = width // heads
        self.axes = (per_head // 4, 3 * per_head // 8, 3 * per_head // 8)  # 32, 48 and 48 of 128
        self.latent_channels = channels // PATCH**2
        self.x_embedder = nn.Linear(channels, width)
        self.noise_refiner = nn.ModuleList(Block(width, heads, inside, time) for _ in range(noise_refiners))
        self.context_refiner = nn.ModuleList(
            Block(width, heads, inside, None) for _ in range(context_refiners)
        )
        self.t_embedder = TimeEmbedder(time_inside, time)
        self.cap_embedder = nn.Sequential(nn.RMSNorm(context, eps=EPS), nn.Linear(context, width))
        self.layers = nn.ModuleList(Block(width, heads, inside, time) for _ in range(layers))
        self.final_layer = FinalLayer(width, channels, time)
        self.x_pad_token = nn.Parameter(torch.zeros(1, width))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, width))

    def forward(
        self, latents: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the velocity (B, C, h, w) of noisy latents of that shape.

        t: (B,) float32 in [0, 1000], 0 without noise; text: (B, L, context); mask: (B, L) bool, True where
        a place is the caption's, which begins at place 0 and has no gaps.
        """
        height, width = latents.shape[2] // PATCH, latents.shape[3] // PATCH
        text, mask = _lengthened(text, mask)
        length = _up(mask.sum(1)).clamp(min=PADDED_TO)  # (B,) of each caption with its padding tokens
        time = self.t_embedder(STEPS - t, latents.dtype)  # the model counts from noise to image

        x = self.x_embedder(_rows(latents))
        real = x.shape[1]
        padding = self.x_pad_token.to(x.dtype).expand(len(x), -real % PADDED_TO, -1)
        x = torch.cat((x, padding), dim=1)
        of_image = rotation(self._image_places(height, width, length, x.shape[1]), self.axes, THETA)
        for block in self.noise_refiner:
            x = block(x, None, of_image, time)

        numbers = torch.arange(text.shape[1], device=text.device)
        seen = numbers < length[:, None]
        caption = torch.where(mask[..., None], self.cap_embedder(text), self.cap_pad_token.to(x.dtype))
        places = F.pad(numbers[None, :, None] + 1, (0, AXES - 1))
        of_text = rotation(places, self.axes, THETA)
        for block in self.context_refiner:
            caption = block(caption, seen, of_text)

        both = torch.cat((x, caption), dim=1)
        all_seen = torch.cat((seen.new_ones(x.shape[:2]), seen), dim=1)
        rope = torch.cat([turns.expand(len(both), -1, -1, -1) for turns in (of_image, of_text)], dim=2)
        for block in self.layers:
            both = block(both, all_seen, rope, time)
        return -_latents(self.final_layer(both[:, :real], time), height, width)

    def _image_places(self, height: int, width: int, length: torch.Tensor, number: int) -> torch.Tensor:
        """Return positions (B, number, 3): behind the text, by row and column; padding is at the origin."""
        places = grid(height, width, AXES, 1, length.device).expand(len(length), -1, -1)
        behind = F.pad((length + 1)[:, None, None].expand(-1, height * width, 1), (0, AXES - 1))
        return F.pad(places + behind, (0, 0, 0, number - height * width))


def z_image_config(sd: Tensors) -> dict[str, Any]:
    """Read the transformer's shape from its weights."""
    width, context = sd["cap_embedder.1.weight"].shape
    time, time_inside = sd["t_embedder.mlp.2.weight"].shape
    return {
        "width": width,
        "heads": width // sd["layers.0.attention.q_norm.weight"].shape[0],
        "inside": sd["layers.0.feed_forward.w1.weight"].shape[0],
        "channels": sd["x_embedder.weight"].shape[1],
        "context": context,
        "time": time,
        "time_inside": time_inside,
        "layers": count(sd, r"layers\.(\d+)\."),
        "noise_refiners": count(sd, r"noise_refiner\.(\d+)\."),
        "context_refiners": count(sd, r"context_refiner\.(\d+)\."),
    }


def _up(n: Any) -> Any:
    """Round up to a multiple of 32."""
    return (n + PADDED_TO - 1) // PADDED_TO * PADDED_TO


def _lengthened(text: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add hidden places up to a multiple of 32: a caption that fills its places has padding tokens too."""
    more = _up(text.shape[1]) - text.shape[1]
    return F.pad(text, (0, 0, 0, more)), F.pad(mask, (0, more))


def _rows(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h w / 4, 4 C), a row for each patch of 2x2, channels innermost."""
    cut = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (B, C, h', p, w', p)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _latents(rows: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Undo `_rows` for so many patches in height and width."""
    cut = rows.unflatten(2, (PATCH, PATCH, -1)).unflatten(1, (height, width))  # (B, h', w', p, p, C)
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
