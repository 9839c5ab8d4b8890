"""The one door: what nodes, the command line and scripts call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .adapters.files import read_metadata as lora_metadata
from .adapters.files import read_tensors as lora_tensors
from .checks import make, make_both
from .config import DatasetConfig, TrainConfig, as_dict, info_of
from .data.records import Dataset, Record, scan_folder
from .data.train_set import TrainSet, build_train_set
from .draw import Drawn, draw
from .draw import Settings as DrawSettings
from .errors import LoraGraftError
from .events import Cached, Event, Finished, Note, Planned, Sampled, Saved, Step
from .families import opening
from .families.opening import Base, find_tokenizer, hash_weights
from .loop import Places, train
from .paths import resolve, safe_name
from .plan import plan_run
from .preview import chart, grid, parse_range

__all__ = [
    "Base",
    "Cached",
    "Dataset",
    "DatasetConfig",
    "DrawSettings",
    "Drawn",
    "Event",
    "Finished",
    "LoraGraftError",
    "Note",
    "Places",
    "Planned",
    "Record",
    "Sampled",
    "Saved",
    "Step",
    "TrainConfig",
    "TrainSet",
    "as_dict",
    "build_train_set",
    "chart",
    "demo_base_file",
    "demo_dataset",
    "demo_tokenizer",
    "draw",
    "find_tokenizer",
    "grid",
    "hash_weights",
    "info_of",
    "lora_metadata",
    "lora_tensors",
    "make",
    "make_both",
    "open_base",
    "open_base_from_weights",
    "open_demo_base",
    "parse_range",
    "plan_run",
    "resolve",
    "safe_name",
    "scan_folder",
    "train",
]

DEMO = Path(__file__).parent / "demo"


def open_base(
    path: Path | str,
    *,
    tokenizer: Path | str | None = None,
    name: str | None = None,
    allow_download: bool = False,
) -> Base:
    """Open a base model from a single .safetensors file or a diffusers folder.

    ``tokenizer`` is a folder with vocab.json and merges.txt; without it CLIP's is looked for in a ComfyUI
    and in the Hugging Face cache, and on the hub only if ``allow_download``. Raises LG-BASE errors.
    """
    path, folder = Path(path), Path(tokenizer) if tokenizer else None
    opener = opening.open_folder if path.is_dir() else opening.open_file
    return opener(path, tokenizer=folder, name=name, allow_download=allow_download)


def open_base_from_weights(
    weights: Mapping[str, torch.Tensor], *, name: str, tokenizer: Path | str, weights_hash: str | None = None
) -> Base:
    """Open a base model from tensors under SD1.5's single-file names: shared, never written to.

    ``weights_hash`` is ``hash_weights(weights)`` if the caller remembers it. Raises LG-BASE errors.
    """
    folder = find_tokenizer(Path(tokenizer))
    return opening.open_weights(weights, name=name, tokenizer=folder, known_hash=weights_hash)


def demo_base_file() -> Path:
    """Return the embedded tiny base model."""
    return DEMO / "base" / "demo_base.safetensors"


def demo_tokenizer() -> Path:
    """Return the embedded base model's tokenizer folder."""
    return DEMO / "base" / "tokenizer"


def demo_dataset() -> Path:
    """Return the embedded sample dataset's folder."""
    return DEMO / "dataset"


def open_demo_base() -> Base:
    """Open the embedded tiny base model."""
    return open_base(demo_base_file(), tokenizer=demo_tokenizer())
