"""The product: the LoRA file in the loras folder, its trigger words and its preview image beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

from .adapters.files import read_metadata, read_tensors
from .checkpoint import Checkpoint
from .config import TrainConfig
from .errors import LoraGraftError
from .metadata import with_workflow
from .paths import safe_name
from .safefile import write_atomically, write_safetensors, write_text

SUFFIX = ".safetensors"


def published_name(loras: Path, config: TrainConfig, run_id: str) -> str:
    """Return the name to publish under: the wished one, or a numbered one if another run has it.

    Raises LG-SAVE-005 when the name is taken and ``name_taken`` is "refuse".
    """
    wished = safe_name(config.output_name, what="output_name")
    name, number = wished, 1
    while not _is_free(loras / f"{name}{SUFFIX}", run_id):
        if config.name_taken == "refuse":
            raise LoraGraftError(
                "LG-SAVE-005",
                f"Another run already wrote a LoRA named '{name}'.",
                where=str(loras / f"{name}{SUFFIX}"),
                why="it would be overwritten.",
                fix="choose another output_name, or set name_taken to 'number'",
            )
        number += 1
        name = f"{wished}_{number}"
    return name


def publish(
    loras: Path, name: str, checkpoint: Checkpoint, words: str, workflow: str | None, preview: Path | None
) -> Path:
    """Write <name>.safetensors from a verified checkpoint, <name>.txt and <name>.preview.png."""
    file = loras / f"{name}{SUFFIX}"
    metadata = with_workflow(read_metadata(checkpoint.lora_file), workflow)
    write_safetensors(file, read_tensors(checkpoint.lora_file), metadata)
    if words:
        write_text(loras / f"{name}.txt", words + "\n")
    if preview is not None:
        with preview.open("rb") as source:
            write_atomically(loras / f"{name}.preview.png", lambda target: shutil.copyfileobj(source, target))
    return file


def finished_file(
    loras: Path, name: str, checkpoint: Checkpoint, config: TrainConfig, words: str, workflow: str | None
) -> Path:
    """Return a finished run's published file, writing it again only if it is gone."""
    file = loras / f"{name}{SUFFIX}"
    if file.is_file():
        return file
    preview = checkpoint.folder.parent.parent / "samples" / "preview.png"
    return publish(
        loras,
        name,
        checkpoint,
        words,
        workflow,
        preview if config.preview_image and preview.is_file() else None,
    )


def _is_free(file: Path, run_id: str) -> bool:
    if not file.exists():
        return True
    try:
        return read_metadata(file).get("loragraft_run") == run_id
    except LoraGraftError:
        return False  # not readable as a LoRA: somebody's file all the same
