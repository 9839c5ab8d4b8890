"""Write a large safetensors file tensor by tensor, each made in its turn: memory stays at one of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError

from ..adapters.files import read_metadata
from ..errors import LoraGraftError
from ..families.sources.weights import DTYPES, FileWeights
from ..safefile import tensor_bytes, write_atomically

NAMES = {dtype: name for name, dtype in DTYPES.items()}
Form = tuple[torch.dtype, tuple[int, ...]]


def open_weights(path: Path) -> FileWeights:
    """Open a .safetensors checkpoint; nothing is read yet. Raises LG-TOOL-008."""
    try:
        if path.suffix.lower() != ".safetensors":
            raise TypeError("only .safetensors files are read: other formats can run code")
        return FileWeights(path)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise LoraGraftError(
            "LG-TOOL-008",
            f"The checkpoint '{path.name[:60]}' cannot be read.",
            where=str(path),
            why=str(error)[:200],
            fix="name a complete single-file checkpoint in .safetensors format",
        ) from None


def weights_metadata(path: Path) -> dict[str, str]:
    """Return a checkpoint's metadata without the hashes of its tensors, which are about to change."""
    stale = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
    return {k: v for k, v in read_metadata(path).items() if k not in stale}


def write_stream(
    path: Path,
    forms: Mapping[str, Form],
    make: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
    *,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the tensors ``make(name)`` of these dtypes and shapes, in the order of ``forms``, atomically."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, (dtype, shape) in forms.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def body(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for done, (name, (dtype, shape)) in enumerate(forms.items(), 1):
            tensor = make(name)
            assert tensor.shape == torch.Size(shape) and tensor.dtype == dtype, name
            file.write(tensor_bytes(tensor.detach().cpu().contiguous()))
            tell(done, len(forms))

    write_atomically(path, body)
