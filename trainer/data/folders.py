"""Walk a dataset folder, and read what its folder names say: ``<repeats>_<class words>``."""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LoraGraftError, nearest
from ..paths import of_other_system
from .images import shown

MAX_REPEATS = 10_000
# What systems and archives leave behind; never part of a dataset.
CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")
NUMBERS = re.compile(r"([0-9]+)")
JUNCTION = 0xA0000003  # IO_REPARSE_TAG_MOUNT_POINT, which Python's stat module has on Windows only


@dataclass(frozen=True)
class Found:
    """One regular file: ``name`` is its posix path relative to the root, ``place`` where it lies."""

    name: str
    place: str | Path

    @property
    def path(self) -> Path:
        """Return where it lies; made when asked for, because a scan looks at thousands."""
        return Path(self.place)


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
    theirs = of_other_system(text)
    fix = "give the path that the folder has on this machine" if theirs else _did_you_mean(path)
    raise _no_folder(text, f"no such folder exists{theirs}.", fix)


def walk(root: Path, *, recursive: bool, in_order: bool = True) -> Walk:
    """List what lies below ``root`` (a resolved path); links that lead out of it are not followed.

    Files come ``in_order`` of `natural_key`, else as the system lists them. A folder in it that cannot be
    read is noted as bad; raises LG-DATA-001 for the root itself.
    """
    found = Walk()
    folders = [root]
    while folders:
        folder = folders.pop()
        inside = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        try:
            with os.scandir(folder) as listing:
                for entry in listing:
                    if _is_plain_file(entry):
                        found.files.append(Found(inside + entry.name, entry.path))
                    elif _is_own_folder(entry, inside + entry.name, root, found):
                        (folders if recursive else found.unread_folders).append(Path(entry.path))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            if folder == root:
                fix = "allow reading it, or give another folder"
                raise _no_folder(str(root), f"it cannot be read ({reason}).", fix) from error
            found.bad[folder.relative_to(root).as_posix()] = f"folder: {reason}"
    if in_order:
        found.files.sort(key=by_name)
    found.unread_folders.sort(key=lambda path: natural_key(path.name))
    return found


def by_name(file: Found) -> tuple[object, ...]:
    """Return the file's place in natural order, for sorting."""
    return natural_key(file.name)


def natural_key(name: str) -> tuple[object, ...]:
    """Return a sort key that puts img2 before img10 and keeps folders together; no two names tie."""
    folder, _, last = name.rpartition("/")
    return (*_folder_key(folder), _part_key(last), name)


@functools.lru_cache(maxsize=1024)
def _folder_key(folder: str) -> tuple[object, ...]:
    return tuple(_part_key(part) for part in folder.split("/")) if folder else ()


def _part_key(part: str) -> tuple[int | str, ...]:
    return tuple([int(p) if p.isdecimal() else p for p in NUMBERS.split(part.casefold())])


def split_suffix(name: str) -> tuple[str, str]:
    """Return a posix path without its suffix, and the suffix with its dot ("" where there is none)."""
    dot = name.rfind(".")
    if dot <= name.rfind("/") + 1 or dot == len(name) - 1:
        return name, ""
    return name[:dot], name[dot:]


def suffix_of(name: str) -> str:
    """Return the name's suffix with its dot, in lower case."""
    return split_suffix(name)[1].casefold()


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
    return _rule_of_folder(name.rpartition("/")[0], root_name)


@functools.lru_cache(maxsize=1024)
def _rule_of_folder(path: str, root_name: str) -> tuple[int | None, str]:
    folders = path.split("/") if path else []
    for folder in (*reversed(folders), root_name):
        if parsed := parse_folder(folder):
            return parsed
    return None, folders[-1] if folders else ""


def _is_plain_file(entry: os.DirEntry[str]) -> bool:
    """Say at once whether there is nothing odd about a file; nearly all are of this kind."""
    name = entry.name
    return (
        os.name != "nt"
        and entry.is_file(follow_symlinks=False)
        and name[0] != "."
        and name.isprintable()
        and name.casefold() not in CLUTTER
    )


def _is_own_folder(entry: os.DirEntry[str], name: str, root: Path, found: Walk) -> bool:
    """Say whether to look into this entry (``name`` from the root); else note in ``found`` what it is."""
    if entry.name.startswith(".") or entry.name.casefold() in CLUTTER:
        found.hidden.append(name)
    elif _is_link(entry):
        target = _target(Path(entry.path))
        if target is None or not target.is_relative_to(root):
            found.links.append(name)
        elif target.is_dir():
            found.linked_folders.append(name)  # its target is read under its own name
        else:
            _note_file(entry, name, found)
    elif entry.is_dir():
        return True
    else:
        _note_file(entry, name, found)
    return False


def _is_link(entry: os.DirEntry[str]) -> bool:
    """Say whether this is a symbolic link, or a junction (Windows' other link to a folder)."""
    if entry.is_symlink():
        return True
    if os.name != "nt":
        return False
    return getattr(entry.stat(follow_symlinks=False), "st_reparse_tag", 0) == JUNCTION


def _note_file(entry: os.DirEntry[str], name: str, found: Walk) -> None:
    if _unwritable(name):
        found.bad[name] = "its name has characters that cannot be written down; rename it"
    elif entry.is_file():
        found.files.append(Found(name, entry.path))
    else:
        found.special.append(name)


def _unwritable(name: str) -> bool:
    """Say whether a name has control characters, or bytes that are no text."""
    return not name.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in name)


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
