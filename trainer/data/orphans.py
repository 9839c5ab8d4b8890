"""Find caption files whose image is gone, and remove them when the user has seen the list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .caption_files import folded
from .folders import Found, resolve_root, split_suffix, suffix_of, walk
from .scan_options import IMAGE_SUFFIXES

TEXT_SUFFIXES = (".txt", ".caption")
SIDECAR_SUFFIX = ".json"


def find_orphans(root: Path | str, *, recursive: bool = True) -> list[Found]:
    """Return the caption files in a folder that no other file has the name of, in natural order.

    A .txt or .caption file is one if nothing else in its folder has its stem (an image that cannot be
    read and a video count, too); a .json file only if its name ends as in photo.jpg.json. Links and
    hidden files are never among them. Raises LG-DATA-001.
    """
    files = walk(resolve_root(root)[0], recursive=recursive).files
    taken = {stem for file in files if not _is_caption(file.name) for stem in _stems(file.name)}
    return [
        f for f in files if _is_caption(f.name) and not f.path.is_symlink() and _owner(f.name) not in taken
    ]


def remove_orphans(orphans: Sequence[Found]) -> list[str]:
    """Delete the listed files and nothing else; return the names of those that could not be deleted."""
    failed = []
    for file in orphans:
        try:
            file.path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            failed.append(f"{file.name} ({error.strerror or type(error).__name__})")
    return failed


def _is_caption(name: str) -> bool:
    base, suffix = split_suffix(name)
    if suffix.casefold() in TEXT_SUFFIXES:
        return True
    return suffix.casefold() == SIDECAR_SUFFIX and suffix_of(base) in IMAGE_SUFFIXES


def _stems(name: str) -> set[str]:
    """Return the names by which a file may be captioned: its full name and its stem."""
    return {folded(name), folded(split_suffix(name)[0])}


def _owner(name: str) -> str:
    """Return whose caption a file is: photo of photo.txt, photo.jpg of photo.jpg.txt."""
    return folded(split_suffix(name)[0])
