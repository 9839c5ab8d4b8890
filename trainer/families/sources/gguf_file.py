"""The tensors of a GGUF file, mapped and left packed.

The container is llama.cpp's (docs/gguf.md there): a header of typed keys and values, then of names, sizes and
types, then the data. Nothing in it is believed: counts, lengths and places are checked against the file
before they are used. How a denoiser is kept in it is ComfyUI-GGUF's convention.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...engine.ggml import BLOCK_TYPES
from ...engine.packed_tensor import PackedTensor
from ...engine.storage import Packed
from ...errors import LoraGraftError, listed
from .weights import Pages

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST = 2**16  # tensors, keys, or numbers of a list that is kept
MOST_NAME = 2**16  # bytes
MOST_DIMENSIONS = 8
ALIGNMENT = 32  # where the file names none
SHAPE_KEY = "comfy.gguf.orig_shape."  # + a tensor's name: the shape of one that was cut to fit the blocks

PLAIN: Mapping[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
PACKED: Mapping[int, str] = {
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
}
# Types that a file may hold but that are not read: they need tables of many kilobytes, or are rare.
OTHERS: Mapping[int, str] = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
NUMBERS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
TEXT, LIST = 8, 9


class DamagedGGUF(ValueError):
    """A file that is no GGUF file, or not a whole one."""


@dataclass(frozen=True)
class _Entry:
    kind: int
    shape: tuple[int, ...]


class GGUFWeights(Mapping[str, torch.Tensor]):
    """The tensors of a .gguf file, quantised matrices as `PackedTensor`s, and its ``metadata``.

    Lists of texts, which are a tokenizer's, are left out of the metadata. Raises DamagedGGUF or OSError for
    a file that cannot be read, LG-BASE-005 for a type that is not known here.
    """

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size < 24 or file.read(4) != MAGIC:
                raise DamagedGGUF("it does not begin as a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.metadata, entries, places = _read_header(_Header(data, size))
        _refuse_unknown(path, entries)
        self._entries = entries
        self._pages = Pages(path, places)

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        data = self._pages[name]
        if entry.kind in PLAIN:
            return data.view(PLAIN[entry.kind]).view(entry.shape)
        kind = PACKED[entry.kind]
        packed = Packed(kind, torch.Size(entry.shape), {"blocks": data.view(-1, BLOCK_TYPES[kind].size)})
        return PackedTensor(packed) if len(entry.shape) > 1 else packed.unpack(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class _Header:
    """Reads numbers and texts one after the other, never beyond the end."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at = data, size, 4

    def skip(self, count: int) -> int:
        start = self.at
        if count > self.size - start:
            raise DamagedGGUF("it ends inside its header")
        self.at += count
        return start

    def number(self, kind: str) -> Any:
        return struct.unpack_from(f"<{kind}", self.data, self.skip(struct.calcsize(f"<{kind}")))[0]

    def count(self, what: str, most: int) -> int:
        found: int = self.number("Q")
        if found > most:
            raise DamagedGGUF(f"it claims {found} {what}")
        return found

    def text(self, most: int) -> str:
        length = self.count("bytes in one text", min(most, self.size))
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Return a value; None for a list that is not kept."""
        if kind == TEXT:
            return self.text(self.size)
        if kind != LIST:
            return self.number(_number(kind))
        inner = self.number("I")
        if inner == TEXT:
            for _ in range(self.count("texts", self.size // 8)):
                self.skip(self.count("bytes in one text", self.size))
            return None
        if inner == LIST:
            raise DamagedGGUF("it has a list of lists")
        letter, length = _number(inner), self.count("numbers", self.size)
        start = self.skip(length * struct.calcsize(f"<{letter}"))
        return struct.unpack_from(f"<{length}{letter}", self.data, start) if length <= MOST else None


def _number(kind: int) -> str:
    if kind not in NUMBERS:
        raise DamagedGGUF(f"it has a value of the unknown type {kind}")
    return NUMBERS[kind]


def _read_header(header: _Header) -> tuple[dict[str, Any], dict[str, _Entry], dict[str, tuple[int, int]]]:
    version = header.number("I")
    if version not in VERSIONS:
        raise DamagedGGUF(f"its version is {version}; {' and '.join(map(str, VERSIONS))} are read")
    num_tensors, num_keys = header.count("tensors", MOST), header.count("keys", MOST)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = header.text(MOST_NAME)
        metadata[key] = header.value(header.number("I"))
    offsets: dict[str, int] = {}
    entries: dict[str, _Entry] = {}
    for _ in range(num_tensors):
        name = header.text(MOST_NAME)
        if name in entries:
            raise DamagedGGUF(f"it has two tensors '{name[:100]}'")
        sizes = [header.number("Q") for _ in range(_dimensions(header.number("I")))]
        entries[name] = _Entry(header.number("I"), _shape(name, sizes, metadata))
        _check_blocks(name, entries[name].kind, sizes)
        offsets[name] = header.number("Q")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise DamagedGGUF(f"its alignment is {alignment!s:.20}")
    start = -(-header.at // alignment) * alignment
    places = {
        name: (start + offsets[name], start + offsets[name] + _num_bytes(entry))
        for name, entry in entries.items()
        if entry.kind in PLAIN or entry.kind in PACKED
    }
    _check_places(places, header.size)
    return {k: v for k, v in metadata.items() if v is not None}, entries, places


def _dimensions(count: int) -> int:
    if not 1 <= count <= MOST_DIMENSIONS:
        raise DamagedGGUF(f"it has a tensor of {count} dimensions")
    return count


def _shape(name: str, sizes: list[int], metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Return a tensor's shape: GGUF's sizes the other way round, or what the file says it was."""
    shape = metadata.get(SHAPE_KEY + name)
    if shape is None:
        return tuple(reversed(sizes))
    good = isinstance(shape, tuple) and 1 <= len(shape) <= MOST_DIMENSIONS
    if not good or not all(type(n) is int and n > 0 for n in shape) or prod(shape) != prod(sizes):
        raise DamagedGGUF(f"the original shape of '{name[:100]}' is not one of its size")
    return tuple(shape)


