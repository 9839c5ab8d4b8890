"""The list of frames in a working copy: which file came from which video under which settings.

With it a second run touches nothing, and only files that were written here are ever replaced: a picture
that was changed or deleted by hand stays changed or deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import LoraGraftError, listed
from ..safefile import replace, write_text
from .images import shown
from .report import counted

FILE = ".loragraft-frames.json"
VERSION = 1
CHUNK_BYTES = 2**22
STAGING = ".loragraft-tmp-"


@dataclass(frozen=True)
class StoredFrame:
    """One picture: its posix name below the folder, and the file as it was written."""

    name: str
    num_bytes: int
    mtime_ns: int
    content_hash: str
    height: int
    width: int


@dataclass(frozen=True)
class StoredVideo:
    """One video's identity, the key of all that its frames depend on, and the frames."""

    num_bytes: int
    mtime_ns: int
    content_hash: str
    key: str
    line: str
    frames: tuple[StoredFrame, ...]


Store = dict[str, StoredVideo]


def read_store(folder: Path) -> Store:
    """Return what the folder's list says by video name; empty where there is none. Raises LG-DATA-044."""
    path = folder / FILE
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, type(error).__name__) from error
    try:
        content = json.loads(text)
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r}")
        return {name: _video(video, folder) for name, video in content["videos"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, shown(error, 100)) from error


def write_store(folder: Path, store: Store) -> None:
    """Write the list, whole or not at all."""
    content = {"version": VERSION, "videos": {name: asdict(video) for name, video in sorted(store.items())}}
    write_text(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def identity(path: Path, known: StoredVideo | None) -> tuple[int, int, str]:
    """Return a video's (size, time, sha256); hashed only where size or time differ from what is known."""
    info = path.stat()
    if known is not None and (known.num_bytes, known.mtime_ns) == (info.st_size, info.st_mtime_ns):
        return info.st_size, info.st_mtime_ns, known.content_hash
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return info.st_size, info.st_mtime_ns, digest.hexdigest()


def key_of(content_hash: str, settings: Mapping[str, Any], base: str) -> str:
    """Return the key of a video's frames: they depend on its bytes, these settings and their name."""
    text = json.dumps([VERSION, content_hash, settings, base], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def state_of(folder: Path, frame: StoredFrame) -> str:
    """Return "same", "changed" (by hand) or "deleted"."""
    try:
        info = (folder / frame.name).stat()
    except OSError:
        return "deleted"
    same = (info.st_size, info.st_mtime_ns) == (frame.num_bytes, frame.mtime_ns)
    return "same" if same else "changed"


def hand_edits(folder: Path | str) -> list[tuple[str, str, int, int]]:
    """Return (name, state, size, time) of frames that were changed or deleted by hand, and of their captions.

    Empty where nothing was, so that it is the same before and after a run. Raises LG-DATA-044.
    """
    root = Path(folder)
    found = []
    for video in read_store(root).values():
        for frame in video.frames:
            if (state := state_of(root, frame)) != "same":
                found.append((frame.name, state, *_stat(root / frame.name)))
            text = (root / frame.name).with_suffix(".txt")
            if text.is_file():
                found.append((frame.name, "captioned", *_stat(text)))
    return found


def place(
    folder: Path, staging: Path, made: Iterable[StoredFrame], before: Iterable[StoredFrame]
) -> tuple[StoredFrame, ...]:
    """Move newly made frames out of ``staging`` and drop those of ``before`` that they supersede.

    A file that is there with the same content is left untouched. Raises LG-DATA-046, with nothing moved,
    where a file that was not written here, or that was changed since, has a needed name.
    """
    ours = {frame.name: frame for frame in before if state_of(folder, frame) == "same"}
    made = tuple(made)
    in_the_way = []
    for frame in made:
        target = folder / frame.name
        if target.exists() and frame.name not in ours and _hash(target) != frame.content_hash:
            in_the_way.append(frame.name)
    if in_the_way:
        raise LoraGraftError(
            "LG-DATA-046",
            f"{counted(len(in_the_way), 'file')} in the way of new frames.",
            where=listed(shown(name) for name in in_the_way),
            why="they were not written here, or were changed by hand since; they are not replaced.",
            fix="take another name for the frames, or move these files away",
        )
    placed = []
    for frame in made:
        target = folder / frame.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and _hash(target) == frame.content_hash):
            replace(staging / frame.name, target)
        info = target.stat()
        content = {**asdict(frame), "num_bytes": info.st_size, "mtime_ns": info.st_mtime_ns}
        placed.append(StoredFrame(**content))
    for name in superseded(folder, ours.values(), made):
        (folder / name).unlink()
    return tuple(placed)


def superseded(folder: Path, before: Iterable[StoredFrame], made: Iterable[StoredFrame]) -> list[str]:
    """Return the old frames that new ones make obsolete: written here, untouched, without a caption."""
    needed = {frame.name for frame in made}
    return [
        frame.name
        for frame in before
        if frame.name not in needed
        and state_of(folder, frame) == "same"
        and not (folder / frame.name).with_suffix(".txt").exists()
    ]


def _stat(path: Path) -> tuple[int, int]:
    try:
        info = path.stat()
    except OSError:
        return 0, 0
    return info.st_size, info.st_mtime_ns


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _video(content: Any, folder: Path) -> StoredVideo:
    frames = tuple(_checked(StoredFrame, frame) for frame in content.pop("frames"))
    for frame in frames:
        parts = PurePosixPath(frame.name)
        inside = (folder / frame.name).resolve().is_relative_to(folder.resolve())
        if parts.is_absolute() or ".." in parts.parts or not inside:
            raise ValueError("a name leads out of the folder")
    return _checked(StoredVideo, {**content, "frames": frames})


def _checked(cls: Any, content: Any) -> Any:
    kinds = {"str": str, "int": int}
    for item in fields(cls):
        kind = kinds.get(str(item.type))
        if kind is not None and type(content[item.name]) is not kind:
            raise TypeError(f"{item.name} is no {item.type}")
    return cls(**content)


def _damaged(path: Path, reason: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-044",
        "The list of a folder's frames cannot be read.",
        where=f"{shown(path)} ({reason})",
        why="without it nobody can tell which pictures were made here and which are yours.",
        fix="take another name for the frames, or delete the folder if you need none of it",
    )
