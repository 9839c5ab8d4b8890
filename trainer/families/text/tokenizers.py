"""Tokenizers: what kinds there are, where they are looked for, and how they are read.

None is shipped. They come from a folder that is named, from a diffusers folder, from a ComfyUI, from the
Hugging Face cache, or from the hub where the user asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LoraGraftError
from .sentence_pieces import FILE, SentencePieces

PACK = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer: its class in transformers, its files, its folder in a ComfyUI if it has one,
    and its hub name.

    A folder has it that holds all files of one of the sets in ``files``.
    """

    title: str
    reader: str
    files: tuple[tuple[str, ...], ...]
    in_comfyui: str | None
    hub: str

    def lies_in(self, folder: Path) -> bool:
        """Say whether a folder holds the files."""
        return any(all((folder / name).is_file() for name in names) for names in self.files)


KINDS: Mapping[str, Kind] = {
    "clip": Kind(
        "CLIP's",
        "CLIPTokenizer",
        (("vocab.json", "merges.txt"),),
        "comfy/sd1_tokenizer",
        "openai/clip-vit-large-patch14",
    ),
    "t5": Kind(
        "T5's",
        "T5TokenizerFast",
        (("tokenizer.json",), ("spiece.model",)),
        "comfy/text_encoders/t5_tokenizer",
        "google/t5-v1_1-xxl",
    ),
    "qwen": Kind(
        "Qwen's",
        "Qwen2Tokenizer",
        (("vocab.json", "merges.txt"), ("tokenizer.json",)),
        "comfy/text_encoders/qwen25_tokenizer",
        "Qwen/Qwen3-4B",
    ),
    "gemma": Kind(
        "Gemma's",
        "AutoTokenizer",  # transformers 4 and 5 have it under different names
        (("tokenizer.json", "tokenizer_config.json"), (FILE,)),
        None,
        "google/gemma-2-2b",
    ),
}


def find_tokenizer(
    folder: Path | None, *, kind: str = "clip", inside: Path | None = None, allow_download: bool = False
) -> str:
    """Find a tokenizer: the given folder, one inside the base's, a ComfyUI, the cache, or the hub.

    Returns a folder, or a hub name that the cache holds. Raises LG-BASE-007 for a given folder without its
    files, LG-BASE-008 where none is found.
    """
    wanted = KINDS[kind]
    if folder is not None:
        if not wanted.lies_in(folder):
            raise LoraGraftError(
                "LG-BASE-007",
                f"The tokenizer folder has no {wanted.files[0][0]}.",
                where=str(folder),
                why="captions cannot be turned into tokens without it.",
                fix=f"name the folder that holds {wanted.title} files: {' or '.join(_named(wanted))}",
            )
        return str(folder)
    if inside is not None and wanted.lies_in(inside):
        return str(inside)
    hosts = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    for host in [*hosts, PACK.parent.parent]:
        if wanted.in_comfyui is not None and wanted.lies_in(host / wanted.in_comfyui):
            return str(host / wanted.in_comfyui)
    with suppress(OSError):
        _reader(wanted).from_pretrained(wanted.hub, local_files_only=not allow_download)
        if _is_cached(wanted):
            return wanted.hub
    raise LoraGraftError(
        "LG-BASE-008",
        f"{wanted.title} tokenizer was not found.",
        where="tokenizer",
        why="a single-file checkpoint holds no tokenizer, and none is shipped with this package.",
        fix=f"one of: {_from_folder(wanted)}a diffusers folder as the base, the Hugging Face cache, "
        "or --allow_download",
    )


def load_tokenizer(folder: str, kind: str = "clip") -> Any:
    """Load a tokenizer from a folder, or under its hub name from the local cache; raises LG-BASE-007."""
    wanted = KINDS[kind]
    try:
        if (Path(folder) / FILE).is_file() and not (Path(folder) / "tokenizer.json").is_file():
            return SentencePieces(Path(folder) / FILE)
        return _reader(wanted).from_pretrained(folder, local_files_only=True)
    except LoraGraftError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise LoraGraftError(
            "LG-BASE-007",
            "The tokenizer cannot be read.",
            where=folder,
            why=str(error)[:200],
            fix=f"name a folder with {wanted.title} complete files: {' or '.join(_named(wanted))}",
        ) from error


def _is_cached(kind: Kind) -> bool:
    """Say whether the cache holds a kind's files.

    Where it does not, transformers 5 raises nothing: it makes a tokenizer that knows no word.
    """
    from huggingface_hub import try_to_load_from_cache

    sets = (*kind.files, ("tokenizer.json",))
    return any(
        all(isinstance(try_to_load_from_cache(kind.hub, name), str) for name in names) for names in sets
    )


def _reader(kind: Kind) -> Any:
    import transformers

    return getattr(transformers, kind.reader)


def _from_folder(kind: Kind) -> str:
    if kind.in_comfyui is None:
        return "--tokenizer FOLDER, "
    return f"--tokenizer FOLDER (ComfyUI has it in {kind.in_comfyui}), COMFYUI_PATH, "


def _named(kind: Kind) -> list[str]:
    return [" and ".join(names) for names in kind.files]
