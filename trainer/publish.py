"""The product: the LoRA file in the loras folder, its trigger words and its preview image beside it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from .adapters.files import read_metadata, read_tensors
from .checkpoint import Checkpoint
from .config import TrainConfig
from .errors import LoraGraftError
from .metadata import with_hashes, with_workflow
from .paths import safe_name
from .safefile import write_atomically, write_safetensors, write_text

SUFFIX, WORDS, PREVIEW = ".safetensors", ".txt", ".preview.png"


def published_name(loras: Path, config: TrainConfig, run_id: str, words: str, preview: Path) -> str:
    """Return the name to publish under: the wished one, or a numbered one if it is another's.

    ``words`` and ``preview`` are what this run writes beside the file, by which it knows them again.
    Raises LG-SAVE-005 when the name is taken and ``name_taken`` is "refuse".
    """
    wished = safe_name(config.output_name, what="output_name")
    name, number = wished, 1
    while not _is_free(loras, name, run_id, words, preview):
        if config.name_taken == "refuse":
            raise LoraGraftError(
                "LG-SAVE-005",
                f"The name '{name}' is taken: another run's LoRA or files of yours have it.",
                where=str(loras / f"{name}{SUFFIX}"),
                why="they would be overwritten.",
                fix="choose another output_name, or set name_taken to 'number'",
            )
        number += 1
        name = f"{wished}_{number}"
    return name


def publish(
    loras: Path,
    name: str,
    checkpoint: Checkpoint,
    texts: Mapping[str, str],
    words: str,
    workflow: str | None,
    preview: Path,
    *,
    unless_there: bool = False,
) -> Path:
    """Write <name>.safetensors from a verified checkpoint, <name>.txt and <name>.preview.png.

    ``unless_there`` leaves a file alone that says the same of the same tensors, whatever its workflow.
    """
    file = loras / f"{name}{SUFFIX}"
    tensors = read_tensors(checkpoint.lora_file)
    metadata = with_hashes(texts, tensors)
    if (
        unless_there
        and file.exists()
        and {**read_metadata(file), "workflow": ""} == {**metadata, "workflow": ""}
    ):
        return file
    write_safetensors(file, tensors, with_workflow(metadata, workflow))
    if words:
        write_text(loras / f"{name}{WORDS}", words + "\n")
    if preview.is_file():
        with preview.open("rb") as source:
            write_atomically(loras / f"{name}{PREVIEW}", lambda target: shutil.copyfileobj(source, target))
    return file


def _is_free(loras: Path, name: str, run_id: str, words: str, preview: Path) -> bool:
    file = loras / f"{name}{SUFFIX}"
    if not file.exists():
        mine = {WORDS: f"{words}\n".encode(), PREVIEW: preview.read_bytes() if preview.is_file() else None}
        return all(_holds(loras / f"{name}{suffix}", content) for suffix, content in mine.items())
    try:
        return read_metadata(file).get("loragraft_run") == run_id
    except LoraGraftError:
        return False  # not readable as a LoRA: somebody's file all the same


def _holds(file: Path, content: bytes | None) -> bool:
    """Say whether the file is not there, or holds exactly ``content``."""
    return not file.exists() or file.read_bytes() == content
