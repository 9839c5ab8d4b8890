"""Find the videos below a folder, and give each the name that its pictures begin with."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..errors import LoraGraftError, nearest
from ..paths import of_other_system
from .animation import moves
from .folders import Found, Walk, walk
from .images import shown
from .video import VIDEO_SUFFIXES, UnreadableVideoError

MAX_BASE_BYTES = 100  # of a picture's name; with the time and a number it still fits every file system
UNFIT = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"/\\|?*]')  # what some system forbids in a file name


@dataclass
class VideoFiles:
    """What a source holds: ``videos`` in natural order, unreadable files with their reasons, and the rest."""

    root: Path
    root_name: str
    videos: list[Found] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    num_others: int = 0


def find_videos(source: Path | str, *, recursive: bool = True) -> VideoFiles:
    """List the videos of a folder, or the one that a path names; told by content, never by suffix.

    Raises LG-DATA-040 where there is none, and none that only cannot be read.
    """
    path = Path(source)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
        real = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, a loop of links
        raise _unusable(path, f"the path cannot be used ({shown(error, 100)}).", "give another") from error
    if not str(source).strip() or not (is_file or is_folder):
        why = f"there is no such file or folder{of_other_system(str(source))}."
        raise _unusable(path, why, _did_you_mean(path))
    found = Walk(files=[Found(real.name, real)]) if is_file else walk(real, recursive=recursive)
    files = VideoFiles(real.parent if is_file else real, real.parent.name if is_file else real.name)
    files.bad |= found.bad
    for file in found.files:
        try:
            if moves(file.path) or is_file or _promises_video(file.name):
                files.videos.append(file)
            else:
                files.num_others += 1
        except UnreadableVideoError as error:
            if is_file or _promises_video(file.name):
                files.bad[file.name] = str(error)
            else:
                files.num_others += 1
    if not files.videos and not files.bad:
        why = f"it holds {files.num_others} other files." if files.num_others else "it holds no file."
        if found.unread_folders and not recursive:
            why = "only its subfolders could hold some, and 'recursive' is off."
        raise _unusable(path, why, "give a video, or a folder with MP4, MOV, MKV, WebM or animated GIF files")
    return files


def bases(names: Iterable[str]) -> dict[str, str]:
    """Return for each video's name the posix path, without suffix, that its pictures' names begin with.

    Folders stay; what some system forbids becomes '_'. Where two videos would share a base, all but the
    first get a part of a hash of their own name.
    """
    given: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        path = PurePosixPath(name)
        folders = [_fit(part) for part in path.parts[:-1]]
        base = "/".join([*folders, _fit(path.stem)])
        if _folded(base) in taken:
            base = f"{base}-{_short_hash(name)}"
        taken.add(_folded(base))
        given[name] = base
    return given


def frame_name(base: str, seconds: float, taken: set[str], suffix: str) -> str:
    """Return the name of the picture at a time, as in ``trip_00h01m02s345.png``; noted in ``taken``."""
    whole, part = divmod(round(seconds * 1000), 1000)
    stamp = f"{whole // 3600:02}h{whole // 60 % 60:02}m{whole % 60:02}s{part:03}"
    name, number = f"{base}_{stamp}.{suffix}", 1
    while name in taken:  # more than a thousand frames a second, or a stream that repeats times
        number += 1
        name = f"{base}_{stamp}-{number}.{suffix}"
    taken.add(name)
    return name


def _fit(part: str) -> str:
    clean = UNFIT.sub("_", part).strip(" .") or "_"
    data = clean.encode()
    if len(data) <= MAX_BASE_BYTES:
        return clean
    return f"{data[: MAX_BASE_BYTES - 9].decode(errors='ignore')}-{_short_hash(part)}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _folded(base: str) -> str:
    return unicodedata.normalize("NFC", base).casefold()


def _promises_video(name: str) -> bool:
    return PurePosixPath(name).suffix.casefold() in VIDEO_SUFFIXES


def _did_you_mean(path: Path) -> str:
    try:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.name else []
    except OSError:
        siblings = []
    if guess := nearest(path.name, siblings):
        return f"did you mean {shown(path.parent / guess[0])}?"
    return "check the path; quotes and spaces around it count"


def _unusable(path: Path, why: str, fix: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-040", "There is no video to take frames from.", where=shown(path), why=why, fix=fix
    )
