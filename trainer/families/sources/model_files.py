"""Open a model's file, or a folder of its shards: safetensors or GGUF, mapped, what is quantised packed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError

from ...errors import LoraGraftError
from ...paths import of_other_system
from ..base import Tensors
from .gguf_file import DamagedGGUF, GGUFWeights
from .quantised import read_quantised
from .sources import Source
from .weights import FileWeights, joined

SAFETENSORS, GGUF = (".safetensors", ".sft"), ".gguf"
# Variants of the same weights, which a folder may hold beside them.
VARIANTS = (".fp16", ".non_ema", ".bf16", ".fp32", ".ema")
INDEX = "*.safetensors.index.json"
MOST_INDEX = 2**26  # bytes
SHARD = re.compile(r"[\w.-]+\.safetensors")
CAN_RUN_CODE = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def read_source(path: Path) -> Source:
    """Open one file; raises LG-BASE-001, -005."""
    refuse_other_formats(path)
    return Source(path.name, read_file(path, where=path.name))


def read_file(path: Path, *, where: str) -> Tensors:
    """Return a file's tensors, mapped; raises LG-BASE-001, -005."""
    try:
        if path.suffix.lower() == GGUF:
            return GGUFWeights(path)
        weights = FileWeights(path)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        if isinstance(error, LoraGraftError):
            raise
        kind = "GGUF" if isinstance(error, DamagedGGUF) else "safetensors"
        raise LoraGraftError(
            "LG-BASE-001",
            f"The base model '{where}' cannot be read.",
            where=str(path),
            why=str(error)[:200],
            fix=f"check that the file is a complete {kind} file; download or copy it again",
        ) from None
    return read_quantised(weights, weights.metadata, where=where)


def read_folder(folder: Path) -> Tensors:
    """Return the tensors of a folder of safetensors files, the shards that its index names if it has one."""
    files = _of_index(folder) or sorted(folder.glob("*.safetensors"))
    # a folder may hold the same weights several times
    files = [f for f in files if not any(v in f.name for v in VARIANTS)] or _one_variant(files)
    if not files:
        raise LoraGraftError(
            "LG-BASE-001",
            f"The diffusers folder has no safetensors file in '{folder.name}'.",
            where=str(folder),
            why="only .safetensors weights are read: other formats can run code when they are opened.",
            fix="save the model again with safe_serialization, or name a single .safetensors checkpoint",
        )
    return joined([read_file(file, where=f"{folder.name}/{file.name}") for file in files])


def refuse_other_formats(path: Path) -> None:
    """Raise LG-BASE-001 for what is no file, or no safetensors or GGUF file by its name."""
    if not path.exists():
        raise LoraGraftError(
            "LG-BASE-001",
            f"The base model '{path.name}' does not exist.",
            where=str(path),
            why=f"there is no such file or folder{of_other_system(str(path))}; models are not fetched by a "
            "hub's name.",
            fix="check the path (quotes and spaces at its ends count), or download the model first",
        )
    suffix = path.suffix.lower()
    if suffix not in (*SAFETENSORS, GGUF):
        why = "only .safetensors and .gguf files are read."
        raise LoraGraftError(
            "LG-BASE-001",
            f"The base model '{path.name}' is not a .safetensors file.",
            where=str(path),
            why=f"a {suffix} can run code when it is opened." if suffix in CAN_RUN_CODE else why,
            fix="convert it to .safetensors (in ComfyUI: load it, then CheckpointSave), or use another file",
        )


def _of_index(folder: Path) -> list[Path]:
    """Return the shards that a folder's index names, none of them outside of it."""
    indices = sorted(folder.glob(INDEX))
    plain = [i for i in indices if not any(v in i.name for v in VARIANTS)] or indices
    if not plain:
        return []
    index = plain[0]
    try:
        if index.stat().st_size > MOST_INDEX:
            raise ValueError(f"{index.stat().st_size} bytes")
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(table.values())) if isinstance(table, Mapping) else []
        if not names or not all(
            isinstance(n, str) and re.fullmatch(r"[\w.-]+\.safetensors", n) for n in names
        ):
            raise ValueError("it names no safetensors files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoraGraftError(
            "LG-BASE-001",
            f"The list of files in '{folder.name}' cannot be read.",
            where=str(index),
            why=str(error)[:200],
            fix="download or copy the folder again",
        ) from None
    return [folder / name for name in names]


def _one_variant(files: list[Path]) -> list[Path]:
    """Return the files of the first variant that is there."""
    for variant in VARIANTS:
        found = [f for f in files if variant in f.name]
        if found:
            return found
    return []
