"""The product: the LoRA file in the loras folder, its trigger words and its preview image beside it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .adapters.files import read_metadata, read_tensors
from .checkpoint import Checkpoint
from .config import TrainConfig
from .errors import LoraGraftError
from .metadata import with_hashes, with_workflow
from .paths import safe_name
from .safefile import temporary_start, write_atomically, write_safetensors, write_text

HEX = re.compile("[0-9a-f]{8}")
SUFFIX, WORDS, PREVIEW = ".safetensors", ".txt", ".preview.png"
EMBEDDING = "emb_params"  # webui's name of an embedding's tensor, (vectors, D)
BELONGS_TO = "loragraft_lora"


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

    ``unless_there`` leaves a file alone that says the same of the same tensors, whatever its workflow, and
    what lies beside it.
    """
    sweep(loras, name)
    file = loras / f"{name}{SUFFIX}"
    tensors = read_tensors(checkpoint.lora_file)
    metadata = with_hashes(texts, tensors)
    is_there = (
        unless_there
        and file.exists()
        and {**read_metadata(file), "workflow": ""} == {**metadata, "workflow": ""}
    )
    if not is_there:
        write_safetensors(file, tensors, with_workflow(metadata, workflow))
    beside, image = loras / f"{name}{WORDS}", loras / f"{name}{PREVIEW}"
    if words and not (is_there and beside.exists()):
        write_text(beside, words + "\n")
    if preview.is_file() and not (is_there and image.exists()):
        with preview.open("rb") as source:
            write_atomically(image, lambda target: shutil.copyfileobj(source, target))
    return file


def _is_free(loras: Path, name: str, run_id: str, words: str, preview: Path) -> bool:
    file = loras / f"{name}{SUFFIX}"
    if not file.exists():
        mine = {WORDS: f"{words}\n".encode(), PREVIEW: preview.read_bytes() if preview.is_file() else None}
        return all(_holds(loras / f"{name}{suffix}", content) for suffix, content in mine.items())
    return _is_own(file, run_id)


def _holds(file: Path, content: bytes | None) -> bool:
    """Say whether the file is not there, or holds exactly ``content``."""
    return not file.exists() or file.read_bytes() == content


def checkpoint_name(loras: Path, wished: str, run_id: str) -> str:
    """Return the name for a save on the way: the wished one, or a numbered one if it is another's."""
    name, number = wished, 1
    while (file := loras / f"{name}{SUFFIX}").exists() and not _is_own(file, run_id):
        number += 1
        name = f"{wished}_{number}"
    return name


def publish_checkpoint(loras: Path, name: str, checkpoint: Checkpoint, texts: Mapping[str, str]) -> Path:
    """Write <name>.safetensors from a verified checkpoint, unless it is there and says the same."""
    sweep(loras, name)
    file = loras / f"{name}{SUFFIX}"
    tensors = read_tensors(checkpoint.lora_file)
    metadata = with_hashes(texts, tensors)
    if not file.exists() or read_metadata(file) != metadata:
        write_safetensors(file, tensors, metadata)
    return file


def delete_published(loras: Path, wished: str, run_id: str) -> None:
    """Delete a save that this run published under this name; a file of others' stays."""
    name = checkpoint_name(loras, wished, run_id)
    for file in loras.glob(f"*{SUFFIX}"):
        beside = file.stem.startswith(f"{name}-") and _is_own(file, run_id)
        if file.stem == name or (beside and read_metadata(file).get(BELONGS_TO) == name):
            file.unlink(missing_ok=True)


def publish_embeddings(folder: Path, name: str, checkpoint: Checkpoint, texts: Mapping[str, str]) -> None:
    """Write <name>-<word>.safetensors for each trained word, as webui and ComfyUI read embeddings."""
    for word, rows in checkpoint.embeddings().items():
        run_id = texts["loragraft_run"]
        file = folder / f"{checkpoint_name(folder, f'{name}-{word}', run_id)}{SUFFIX}"
        metadata = {"loragraft_run": run_id, BELONGS_TO: name, "loragraft_word": word}
        metadata["ss_steps"] = texts["ss_steps"]
        write_safetensors(file, {EMBEDDING: rows}, metadata)


def sweep(loras: Path, name: str) -> None:
    """Remove what a killed process left half-written under this name."""
    for suffix in (SUFFIX, WORDS, PREVIEW):
        start = temporary_start(f"{name}{suffix}")
        for file in loras.iterdir() if loras.is_dir() else ():
            if file.name.startswith(start) and HEX.fullmatch(file.name[len(start) :]):
                with suppress(OSError):
                    file.unlink()


def _is_own(file: Path, run_id: str) -> bool:
    try:
        return read_metadata(file).get("loragraft_run") == run_id
    except LoraGraftError:
        return False  # not readable as a LoRA: somebody's file all the same
