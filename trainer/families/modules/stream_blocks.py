"""Flux's blocks with modulation from outside: two streams, image and text, then one, that attend together.

So Chroma and Flux.2 have them. Modules are named and cut as in their files: query, key and value are one
matrix, and a single block's matrices hold the attention's and the MLP's rows. Hence a host's tensors fit
as they are, and a LoRA's modules are those of the trainers that read these files. (diffusers cuts query,
key and value apart, and its Chroma adds 0 or 1 to the scores where padding has to be hidden.)

A modulation is (B, n, D): shift, scale and gate, for attention and, in double blocks, again for the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ...engine.made import made, through
from ...engine.makes import SWIGLU, Activated, Activation, Beside, Gelu, Modulated
from .rotary import Rotation, rotate

EPS = 1e-6
FP16_LIMIT = 65504.0
MODULATED = Modulated(EPS)
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query, key, value, each (B, heads, L, D / heads)


class QKNorm(nn.Module):
    """The scales of queries' and keys' root mean square norms (Zhang & Sennrich 2019), (D / heads) each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_norm = nn.RMSNorm(channels, eps=EPS)
        self.key_norm = nn.RMSNorm(channels, eps=EPS)

    def forward(self, heads: Heads) -> Heads:
        """Return query and key normalised, and the value."""
        q, k, v = heads
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    """One stream's layers around the attention that all streams share."""

    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.norm = QKNorm(width // heads)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> Heads:
        """Return query, key and value for a stream (B, L, width), which is modulated first."""
        normed: Heads = self.norm(split_heads(through(self.qkv, MODULATED, x, shift, scale), self.heads))
        return normed


class MLP(nn.Sequential):
    """Two linear layers and what is between them; the second one makes its input again when it needs it."""

    def __init__(self, width: int, inside: int, *, gated: bool, bias: bool) -> None:
        first = nn.Linear(width, 2 * inside if gated else inside, bias=bias)
        super().__init__(first, nn.Identity(), nn.Linear(inside, width, bias=bias))  # numbered as in files
        self.activated = Activated(activation(gated))

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Return (B, L, width) for a stream of that shape, which is modulated first."""
        return through(self[2], self.activated, through(self[0], MODULATED, x, shift, scale))


def activation(gated: bool) -> Activation:
    """Return the MLP's activation: SwiGLU, which halves the channels, or GELU."""
    return SWIGLU if gated else Gelu("tanh")


class DoubleBlock(nn.Module):
    """Two streams with weights of their own that attend to each other."""

    def __init__(self, width: int, heads: int, inside: int, *, gated: bool, bias: bool) -> None:
        super().__init__()
        self.img_attn = SelfAttention(width, heads, bias=bias)
        self.img_mlp = MLP(width, inside, gated=gated, bias=bias)
        self.txt_attn = SelfAttention(width, heads, bias=bias)
        self.txt_mlp = MLP(width, inside, gated=gated, bias=bias)

    def forward(
        self,
        img: torch.Tensor,
        txt: torch.Tensor,
        img_mod: torch.Tensor,
        txt_mod: torch.Tensor,
        rope: Rotation,
        seen: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image (B, N, width) and text (B, L, width) for modulations (B, 6, width).

        ``rope`` and ``seen`` are those of text and image, in this order; see `attend`.
        """
        img_mods, txt_mods = img_mod[:, :, None].unbind(1), txt_mod[:, :, None].unbind(1)
        of_txt = self.txt_attn(txt, *txt_mods[:2])
        of_img = self.img_attn(img, *img_mods[:2])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_txt, of_img, strict=True))
        to_txt, to_img = attend(q, k, v, rope, seen).split((txt.shape[1], img.shape[1]), dim=1)
        img = torch.addcmul(img, img_mods[2], self.img_attn.proj(to_img))
        img = torch.addcmul(img, img_mods[5], self.img_mlp(img, *img_mods[3:5]))
        txt = torch.addcmul(txt, txt_mods[2], self.txt_attn.proj(to_txt))
        txt = torch.addcmul(txt, txt_mods[5], self.txt_mlp(txt, *txt_mods[3:5]))
        return finite(img), finite(txt)


class SingleBlock(nn.Module):
    """One stream, text before image, with attention and MLP side by side (Dehghani et al. 2023)."""

    def __init__(self, width: int, heads: int, inside: int, *, gated: bool, bias: bool) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.linear1 = nn.Linear(width, 3 * width + (2 * inside if gated else inside), bias=bias)
        self.linear2 = nn.Linear(width + inside, width, bias=bias)
        self.norm = QKNorm(width // heads)
        self.beside = Beside(activation(gated))

    def forward(
        self, x: torch.Tensor, mod: torch.Tensor, rope: Rotation, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the stream (B, L + N, width) for a modulation (B, 3, width)."""
        shift, scale, gate = mod[:, :, None].unbind(1)
        *qkv, inside = cut(through(self.linear1, MODULATED, x, shift, scale), self.heads, self.width)
        q, k, v = self.norm((qkv[0], qkv[1], qkv[2]))
        out = through(self.linear2, self.beside, attend(q, k, v, rope, seen), inside)
        return finite(torch.addcmul(x, gate, out))


def split_heads(qkv: torch.Tensor, heads: int) -> Heads:
    """(B, L, 3 D) -> query, key and value, each (B, heads, L, D / heads)."""
    q, k, v, _ = cut(qkv, heads, qkv.shape[-1] // 3)
    return q, k, v


def cut(rows: torch.Tensor, heads: int, width: int) -> tuple[torch.Tensor, ...]:
    """(B, L, 3 D + n) -> query, key and value, each (B, heads, L, D / heads), and the rest (B, L, n)."""
    parts: tuple[torch.Tensor, ...] = _Cut.apply(rows, heads, width)
    return parts


class _Cut(torch.autograd.Function):
    """Views, whose gradients are written side by side once, where autograd would fill and add up zeros."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, heads: int, width: int) -> tuple[torch.Tensor, ...]:
        ctx.cut = (heads, width)
        return _views(rows, heads, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (batch, heads, length, channels), rest = grads[0].shape, grads[-1].shape[-1]
        whole = grads[0].new_empty(batch, length, 3 * heads * channels + rest)
        for part, grad in zip(_views(whole, *ctx.cut), grads, strict=True):
            part.copy_(grad)
        return whole, None, None


def _views(rows: torch.Tensor, heads: int, width: int) -> tuple[torch.Tensor, ...]:
    q, k, v = rows[..., : 3 * width].unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v, rows[..., 3 * width :]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rotation, seen: torch.Tensor | None
) -> torch.Tensor:
    """Return the attention's result (B, L, D) for turned queries and keys.

    ``seen`` (B, L) bool says which places are attended to; None: all are. Nobody reads what a hidden place
    gets.
    """
    mask = None if seen is None else seen[:, None, None]
    out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the layer norm of x, scaled and shifted (adaptive layer norm, Peebles & Xie 2023)."""
    return made(MODULATED, x, shift, scale)


def finite(x: torch.Tensor) -> torch.Tensor:
    """Keep the residual stream in float16's range, which it leaves in a few layers."""
    return x.clip(-FP16_LIMIT, FP16_LIMIT) if x.dtype == torch.float16 else x


def packed(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, C, h, w) -> (B, h w / patch^2, C patch^2), a row for each square patch, channels outermost."""
    cut = latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h', p, w', p)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(rows: torch.Tensor, patch: int, height: int, width: int) -> torch.Tensor:
    """Undo `packed` for latents of this height and width."""
    cut = rows.unflatten(2, (-1, patch, patch)).unflatten(1, (height // patch, width // patch))
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
