"""Convert and rename: a dataset's pictures in one format, numbered if wanted, in a working copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..errors import LoraGraftError
from .checking import Progress
from .images import shown
from .records import Dataset, Record
from .working_copy import Copy, Encoding, own_stems, write_copy

FORMATS = ("png", "jpeg", "webp")
NAMES = ("keep", "number")
# What the formats take where nothing else is said: JPEG of hardly visible loss, WebP without any.
QUALITIES = {"png": 100, "jpeg": 97, "webp": 100}
MIN_DIGITS = 4
FORBIDDEN = '/\\:*?"<>|'


def convert(
    dataset: Dataset,
    folder: Path | str,
    *,
    format: str = "png",
    quality: int = 0,
    names: str = "keep",
    prefix: str = "",
    progress: Progress | None = None,
    workers: int | None = None,
) -> Copy:
    """Write every picture in ``format``, with its caption and mask, into ``folder``; originals stay.

    ``quality`` 1 to 100 is for jpeg and webp (100: lossless webp); 0 takes 97 and 100. ``names`` "number"
    calls the pictures of each subfolder 0001, 0002, ... in their order, ``prefix`` in front. A picture that
    is in the format already and needs no change is copied byte for byte.
    Raises LG-CFG-003, and LG-DATA-009, LG-DATA-021 to LG-DATA-023 as `write_copy` does.
    """
    for name, value, choices in (("format", format, FORMATS), ("names", names, NAMES)):
        if value not in choices:
            raise _bad(name, value, f"one of {', '.join(choices)}")
    if isinstance(quality, bool) or not isinstance(quality, int) or not 0 <= quality <= 100:
        raise _bad("quality", quality, "0 to 100")
    if (
        set(prefix) & set(FORBIDDEN)
        or prefix != prefix.lstrip(" .")
        or not prefix.isprintable()
        or len(prefix) > 60
    ):
        raise _bad("prefix", prefix, "letters, digits, '-', '_' and spaces, at most 60")
    if prefix and names != "number":
        raise _bad("prefix", prefix, "nothing where names is 'keep'")
    return write_copy(
        dataset,
        folder,
        encoding=Encoding(format, quality or QUALITIES[format]),
        names=numbered(dataset.records, prefix) if names == "number" else own_stems(dataset.records),
        progress=progress,
        workers=workers,
    )


def numbered(records: Sequence[Record], prefix: str = "") -> list[str]:
    """Return names without suffix: the records of each folder are 0001, 0002, ... in their order."""
    folders = [PurePosixPath(record.name).parent.as_posix() for record in records]
    total = Counter(folder.casefold() for folder in folders)
    so_far: Counter[str] = Counter()
    names = []
    for folder in folders:
        key = folder.casefold()
        so_far[key] += 1
        digits = max(MIN_DIGITS, len(str(total[key])))
        name = f"{prefix}{so_far[key]:0{digits}}"
        names.append(name if folder == "." else f"{folder}/{name}")
    return names


def _bad(name: str, value: object, expected: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-CFG-003",
        f"Setting '{name}' is {shown(repr(value), 30)}, expected {expected}.",
        where=name,
        why="the pictures would be written in another way than you asked for.",
        fix=f"set {name} to {expected}",
    )
