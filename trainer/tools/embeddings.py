"""Textual inversion embeddings: vectors that stand for a word in a prompt, named after their file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..adapters.files import read_tensors
from ..errors import LoraGraftError, listed
from ..parts import Parts

# The tensor's name in a file: webui's, ComfyUI's for its CLIP-L encoder, and the bare one of others.
NAMES = ("emb_params", "clip_l", "*")


def read_embedding(path: Path, width: int) -> torch.Tensor:
    """Return the vectors (n, width) of an embedding file; raises LG-TOOL-015 or LG-SAVE-004."""
    if path.suffix.lower() != ".safetensors":
        raise _unfit(path, "only .safetensors files are read: other formats can run code.")
    tensors = read_tensors(path)
    name = next((name for name in NAMES if name in tensors), None)
    if name is None and len(tensors) == 1:  # diffusers names the tensor after the word
        name = next(iter(tensors))
    if name is None:
        raise _unfit(path, f"none of its tensors ({listed(tensors, limit=3)}) is named {', '.join(NAMES)}.")
    vectors = tensors[name].float()
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise _unfit(path, f"it holds {tuple(vectors.shape)}, the text encoder reads vectors of {width}.")
    return vectors


def add_embeddings(parts: Parts, files: Sequence[Path]) -> None:
    """Give each file's vectors ids beyond the vocabulary, to be used by the file's name in a prompt."""
    if not files:
        return
    table = parts.text_encoder.get_input_embeddings()  # type: ignore[operator]
    rows = [table.weight]
    first = len(table.weight)
    words = dict(parts.words)
    for path in files:
        vectors = read_embedding(path, table.weight.shape[1])
        words[path.stem.lower()] = tuple(range(first, first + len(vectors)))
        rows.append(vectors.to(table.weight))
        first += len(vectors)
    table.weight = torch.nn.Parameter(torch.cat(rows), requires_grad=False)
    table.num_embeddings = first
    parts.words = words


def _unfit(path: Path, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-TOOL-015",
        f"'{path.name[:60]}' is no embedding for this text encoder.",
        where=str(path),
        why=why,
        fix="name a textual inversion for the base model's architecture, in .safetensors format",
    )
