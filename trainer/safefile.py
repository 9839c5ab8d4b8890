"""Write safetensors files and small text files so that a reader never meets half of one.

The format is written here, not by the library, because a LoRA's bytes must be a function of its
content: the header's keys are sorted, and nothing of the clock or the machine enters. Files appear
under their name only when complete and on disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch

# A write fails with one of these where the disk, or the user's share of it, is full.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def safetensors_parts(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[torch.Tensor]]:
    """Return the header and the contiguous CPU tensors in file order (sorted by name)."""
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    ordered, offset = [], 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        ordered.append(tensor)
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, ordered


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous CPU tensor's bytes without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; equal content gives equal bytes."""
    header, ordered = safetensors_parts(tensors, metadata)

    def body(file: IO[bytes]) -> None:
        file.write(header)
        for tensor in ordered:
            file.write(tensor_bytes(tensor))

    write_atomically(path, body)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, newlines as they are."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, body: Callable[[IO[bytes]], object]) -> None:
    """Let ``body`` write a temporary file beside ``path``, sync it to disk, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{temporary_start(path.name)}{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("xb") as file:
            body(file)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def temporary_start(name: str) -> str:
    """Return how the name begins under which a file is written; eight hexadecimal digits follow."""
    return f"{name[:100]}.tmp-"


def replace(source: Path, target: Path) -> None:
    """Rename over ``target``; on Windows a virus scanner may hold a file for a moment, so try for 2 s."""
    for attempt in range(10):
        try:
            source.replace(target)
            return
        except PermissionError:
            if os.name != "nt" or attempt == 9:
                raise
            time.sleep(0.2)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