def _check_blocks(name: str, kind: int, sizes: list[int]) -> None:
    if min(sizes) < 1 or prod(sizes) > 2**48:
        raise DamagedGGUF(f"'{name[:100]}' has no possible size")
    if kind in PACKED and sizes[0] % BLOCK_TYPES[PACKED[kind]].values:
        raise DamagedGGUF(f"the rows of '{name[:100]}' are no whole blocks")


def _num_bytes(entry: _Entry) -> int:
    if entry.kind in PLAIN:
        return prod(entry.shape) * PLAIN[entry.kind].itemsize
    kind = BLOCK_TYPES[PACKED[entry.kind]]
    return prod(entry.shape) // kind.values * kind.size


def _check_places(places: Mapping[str, tuple[int, int]], size: int) -> None:
    end = 0
    for (start, stop), name in sorted((place, name) for name, place in places.items()):
        if stop > size:
            raise DamagedGGUF(f"it ends before '{name[:100]}' does; the download may be incomplete")
        if start < end:
            raise DamagedGGUF(f"'{name[:100]}' lies over another tensor")
        end = stop


def _refuse_unknown(path: Path, entries: Mapping[str, _Entry]) -> None:
    unknown = {k: e.kind for k, e in entries.items() if e.kind not in PLAIN and e.kind not in PACKED}
    if unknown:
        kinds = sorted({OTHERS.get(kind, f"type {kind}") for kind in unknown.values()})
        raise LoraGraftError(
            "LG-BASE-005",
            f"The file's weights are of the type {listed(kinds, limit=3)}, which is not read.",
            where=f"{path.name}: {listed(unknown, limit=2)}",
            why=f"of GGUF's types these are read: {', '.join(PACKED.values())}, F32, F16 and BF16.",
            fix="load the model in one of these, for instance Q8_0 or Q4_K_M, or as fp8 or bf16",
        )
