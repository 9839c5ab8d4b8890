"""A diffusers folder: which family it is, its parts, and what its scheduler says of the predictions.

The family is told from the weights, as with every base. Nothing in the folder's JSON is believed beyond a
word of what it names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LoraGraftError, listed, one_line
from ...parts import DENOISER
from ..base import Family, Tensors
from .model_files import read_folder

INDEX = "model_index.json"
SCHEDULER = Path("scheduler") / "scheduler_config.json"
MOST_JSON = 2**20  # bytes


@dataclass(frozen=True)
class Hints:
    """Whether a base predicts velocity, and whether its last timestep is noise alone; None: not told."""

    velocity: bool | None = None
    zero_terminal: bool | None = None


def sorted_folder(path: Path, families: Mapping[str, Family]) -> tuple[Family, dict[str, Tensors]]:
    """Return the family of a folder, and its parts' state dicts.

    Raises LG-BASE-001 for a part that is not there or cannot be read, LG-BASE-002 where no family fits.
    """
    near = [f for f in families.values() if (path / f.folders[DENOISER]).is_dir()]
    whole = [f for f in near if all((path / folder).is_dir() for folder in _needed(f))]
    if not whole:
        for folder in _needed(near[0] if near else next(iter(families.values()))):
            read_folder(path / folder)  # raises for the one that lacks
    read: dict[str, Tensors] = {}
    refusals: list[LoraGraftError] = []
    for family in whole:
        for folder in family.folders.values():
            if folder not in read and (path / folder).is_dir():
                read[folder] = read_folder(path / folder)
        try:
            parts = {part: read[folder] for part, folder in family.folders.items() if folder in read}
            state_dicts = family.from_folder(parts)
            if family.detect(family.join(state_dicts)):
                return family, state_dicts
        except LoraGraftError as error:
            refusals.append(error)
        except (KeyError, IndexError, ValueError, TypeError, RuntimeError):
            continue  # names or shapes of another family
    raise refusals[0] if refusals else _unknown(path, families)


def read_hints(path: Path) -> Hints:
    """Return what a folder's scheduler says."""
    settings = read_json(path / SCHEDULER)
    kind = settings.get("prediction_type")
    return Hints(
        True if kind == "v_prediction" else None,
        True if settings.get("rescale_betas_zero_snr") is True else None,
    )


def read_json(file: Path) -> dict[str, Any]:
    """Return a small JSON object; {} where there is none."""
    try:
        if file.stat().st_size > MOST_JSON:
            return {}
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _needed(family: Family) -> list[str]:
    return [folder for part, folder in family.folders.items() if part not in family.optional]


def _unknown(path: Path, families: Mapping[str, Family]) -> LoraGraftError:
    kind = one_line(str(read_json(path / INDEX).get("_class_name", "unknown")), 60)
    folders = sorted(child.name for child in path.iterdir() if child.is_dir())
    return LoraGraftError(
        "LG-BASE-002",
        "The base model's architecture is not known.",
        where=f"{path.name} ({kind}; folders: {listed(folders)})",
        why=f"its weights fit none of the supported families: {', '.join(families)}.",
        fix="use a folder, or a checkpoint, of a supported family",
    )
