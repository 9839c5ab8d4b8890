"""Quantised copies of weights for tests: GGUF files written by hand, and ComfyUI's ways with fp8 and int8."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loragraft.trainer.engine.ggml import BLOCK_TYPES, unpack_blocks
from loragraft.trainer.engine.packed_tensor import PackedTensor
from loragraft.trainer.engine.storage import Packed

Tensors = Mapping[str, torch.Tensor]
TYPE_IDS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
}
TYPE_IDS |= {"Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "BF16": 30, "IQ4_XS": 23, "MXFP4": 39, "I32": 26}
ALIGNMENT = 32


def text(value: str) -> bytes:
    """Return a text as GGUF keeps it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(value: Any) -> bytes:
    """Return a value with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def gguf_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]],
    metadata: Mapping[str, Any] | None = None,
    *,
    offsets: Mapping[str, int] | None = None,
    version: int = 3,
) -> bytes:
    """Return a GGUF file; a tensor is (type, shape, data), its place the next free one if none is given."""
    metadata = {"general.architecture": "sd1", **(metadata or {})}
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    header += b"".join(text(k) + entry(v) for k, v in metadata.items())
    body = b""
    for name, (kind, shape, data) in tensors.items():
        at = len(body) if offsets is None or name not in offsets else offsets[name]
        header += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        header += struct.pack("<IQ", TYPE_IDS[kind], at)
        body += data + bytes(-len(data) % ALIGNMENT)
    return header + bytes(-len(header) % ALIGNMENT) + body


def q8_0(weight: torch.Tensor) -> bytes:
    """Return a weight as Q8_0's blocks."""
    blocks = weight.detach().float().reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    codes = torch.where(scale == 0, 0.0, blocks / scale.float().clamp(min=1e-30)).round().clamp(-127, 127)
    return torch.cat([scale.view(torch.uint8), codes.to(torch.int8).view(torch.uint8)], 1).numpy().tobytes()


def random_blocks(kind: str, values: int, seed: int = 0) -> bytes:
    """Return blocks of a type with random bits, but for the numbers that would be infinite or huge."""
    block, generator = BLOCK_TYPES[kind], np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (values // block.values, block.size), dtype=np.uint8)
    # A block of zeros everywhere else tells where its half-precision numbers are.
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = (
            generator.uniform(-0.01, 0.01, (len(blocks), 1)).astype(np.float16).view(np.uint8)
        )
    return blocks.tobytes()


HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def write_gguf(path: Path, weights: Tensors) -> dict[str, torch.Tensor]:
    """Write weights as Q8_0 where they are matrices or kernels, else as F32; return what the file means.

    A kernel whose rows are no whole blocks is cut to fit, as ComfyUI-GGUF's converter does.
    """
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    metadata: dict[str, Any] = {}
    meant = {}
    for name, weight in weights.items():
        shape = tuple(weight.shape)
        if weight.ndim < 2 or weight.numel() % 32:
            data = weight.float().contiguous()
            tensors[name], meant[name] = ("F32", shape or (1,), data.numpy().tobytes()), data
            continue
        data = q8_0(weight)
        if shape[-1] % 32:
            metadata[f"comfy.gguf.orig_shape.{name}"] = shape
            tensors[name] = ("Q8_0", (weight.numel() // 32, 32), data)
        else:
            tensors[name] = ("Q8_0", shape, data)
        blocks = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 34)
        meant[name] = unpack_blocks("Q8_0", blocks, torch.float32).view(shape)
    path.write_bytes(gguf_bytes(tensors, metadata))
    return meant


def fp8(weights: Tensors, dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, torch.Tensor]:
    """Return all weights as fp8 numbers, with no scale."""
    return {name: weight.to(dtype) for name, weight in weights.items()}


def scaled_fp8(
    weights: Tensors, how: str
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, torch.Tensor]]:
    """Return matrices as fp8 times a scale: tensors, metadata, and what they mean.

    ``how``: "old" (scaled_fp8 and scale_weight), "layer" (comfy_quant), or "file" (a list in the metadata).
    """
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, str]] = {}
    meant = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if weight.ndim != 2 or layer == name:
            tensors[name] = meant[name] = weight
            continue
        scale = weight.float().abs().amax().clamp(min=1e-12) / 448
        codes = (weight.float() / scale).to(torch.float8_e4m3fn)
        tensors[name], meant[name] = codes, codes.float() * scale
        tensors[f"{layer}.{'scale_weight' if how == 'old' else 'weight_scale'}"] = scale
        layers[layer] = {"format": "float8_e4m3fn"}
        if how == "layer":
            tensors[f"{layer}.comfy_quant"] = as_bytes(layers[layer])
    if how == "old":
        tensors["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if how == "file" else {}
    return tensors, metadata, meant


def as_bytes(value: Any) -> torch.Tensor:
    """Return JSON as a tensor of bytes."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def packed_of(kind: str, rows: int = 6, columns: int = 512) -> PackedTensor:
    """Return a packed weight of any format, with random numbers in it."""
    torch.manual_seed(0)
    shape = torch.Size((rows, columns))
    codes, exponents = torch.randint(0, 120, shape, dtype=torch.uint8), torch.full((rows, columns // 32), 125)
    row = torch.rand(rows) + 0.5
    tensors = {
        "float8_e4m3fn": {"codes": codes, "scale": row},
        "float8_e5m2": {"codes": codes},
        "int8_tensorwise": {"codes": codes.view(torch.int8), "scale": row},
        "mxfp8": {"codes": codes, "exponents": exponents.to(torch.uint8)},
        "nvfp4": {
            "codes": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
            "scales": torch.randint(40, 80, (rows, columns // 16), dtype=torch.uint8),
            "scale": row,
        },
    }
    if kind.startswith("int8_convrot"):
        columns = max(columns, int(kind.rpartition("_")[2]))
        shape = torch.Size((rows, columns))
        codes = torch.randint(-100, 100, shape, dtype=torch.int8)
        return PackedTensor(Packed(kind, shape, {"codes": codes, "scale": row}))
    if kind in tensors:
        return PackedTensor(Packed(kind, shape, tensors[kind]))
    data = bytearray(random_blocks(kind, shape.numel()))
    blocks = torch.frombuffer(data, dtype=torch.uint8).view(-1, BLOCK_TYPES[kind].size)
    return PackedTensor(Packed(kind, shape, {"blocks": blocks}))
