"""Open a dataset config, whichever trainer it was written for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LoraGraftError
from .checking import Seen
from .dataset_toml import parse_config, read_dataset_config
from .hcp import read_hcp
from .hcp_yaml import parse_hcp
from .images import shown
from .subsets import named_path
from .train_set import Block

PATH_KEYS = ("image_dir", "metadata_file", "img_root", "caption_file", "prompt_template")
READERS: dict[str, Callable[..., list[Block]]] = {
    ".toml": read_dataset_config,
    ".json": read_dataset_config,
    ".yaml": read_hcp,
    ".yml": read_hcp,
}


def read_blocks(
    file: Path,
    *,
    base: Mapping[str, Any] | None = None,
    resolve: Callable[[str], Path] | None = None,
    overrides: Sequence[str] = (),
    on_bad: str = "stop",
    missing_captions: str = "stop",
    seen: Seen | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Block]:
    """Read a dataset config: kohya's .toml or .json, or HCP-Diffusion's .yaml.

    ``base`` holds settings for what the file leaves out. ``resolve`` is the gate for paths in a file that
    is not trusted. ``overrides`` change values of a .yaml as HCP-Diffusion's command line does (key=value).
    ``missing_captions`` "empty" trains images without any words instead of refusing them.
    ``seen`` spares the decoding of images in a state that it knows; ``progress`` is told (folders read,
    folders). Raises LG-DATA-080 to LG-DATA-093.
    """
    reader = READERS.get(file.suffix.casefold())
    if reader is None:
        raise LoraGraftError(
            "LG-DATA-084",
            "This is no dataset config.",
            where=shown(file),
            why="kohya's configs end in .toml or .json, HCP-Diffusion's in .yaml.",
            fix="give such a file; a folder of images goes into Load Image Folder or --train_data_dir",
        )
    changes: dict[str, Any] = {"overrides": overrides} if reader is read_hcp else {}
    return reader(
        file,
        base=base,
        resolve=resolve,
        **changes,
        on_bad=on_bad,
        missing_captions=missing_captions,
        seen=seen,
        progress=progress,
    )


def named_paths(file: Path, *, resolve: Callable[[str], Path] | None = None) -> list[Path]:
    """Return the folders and files that a config names; raises LG-DATA-084 and what the gate raises."""
    if file.suffix.casefold() in (".yaml", ".yml"):
        values, _ = parse_hcp(file, trusted=resolve is None)
    else:
        values = parse_config(file)
    found = [text for key, text in _texts(values) if key in PATH_KEYS]
    return [named_path(text, file, resolve) for text in dict.fromkeys(found)]


def _texts(values: Any) -> Iterator[tuple[str, str]]:
    """Yield every text in nested tables and lists with the key that it stands at."""
    waiting: list[tuple[str, Any]] = [("", values)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, Mapping):
            waiting += [(str(k), v) for k, v in reversed(list(value.items()))]
        elif isinstance(value, list):
            waiting += [(key, v) for v in reversed(value)]
