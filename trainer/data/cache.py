"""A content-addressed store of tensors on disk: latents and text embeddings, made once.

The key is a hash over everything that the tensors depend on, so nothing in the store can be stale:
what changed has another key. Each file carries a checksum over its content, and what fails it is
made anew. Writers need no lock: each writes a file of its own and renames it into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..errors import LoraGraftError
from ..safefile import DISK_FULL, tensor_bytes, write_safetensors

# Part of every key: raise it when cached content would be computed differently.
VERSION = 2
LEFTOVER_AFTER_S = 24 * 3600


def key_of(**ingredients: Any) -> str:
    """Return the key of tensors that depend on these values and on nothing else.

    Values: str, int, float, bool, None, and lists, tuples or string-keyed dicts of them. Order of
    the names does not matter; 1, 1.0, True and "1" are four different values. Raises TypeError else.
    """
    _check_plain(ingredients)
    text = json.dumps([VERSION, ingredients], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class TensorCache:
    """The store in one folder; ``notes`` collects what the user should know (entries made anew)."""

    key_of = staticmethod(key_of)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._sweep()

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """Return the tensors (CPU) stored under ``key``, or None where there are none or they are damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.notes.append(f"Cache entry {path.name} cannot be read ({error.strerror}); it is made anew.")
            return None
        tensors = _verified(data, key)
        if tensors is None:
            self.notes.append(f"Cache entry {path.name} is damaged; it is made anew.")
        return tensors

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Store tensors under ``key``; a reader sees the whole entry or none. Raises LG-DATA-011."""
        path = self._path(key)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            write_safetensors(path, plain, {"key": key, "checksum": _checksum(plain, key)})
        except OSError as error:
            is_full = error.errno in DISK_FULL
            do = "free some space" if is_full else "allow writing there"
            raise LoraGraftError(
                "LG-DATA-011",
                "The cache of encoded images and captions cannot be written.",
                where=f"{path.parent} ({error.strerror or type(error).__name__})",
                why="the disk is full." if is_full else "nothing can be written there.",
                fix=f"{do}, or set cache_latents to false",
            ) from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _sweep(self) -> None:
        """Remove what a killed process left half-written a day ago or earlier."""
        for path in self.folder.glob("??/*.safetensors.tmp-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > LEFTOVER_AFTER_S:
                    path.unlink()


def _verified(data: bytes, key: str) -> dict[str, torch.Tensor] | None:
    try:
        tensors = load(data)
        (length,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        sound = metadata["checksum"] == _checksum(tensors, key)
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error):
        return None
    return tensors if sound else None


def _checksum(tensors: dict[str, torch.Tensor], key: str) -> str:
    """Hash the key and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(key.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(f"{len(head)}:{head}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _check_plain(value: Any) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise TypeError(f"a cache key's dict has names of text, not {name!r}")
            _check_plain(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(item)
    elif not (value is None or type(value) in (str, int, float, bool)):
        raise TypeError(f"a cache key is made of plain values, not {type(value).__name__}")
