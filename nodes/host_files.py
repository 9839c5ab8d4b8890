"""LoRA, checkpoint and VAE files seen from the nodes: names below the model folders, and where results go."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..trainer import api
from ..trainer.errors import LoraGraftError, listed

SUFFIX = ".safetensors"


def existing(kind: str, name: str, *, widget: str, folder_too: bool = False) -> Path:
    """Return the file that a name below models/<kind> means; the only way from a widget's text to a file.

    ``folder_too`` also takes a diffusers folder. Raises LG-TOOL-018 or LG-PATH errors.
    """
    name = name.strip()
    roots = [Path(f) for f in folder_paths.get_folder_paths(kind)]
    if name and (name.endswith(SUFFIX) or folder_too):
        for root in roots:
            path = api.resolve(root, name, what=widget)
            if path.is_file() or (folder_too and (path / "model_index.json").is_file()):
                return path
    raise LoraGraftError(
        "LG-TOOL-018",
        f"There is no file {name[:60]!r} for this." if name else "No file is named.",
        where=widget,
        why=f"a {SUFFIX} file below {listed(map(str, roots), limit=3)} is needed.",
        fix="check the name; folders below it count, and so does the suffix",
    )


def new_file(
    kind: str, name: str, *, widget: str = "output_name", suffix: str = SUFFIX, source: Path | None = None
) -> Path:
    """Return where a result of this name goes: in the folder of models/<kind> that ``source`` is in.

    Without it, in the first of them. Raises LG-PATH-001.
    """
    stem = name.strip().removesuffix(SUFFIX)
    roots = [Path(f) for f in folder_paths.get_folder_paths(kind)]
    root = next((r for r in roots if source is not None and source.is_relative_to(r)), roots[0])
    return root / f"{api.safe_name(stem, what=widget)}{suffix}"


def stamp(kind: str, *names: str) -> str:
    """Return a text that changes when one of these files does."""
    stats = []
    for name in names:
        try:
            stat = existing(kind, name, widget="", folder_too=True).stat()
            stats.append(f"{stat.st_size} {stat.st_mtime_ns}")
        except (LoraGraftError, OSError):
            stats.append("missing")
    return "\n".join(stats)
