"""Walk a dataset folder, and read what its folder names say: ``<repeats>_<class words>``."""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..errors import LoraGraftError, nearest
from .images import shown

MAX_REPEATS = 10_000
# What systems and archives leave behind; never part of a dataset.
CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")
JUNCTION = 0xA0000003  # IO_REPARSE_TAG_MOUNT_POINT, which Python's stat module has on Windows only


@dataclass(frozen=True)
class Found:
    """One regular file: ``name`` is its posix path relative to the root."""

    name: str
    path: Path


@dataclass
class Walk:
    """What lies below a root, in natural order; every list holds names relative to it."""

    files: list[Found] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    linked_folders: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    unread_folders: list[Path] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)


def resolve_root(root: Path | str) -> tuple[Path, str]:
    """Return the folder's real path and the name the user knows it by; raises LG-DATA-001."""
    text = str(root)
    path = Path(text)
    try:
        exists, is_folder = path.exists(), path.is_dir()
        resolved = path.resolve()
        name = path.absolute().name if path.is_symlink() else resolved.name
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, a loop of links
        why = f"the path cannot be used ({shown(error, 100)})."
        raise _no_folder(text, why, "give another path") from error
    bare = text.strip().strip("\"'").strip()
    if not bare:
        raise _no_folder("(empty)", "the path is empty.", "give the folder that holds the images")
    if is_folder and _unwritable(name):
        raise _no_folder(text, "its name has characters that cannot be written down.", "rename the folder")
    if is_folder:
        return resolved, name
    if exists:
        fix = f"give the folder that holds it: {shown(path.parent)}"
        raise _no_folder(text, "it is a file, not a folder.", fix)
    if bare != text:
        why = "no such folder exists; quotes and spaces around a path are taken as part of it."
        raise _no_folder(text, why, f"write it without them: {shown(bare)}")
    raise _no_folder(text, "no such folder exists.", _did_you_mean(path))


def walk(root: Path, *, recursive: bool) -> Walk:
    """List what lies below ``root`` (a resolved path); links that lead out of it are not followed.

    A folder in it that cannot be read is noted as bad; raises LG-DATA-001 for the root itself.
    """
    found = Walk()
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as listing:
                for entry in listing:
                    if _is_own_folder(entry, root, found):
                        (folders if recursive else found.unread_folders).append(Path(entry.path))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            if folder == root:
                fix = "allow reading it, or give another folder"
                raise _no_folder(str(root), f"it cannot be read ({reason}).", fix) from error
            found.bad[folder.relative_to(root).as_posix()] = f"folder: {reason}"
    found.files.sort(key=lambda file: natural_key(file.name))
    found.unread_folders.sort(key=lambda path: natural_key(path.name))
    return found


def natural_key(name: str) -> tuple[object, ...]:
    """Return a sort key that puts img2 before img10 and keeps folders together; no two names tie."""
    parts = [
        tuple(int(p) if p.isdecimal() else p for p in re.split(r"([0-9]+)", part.casefold()))
        for part in name.split("/")
    ]
    return (*parts, name)


def parse_folder(name: str) -> tuple[int, str] | None:
    """Return (repeats, class words) of a folder called ``<repeats>_<class words>``, else None."""
    number, underscore, words = name.partition("_")
    if not underscore or not re.fullmatch(r"[+-]?[0-9]{1,18}", number.strip()):
        return None
    return int(number), words.strip()


def folder_rule(name: str, root_name: str) -> tuple[int | None, str]:
    """Return (repeats, class words) that a file's folders give it; None and "" where they give none.

    The nearest folder called ``<repeats>_<class words>`` decides, the root included, so that passing
    the parent and passing the folder itself mean the same. Else the plain folder's name is the words.
    """
    folders = PurePosixPath(name).parts[:-1]
    for folder in (*reversed(folders), root_name):
        if parsed := parse_folder(folder):
            return parsed
    return None, folders[-1] if folders else ""


def _is_own_folder(entry: os.DirEntry[str], root: Path, found: Walk) -> bool:
    """Say whether to look into this entry; else note in ``found`` what it is."""
    path = Path(entry.path)
    name = path.relative_to(root).as_posix()
    if entry.name.startswith(".") or entry.name.casefold() in CLUTTER:
        found.hidden.append(name)
    elif _is_link(entry):
        target = _target(path)
        if target is None or not target.is_relative_to(root):
            found.links.append(name)
        elif target.is_dir():
            found.linked_folders.append(name)  # its target is read under its own name
        else:
            _note_file(path, name, found)
    elif entry.is_dir():
        return True
    else:
        _note_file(path, name, found)
    return False


def _is_link(entry: os.DirEntry[str]) -> bool:
    """Say whether this is a symbolic link, or a junction (Windows' other link to a folder)."""
    if entry.is_symlink():
        return True
    return getattr(entry.stat(follow_symlinks=False), "st_reparse_tag", 0) == JUNCTION


def _note_file(path: Path, name: str, found: Walk) -> None:
    if _unwritable(name):
        found.bad[name] = "its name has characters that cannot be written down; rename it"
    elif path.is_file():
        found.files.append(Found(name, path))
    else:
        found.special.append(name)


def _unwritable(name: str) -> bool:
    """Say whether a name has control characters, or bytes that are no text."""
    return any(unicodedata.category(c) in ("Cc", "Cs") for c in name)


def _target(path: Path) -> Path | None:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):  # leads nowhere, or in a circle
        return None


def _did_you_mean(path: Path) -> str:
    parent = path.parent
    if path.name and parent.is_dir():
        try:
            siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()]
        except OSError:
            siblings = []
        if guess := nearest(path.name, siblings):
            return f"did you mean {shown(parent / guess[0])}?"
        return "check the last part of the path"
    return "check the path; give it in full"


def _no_folder(text: str, why: str, fix: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-001", "The image folder cannot be used.", where=shown(text), why=why, fix=fix
    )
