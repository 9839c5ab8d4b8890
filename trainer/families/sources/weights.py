"""Weights that are brought when asked for: a file's tensors, and views of any tensors under other names.

A file is mapped in stretches of neighbouring tensors. Each lets its pages go with the last user of its
tensors, so that converting a model keeps a few stretches twice in memory, not the file beside its copy.
A map for each tensor would take a descriptor each, and systems allow as few as 256.
"""

from __future__ import annotations

import json
import mmap
import struct
import threading
import weakref
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,  # exponents alone: their bytes
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
STRETCH = 64 * 2**20  # bytes at least, but for a file's last
MOST_STRETCHES = 64  # in a file
Place = tuple[int, int]  # a file's first byte, and the one after the last


class Pages:
    """A file's bytes at named places; what is read stays that file's, whatever takes its name.

    Who asks twice, or from another thread, gets the same memory while it is in use.
    """

    def __init__(self, path: Path, places: Mapping[str, Place]) -> None:
        self._file = path.open("rb")
        weakref.finalize(self, self._file.close)
        self._places, self._stretches = dict(places), stretches(places)
        self._maps: weakref.WeakValueDictionary[Place, mmap.mmap] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return the bytes (n,) uint8 at a place; writing to them does not reach the file."""
        start, end = self._places[name]
        if start == end:
            return torch.empty(0, dtype=torch.uint8)
        stretch = self._stretches[name]
        page = stretch[0] // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self._lock:
            mapped = self._maps.get(stretch)
            if mapped is None:
                size = stretch[1] - page
                mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY, offset=page)
                self._maps[stretch] = mapped
        return torch.frombuffer(mapped, dtype=torch.uint8, count=end - start, offset=start - page)


class FileWeights(Mapping[str, torch.Tensor]):
    """The tensors of a .safetensors file, and its ``metadata``; see `Pages`.

    Raises SafetensorError or OSError for a file that is damaged, TypeError for an unknown dtype.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt"):  # the library checks the header against the file
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        self.metadata: Mapping[str, str] = header.pop("__metadata__", None) or {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise TypeError(f"{name} has the unknown dtype {entry['dtype']}")
        start = 8 + length
        places = {
            name: (start + e["data_offsets"][0], start + e["data_offsets"][1]) for name, e in header.items()
        }
        self._tensors = {name: (DTYPES[entry["dtype"]], entry["shape"]) for name, entry in header.items()}
        self._pages = Pages(path, places)

    def __getitem__(self, name: str) -> torch.Tensor:
        dtype, shape = self._tensors[name]
        return self._pages[name].view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def stretches(places: Mapping[str, Place]) -> dict[str, Place]:
    """Cut a file into at most MOST_STRETCHES; return which one each tensor that is not empty lies in."""
    ordered = sorted((place, name) for name, place in places.items() if place[0] < place[1])
    size = max(STRETCH, -(-sum(end - start for (start, end), _ in ordered) // MOST_STRETCHES))
    found: dict[str, Place] = {}
    inside: list[str] = []
    first = 0
    for i, ((start, end), name) in enumerate(ordered):
        first = first if inside else start
        inside.append(name)
        if end - first >= size or i == len(ordered) - 1:
            found.update(dict.fromkeys(inside, (first, end)))
            inside = []
    return found


def joined(files: Sequence[Mapping[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
    """Return the tensors of all files; of two with one name the later file's."""
    return ChainMap(*cast("list[Any]", files[::-1]))  # nothing writes to it, so it may hold plain mappings


@dataclass(frozen=True)
class Renamed(Mapping[str, torch.Tensor]):
    """Views of ``source`` under new names (new to old).

    Those in ``matrices`` lose a 1x1 kernel, those in ``kernels`` get one.
    """

    source: Mapping[str, torch.Tensor]
    names: Mapping[str, str]
    matrices: frozenset[str] = frozenset()
    kernels: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.source[self.names[name]]
        if name in self.kernels:
            return weight[..., None, None]
        return weight.reshape(weight.shape[:2]) if name in self.matrices else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
