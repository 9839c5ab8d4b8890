"""3x3 convolutions by Winograd's minimal filtering F(2x2, 3x3): 16 products for four output pixels, not 36.

    Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A        for a 4x4 tile d of the input and a 3x3 filter g

The products of all channels are 16 matrix products. A two-sided transform is one matrix on the tile laid
out as a row: Bᵀ d B = (Bᵀ ⊗ Bᵀ) vec(d). Stride 1, padding 1, an even height and width, float32: its rounding
error is about twice a plain convolution's, which bf16 could not afford. Winograd 1980; for convolutions Lavin
and Gray 2015 (arXiv:1509.09308).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

Matrix = tuple[tuple[float, ...], ...]


def _on_both_sides(matrix: Matrix) -> Matrix:
    """Return M ⊗ M, which makes vec(M X Mᵀ) of vec(X), rows first."""
    return tuple(tuple(a * b for a in upper for b in lower) for upper in matrix for lower in matrix)


A_T: Matrix = ((1, 1, 1, 0), (0, 1, -1, -1))
B_T: Matrix = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
G: Matrix = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
FROM_TILE, TO_PIXELS, FROM_FILTER = _on_both_sides(B_T), _on_both_sides(A_T), _on_both_sides(G)
FROM_FLIPPED = tuple(row[::-1] for row in FROM_FILTER)  # the filter turned by 180°: for the input's gradient

TILES = 256  # go through together, so that what is made of them stays in the processor's cache
FILTER_NUMBERS = 7_000_000  # of transformed filters at once


class Scratch:
    """Memory for what is made on the way, kept from call to call: new pages would cost more than the sums."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Return a tensor of ``shape`` with any content; the one taken by this name before is overwritten."""
        if isinstance(like, FakeTensor):  # memory is being predicted
            return like.new_empty(shape)
        count, buffer = math.prod(shape), self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name] = like.new_empty(count)
        return buffer[:count].view(shape)


def channels_last(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return an empty map (B, C, H, W), channels last, which is nobody's view."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch
) -> torch.Tensor:
    """Return the convolution: x (B, in, H, W), weight (out, in, 3, 3) -> (B, out, H, W), channels last."""
    return _filtered(x, weight.transpose(0, 1), FROM_FILTER, bias, scratch)


def input_gradient(grad: torch.Tensor, weight: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return dX of `convolution`: grad (B, out, H, W) -> (B, in, H, W), channels last."""
    return _filtered(grad, weight, FROM_FLIPPED, None, scratch)


def _filtered(
    x: torch.Tensor,
    weight: torch.Tensor,
    from_filter: Matrix,
    bias: torch.Tensor | None,
    scratch: Scratch,
) -> torch.Tensor:
    """x: (B, C, H, W), weight: (C, D, 3, 3) -> (B, D, H, W)."""
    batch, channels, height, width = x.shape
    num_out, down, across = weight.shape[1], height // 2, width // 2
    from_tile, to_pixels, filters = (x.new_tensor(m) for m in (FROM_TILE, TO_PIXELS, from_filter))
    tiles = _tiles(x)
    out = channels_last(x, batch, num_out, height, width)
    pixels = out.permute(0, 2, 3, 1).view(batch, down, 2, across, 2, num_out).permute(2, 4, 0, 1, 3, 5)
    parts = _parts(batch, down, across)
    # Where all tiles are one part, a block of filters is made when its turn comes; else all of them before.
    wide = num_out if len(parts) > 1 else max(1, FILTER_NUMBERS // (16 * channels))
    made: torch.Tensor | None = None
    for part in parts:
        taken, into = tiles[part], pixels[part]
        count = math.prod(taken.shape[2:5])
        gathered = scratch.take("gathered", x, *taken.shape).copy_(taken).view(16, -1)
        flat = scratch.take("tiles", x, 16, count * channels)
        torch.mm(from_tile, gathered, out=flat)
        for first in range(0, num_out, wide):
            columns = slice(first, first + wide)
            if made is None or len(parts) == 1:
                made = _transformed(weight[:, columns], filters, scratch)
            products = scratch.take("products", x, 16, count, made.shape[2])
            torch.bmm(flat.view(16, count, channels), made, out=products)
            results = scratch.take("pixels", x, 4, count * made.shape[2])
            torch.mm(to_pixels, products.view(16, -1), out=results)
            into[..., columns] = results.view(2, 2, *taken.shape[2:5], -1)
    if bias is not None:
        out += bias[:, None, None]
    return out


def _tiles(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> a view (4, 4, B, H/2, W/2, C) on the padded map: its tiles overlap by two pixels."""
    batch, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    by_image, by_row, by_pixel, _ = padded.stride()
    return padded.as_strided(
        (4, 4, batch, height // 2, width // 2, channels),
        (by_row, by_pixel, by_image, 2 * by_row, 2 * by_pixel, 1),
    )


def _parts(batch: int, down: int, across: int) -> list[tuple[slice, ...]]:
    """Return which images and which of their rows of tiles go through together, behind two whole axes."""
    images, lines = max(1, TILES // (down * across)), max(1, TILES // across)
    return [
        (slice(None), slice(None), slice(b, b + images), slice(i, i + lines))
        for b in range(0, batch, images)
        for i in range(0, down, lines)
    ]


def _transformed(weight: torch.Tensor, matrix: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """(C, D, 3, 3) -> (16, C, D), read in the order in which the weight lies."""
    lies_turned = weight.stride(0) < weight.stride(1)
    rows = weight.transpose(0, 1) if lies_turned else weight
    filters = scratch.take("filters", weight, 16, rows.shape[0] * rows.shape[1])
    torch.mm(matrix, rows.reshape(-1, 9).t(), out=filters)
    made = filters.view(16, *rows.shape[:2])
    return made.transpose(1, 2) if lies_turned else made
