"""What flows from step to step of a dataset: records of paths and edits, never pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

UNCAPTIONED = "none"


@dataclasses.dataclass(frozen=True)
class Record:
    """One image: where it lies and what belongs to it, never its pixels.

    ``name`` is the posix path relative to the dataset's root, the only path that may reach metadata;
    ``size`` is (height, width) of what training sees: after EXIF orientation and ``crop``, which is
    (left, top, right, bottom) in upright pixels. ``concept`` is the folder's class words; ``content_hash``
    is the sha256 of the file's bytes ("" where only the header was read). ``mask`` says where to learn
    (white: fully); it is ``path`` itself where the picture's alpha channel does. Transparent parts lie on
    ``background``. ``caption_source`` says where the caption is from; an empty one is trained only where
    it is `UNCAPTIONED`: somebody asked for it. ``overrides`` are the DatasetConfig settings in which the
    record's subset differs from its train set.
    """

    path: Path
    name: str
    size: tuple[int, int]
    caption: str
    concept: str
    repeats: int
    content_hash: str
    mask: Path | None = None
    mask_hash: str = ""
    crop: tuple[int, int, int, int] | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    is_reg: bool = False
    caption_source: str = ""
    overrides: tuple[tuple[str, object], ...] = ()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The records of one folder in natural order, and what was said about them so far."""

    root: Path
    records: tuple[Record, ...]
    lines: tuple[str, ...]

    def replaced(self, records: Iterable[Record], *lines: str) -> Dataset:
        """Return the dataset with other records, and these lines added to what was said."""
        return Dataset(self.root, tuple(records), (*self.lines, *lines))


def merged(datasets: Sequence[Dataset]) -> Dataset:
    """Return one dataset of all records, in order; its root is the first one's.

    Where two of them hold a name, the names of all get their root's name in front ("photos/a.png"), with
    a number behind where two roots are called alike.
    """
    if len(datasets) == 1:
        return datasets[0]
    names = [record.name for dataset in datasets for record in dataset.records]
    records = tuple(record for dataset in datasets for record in dataset.records)
    if len(set(names)) < len(names):
        records = tuple(
            dataclasses.replace(record, name=f"{prefix}/{record.name}")
            for dataset, prefix in zip(datasets, _prefixes(datasets), strict=True)
            for record in dataset.records
        )
    lines = tuple(line for dataset in datasets for line in dataset.lines)
    return Dataset(datasets[0].root, records, lines)


def _prefixes(datasets: Sequence[Dataset]) -> list[str]:
    prefixes: list[str] = []
    for dataset in datasets:
        name = dataset.root.name or "root"
        number = 1
        while (prefix := name if number == 1 else f"{name} {number}") in prefixes:
            number += 1
        prefixes.append(prefix)
    return prefixes
