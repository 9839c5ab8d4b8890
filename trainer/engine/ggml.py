"""The block formats of GGUF files: how bytes become values again, in plain torch on any device.

A weight is cut into blocks of 32 or 256 neighbouring values. Each block holds small integers, and one or
two half-precision numbers (in K types also small integers for every 16 or 32 values) that make values of
them: y = d q, or y = d q - m. The layouts are those of ggml-common.h in llama.cpp (MIT licence). Nothing is
read back from a device, so unpacking can be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

SLICE = 2**22  # values brought to float32 at a time: a large matrix is never there twice


@dataclass(frozen=True)
class BlockType:
    """``values`` in ``size`` bytes; ``unpack`` turns blocks (n, size) uint8 into (n, values) float32."""

    values: int
    size: int
    unpack: Callable[[torch.Tensor], torch.Tensor]


def unpack_blocks(name: str, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values (n * values,) of blocks (n, size) uint8 in ``dtype``, in new memory."""
    kind = BLOCK_TYPES[name]
    out = torch.empty(len(blocks), kind.values, dtype=dtype, device=blocks.device)
    step = SLICE // kind.values
    for start in range(0, len(blocks), step):
        out[start : start + step] = kind.unpack(blocks[start : start + step])
    return out.view(-1)


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return the half-precision number (n, 1) that begins at byte ``start`` of each block."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _shifted(bytes_: torch.Tensor, step: int) -> torch.Tensor:
    """Return (..., 8 / step, k): the bytes (..., k) shifted right by 0, step, 2 step, ... bits."""
    shifts = torch.arange(0, 8, step, dtype=torch.uint8, device=bytes_.device)
    return bytes_.unsqueeze(-2) >> shifts.unsqueeze(-1)


def _nibbles(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return the 32 values of 16 bytes, the lower halves first."""
    return (_shifted(blocks[:, start : start + 16], 4) & 15).flatten(1)


def _fifth_bits(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return bit i of four bytes for value i, as 16 or 0."""
    bits = blocks[:, start : start + 4].unsqueeze(-1) >> torch.arange(
        8, dtype=torch.uint8, device=blocks.device
    )
    return (bits & 1).flatten(1) << 4


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return b[:, 2:].view(torch.int8) * _half(b, 0)


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return (_nibbles(b, 2).float() - 8) * _half(b, 0)


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return _nibbles(b, 4) * _half(b, 0) + _half(b, 2)


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    return ((_nibbles(b, 6) | _fifth_bits(b, 2)).float() - 16) * _half(b, 0)


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    return (_nibbles(b, 8) | _fifth_bits(b, 4)) * _half(b, 0) + _half(b, 2)


def _q2_k(b: torch.Tensor) -> torch.Tensor:
    scales, d, dmin = b[:, :16], _half(b, 80), _half(b, 82)
    q = (_shifted(b[:, 16:80].view(-1, 2, 32), 2) & 3).view(-1, 16, 16)
    scale, minimum = (d * (scales & 15)).unsqueeze(-1), (dmin * (scales >> 4)).unsqueeze(-1)
    return (scale * q - minimum).flatten(1)


def _q3_k(b: torch.Tensor) -> torch.Tensor:
    low = (_shifted(b[:, 96:104], 4) & 15).flatten(1)
    high = (_shifted(b[:, 104:108], 2) & 3).flatten(1)
    scale = _half(b, 108) * ((low | high << 4).float() - 32)  # 16 of six bits
    q = (_shifted(b[:, 32:96].view(-1, 2, 32), 2) & 3).view(-1, 256)
    third = (_shifted(b[:, :32], 1) & 1).flatten(1)  # where it is not set, 4 is taken off
    values = (q | third << 2).float() - 4
    return (scale.unsqueeze(-1) * values.view(-1, 16, 16)).flatten(1)


def _eight_scales(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and minima (n, 8, 1) of Q4_K and Q5_K: each six bits, in the twelve bytes from 4 on."""
    low, middle, high = b[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat([low & 63, high & 15 | (low >> 2) & 48], 1)
    minima = torch.cat([middle & 63, high >> 4 | (middle >> 2) & 48], 1)
    return (_half(b, 0) * scales).unsqueeze(-1), (_half(b, 2) * minima).unsqueeze(-1)


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    scale, minimum = _eight_scales(b)
    q = (_shifted(b[:, 16:].view(-1, 4, 32), 4) & 15).view(-1, 8, 32)
    return (scale * q - minimum).flatten(1)


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    scale, minimum = _eight_scales(b)
    q = (_shifted(b[:, 48:].view(-1, 4, 32), 4) & 15).view(-1, 8, 32)
    fifth = _shifted(b[:, 16:48], 1) & 1
    return (scale * (q | fifth << 4) - minimum).flatten(1)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    low = (_shifted(b[:, :128].view(-1, 2, 64), 4) & 15).view(-1, 8, 32)
    high = (_shifted(b[:, 128:192].view(-1, 2, 32), 2) & 3).view(-1, 8, 32)
    scale = _half(b, 208) * b[:, 192:208].view(torch.int8)
    values = (low | high << 4).float() - 32
    return (scale.unsqueeze(-1) * values.view(-1, 16, 16)).flatten(1)


BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q2_K": BlockType(256, 84, _q2_k),
    "Q3_K": BlockType(256, 110, _q3_k),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
}
