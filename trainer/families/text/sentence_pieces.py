"""A SentencePiece model as a tokenizer (Kudo & Richardson 2018): Gemma's, kept in ComfyUI's weight files.

ComfyUI has no folder with it. Its bytes are written to a folder named by their hash among the system's
temporary files, so that a base can be opened again from what lies on the disk.
"""

from __future__ import annotations

import hashlib
import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import LoraGraftError
from ...safefile import write_atomically

TENSOR = "spiece_model"  # of bytes, in a file of weights
FILE = "tokenizer.model"
INSIDE = "tokenizer"  # the folder's name, as in a diffusers folder


class SentencePieces:
    """Reads texts as transformers' tokenizer of the same model does: a start, the pieces, no end."""

    def __init__(self, file: Path) -> None:
        try:
            library = importlib.import_module("sentencepiece")
        except ImportError as error:
            raise LoraGraftError(
                "LG-BASE-007",
                "The tokenizer cannot be read without the package sentencepiece.",
                where=str(file),
                why=f"{FILE} is a SentencePiece model.",
                fix="pip install sentencepiece, or name a folder with tokenizer.json and its settings",
            ) from error
        self._model: Any = library.SentencePieceProcessor(model_proto=file.read_bytes())
        self.pad_token_id = int(self._model.pad_id())
        self._start = int(self._model.bos_id())

    def __len__(self) -> int:
        return int(self._model.get_piece_size())

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Return a text's token ids under "input_ids"."""
        return {"input_ids": [self._start, *self._model.encode(text)]}


def keep_pieces(model: bytes) -> Path:
    """Write a SentencePiece model where a tokenizer is looked for; return the folder."""
    name = hashlib.sha256(model).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / "loragraft-tokenizers" / name / INSIDE
    file = folder / FILE
    if not (file.is_file() and file.read_bytes() == model):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda stream: stream.write(model))
    return folder


def pieces_in(weights: Mapping[str, torch.Tensor]) -> Path | None:
    """Return the folder whose tokenizer/ holds the model that lies among weights; None where none does."""
    for name in weights:
        if name.endswith(f".{TENSOR}") and weights[name].dtype == torch.uint8:
            return keep_pieces(weights[name].detach().cpu().numpy().tobytes()).parent
    return None
