"""How quantised weights lie in model files, and become values again: one scale a tensor, row or block.

"fp8" is e4m3 or e5m2 (Micikevicius et al. 2022), as it is or times a scale; "mxfp8" and "nvfp4" have scales
for blocks of a row (OCP's Microscaling formats, 2023, and NVIDIA's); GGUF's types lie in `ggml`. The names
are ComfyUI's and llama.cpp's. Nothing is read back from a device, so unpacking can be captured.

All are row-wise: the first dimension of a weight's tensors is its rows, or a number of blocks for each. So
rows can be taken, looked up and put together without unpacking them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .ggml import BLOCK_TYPES, SLICE, unpack_blocks

Tensors = dict[str, torch.Tensor]
Unpack = Callable[[Tensors, torch.Size, torch.dtype], torch.Tensor]
ROTATIONS = (4, 16, 64, 256, 1024)  # the sizes of ConvRot's groups: powers of four


def _fp8(kind: torch.dtype) -> Unpack:
    def unpack(packed: Tensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return _scaled(fp8_values(packed["codes"], kind, dtype).view(shape), packed)

    return unpack


def fp8_values(codes: torch.Tensor, kind: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers that bytes stand for, in ``dtype``, in new memory."""
    if codes.device.type != "mps":
        return codes.view(kind).to(dtype)
    # Apple's GPUs have no fp8. Either is the upper bits of a half: e5m2 has its exponent, e4m3 one that
    # is narrower and counts from another number, which a factor makes up for.
    bits = codes.to(torch.int16)
    if kind is torch.float8_e5m2:
        return (bits << 8).view(torch.float16).to(dtype)
    halves = ((bits & 128) << 8 | (bits & 127) << 7).view(torch.float16)
    return halves.to(torch.float32).mul_(256).to(dtype)


def _scaled(values: torch.Tensor, packed: Tensors) -> torch.Tensor:
    """Multiply values by the scale of their row in place, where there is one."""
    if "scale" not in packed:
        return values
    return values.mul_(packed["scale"].view(-1, *[1] * (values.ndim - 1)))


def _int8(packed: Tensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return _scaled(packed["codes"].to(torch.float32).view(shape), packed).to(dtype)


def _int8_rotated(group: int) -> Unpack:
    """Turn a ConvRot weight back: groups of a row were multiplied by a Hadamard matrix, its own inverse."""

    def unpack(packed: Tensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        values, size = _int8(packed, shape, torch.float32).view(-1, group), 1
        while size < group:  # the matrix is a Kronecker power: its factors one after the other
            a, b, c, d = values.view(-1, group // (4 * size), 4, size).unbind(2)
            values = torch.stack([a + b + c - d, a + b - c + d, a - b + c + d, b + c + d - a], 2)
            size *= 4
        return (values / group**0.5).view(shape).to(dtype)

    return unpack


def _mxfp8(packed: Tensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """32 neighbours of e4m3 share an exponent, a byte that counts from 127."""
    exponents = packed["exponents"]
    values = fp8_values(packed["codes"], torch.float8_e4m3fn, torch.float32).view(*exponents.shape, 32)
    return torch.ldexp(values, exponents.to(torch.int32).unsqueeze(-1) - 127).view(shape).to(dtype)


def _nvfp4(packed: Tensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """16 neighbours of e2m1, two a byte, the upper half first, share an e4m3 scale; and all a number."""
    codes = torch.stack([packed["codes"] >> 4, packed["codes"] & 15], -1).view(*packed["scales"].shape, 16)
    size, exponent = (codes & 1).float(), (codes >> 1 & 3).to(torch.int32)
    # below 1 the numbers are 0 and 1/2; from there 1 + half a step times a power of two
    values = torch.where(exponent == 0, size / 2, torch.ldexp(1 + size / 2, exponent - 1))
    values = torch.where(codes >= 8, -values, values)
    scales = fp8_values(packed["scales"], torch.float8_e4m3fn, torch.float32) * packed["scale"].view(-1, 1)
    return (values * scales.unsqueeze(-1)).view(shape).to(dtype)


def _blocks(name: str) -> Unpack:
    def unpack(packed: Tensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return unpack_blocks(name, packed["blocks"], dtype).view(shape)

    return unpack


def _sliced(unpack: Unpack) -> Unpack:
    """Unpack some rows at a time: what is computed in float32 on the way is small."""

    def by_rows(packed: Tensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        step = max(1, SLICE // max(1, shape[1:].numel()))
        if shape[0] <= step:
            return unpack(packed, shape, dtype)
        out = torch.empty(shape, dtype=dtype, device=packed["codes"].device)
        for start in range(0, shape[0], step):
            rows = out[start : start + step]
            part = {name: tensor[start : start + step] for name, tensor in packed.items()}
            rows.copy_(unpack(part, rows.shape, dtype))
        return out

    return by_rows


FILE_FORMATS: dict[str, Unpack] = {
    "float8_e4m3fn": _fp8(torch.float8_e4m3fn),
    "float8_e5m2": _fp8(torch.float8_e5m2),
    "int8_tensorwise": _sliced(_int8),
    **{f"int8_convrot_{group}": _sliced(_int8_rotated(group)) for group in ROTATIONS},
    "mxfp8": _sliced(_mxfp8),
    "nvfp4": _sliced(_nvfp4),
    **{name: _blocks(name) for name in BLOCK_TYPES},
}
