"""Find pictures that occur more than once: the same file, the same pixels, or nearly the same picture.

Near means that two 64-bit perceptual hashes (dHash: neighbouring brightness, pHash: low frequencies)
both differ in at most 4 bits, and that the colours of an 8 x 8 thumbnail agree. The best of a group is
kept: the largest; of equal size the one of most bytes (least compressed), then the sharpest, then the
first by name. Nothing is ever deleted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import LoraGraftError
from .budget import PixelBudget
from .checking import PIXELS_IN_FLIGHT, Progress, in_order
from .folders import natural_key
from .images import load_upright, shown
from .records import Dataset, Record
from .report import counted, size_text

MAX_DISTANCE = 4
WIDEST = 16
MAX_COLOR = 12  # mean difference of 255 over the thumbnail's values
THUMB = 8
SHARP_SIDE = 512
SAME_FILE, SAME_PIXELS, NEAR = "same file", "same pixels", "nearly the same"
RULE = "kept is the largest, then the least compressed, then the sharpest"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Print:
    """What a picture is told by: two 64-bit hashes, a thumbnail, its pixels' hash, and its quality."""

    dhash: int
    phash: int
    thumb: bytes
    pixels: str
    sharpness: float
    num_bytes: int


# (content hash, crop, background) -> the picture's print, for a process that looks again and again.
Prints = MutableMapping[tuple[object, ...], Print]


@dataclass(frozen=True)
class Twin:
    """One picture that a group can do without: ``kind`` says why, ``bits`` how far the hashes are apart."""

    record: Record
    kind: str
    bits: int = 0


@dataclass(frozen=True)
class Group:
    """Pictures that are the same: the best one and the others."""

    kept: Record
    twins: tuple[Twin, ...]


def find_duplicates(
    dataset: Dataset,
    *,
    near: bool = True,
    distance: int = MAX_DISTANCE,
    prints: Prints | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> list[Group]:
    """Return the groups of pictures that are the same, in the dataset's order of their best ones.

    ``near`` also finds scaled, recompressed and slightly edited copies, at most ``distance`` (0 to 16)
    bits apart. Every twin is that near to its group's best one, not only to another twin. Regularisation
    images are compared among themselves. Raises LG-CFG-003, and LG-DATA-009 for a picture that changed.
    """
    if isinstance(distance, bool) or not 0 <= distance <= WIDEST:
        raise LoraGraftError(
            "LG-CFG-003",
            f"Setting 'distance' is {shown(repr(distance), 30)}, expected 0 to {WIDEST}.",
            where="distance",
            why="two 64-bit hashes that differ in more bits are of different pictures.",
            fix=f"set distance to {MAX_DISTANCE}, or a number from 0 to {WIDEST}",
        )
    budget = PixelBudget(PIXELS_IN_FLIGHT)

    def look(record: Record) -> Print:
        key = (record.content_hash, record.crop, record.background)
        known = prints.get(key) if prints is not None and record.content_hash else None
        if known is None:
            with budget.taken(record.size[0] * record.size[1]):
                known = print_of(record)
            if prints is not None:
                prints[key] = known
        return known

    found: list[Print] = []
    with closing(in_order(look, dataset.records, workers)) as results:
        for one in results:
            found.append(one)
            if progress is not None:
                progress(len(found), len(dataset.records))
    groups: list[Group] = []
    for is_reg in (False, True):
        some = [i for i, record in enumerate(dataset.records) if record.is_reg == is_reg]
        groups += _grouped([(dataset.records[i], found[i]) for i in some], near, distance)
    places = {record.name: place for place, record in enumerate(dataset.records)}
    return sorted(groups, key=lambda group: places[group.kept.name])


def without_duplicates(dataset: Dataset, groups: Sequence[Group]) -> tuple[Dataset, Dataset]:
    """Return the dataset with the best of each group only, and one of the pictures left out."""
    out = {twin.record.name for group in groups for twin in group.twins}
    kept = [record for record in dataset.records if record.name not in out]
    rest = [record for record in dataset.records if record.name in out]
    line = f"Left out as duplicates: {counted(len(rest), 'image')}."
    return dataset.replaced(kept, line), dataset.replaced(rest)


def duplicate_lines(groups: Sequence[Group]) -> list[str]:
    """Return what was found in words, one line for each group."""
    if not groups:
        return ["No duplicates."]
    twins = [twin for group in groups for twin in group.twins]
    counts = [f"{n} {kind}" for kind in (SAME_FILE, SAME_PIXELS, NEAR) if (n := _count(twins, kind))]
    title = f"{counted(len(groups), 'group')} of duplicates, {counted(len(twins), 'image')} too many"
    lines = [f"{title} ({', '.join(counts)}); {RULE}."]
    for group in groups:
        others = ", ".join(f"{_told(twin.record)} {twin.kind}" for twin in group.twins)
        lines.append(f"  {_told(group.kept)}: {others}")
    return lines


def _count(twins: Iterable[Twin], kind: str) -> int:
    return sum(twin.kind == kind for twin in twins)


def _told(record: Record) -> str:
    return f"{shown(record.name, 80)} ({size_text(record.size[::-1])})"


# ---- prints ----


def print_of(record: Record) -> Print:
    """Decode the picture as training sees it and return its print."""
    image = load_upright(record)
    digest = hashlib.sha256(f"{image.size}".encode())
    digest.update(image.tobytes())
    gray = image.convert("L")
    return Print(
        dhash=dhash(gray),
        phash=phash(gray),
        thumb=image.resize((THUMB, THUMB), Image.Resampling.BOX).tobytes(),
        pixels=digest.hexdigest(),
        sharpness=_sharpness(gray),
        num_bytes=record.path.stat().st_size,
    )


def dhash(gray: Image.Image) -> int:
    """Return 64 bits: whether each of 9 x 8 cells is brighter than its left neighbour."""
    cells = np.asarray(gray.resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    return _packed(cells[:, 1:] > cells[:, :-1])


def phash(gray: Image.Image) -> int:
    """Return 64 bits: which of the 8 x 8 lowest frequencies of a 32 x 32 thumbnail exceed their median."""
    cells = np.asarray(gray.resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = np.round((_cosines() @ cells @ _cosines().T)[:8, :8], 3)  # a flat picture has no noise to tell
    return _packed(low > np.median(low.reshape(-1)[1:]))


def _cosines() -> Floats:
    """Return the matrix of the discrete cosine transform, 32 points."""
    n = np.arange(32)
    return np.cos(math.pi * (2 * n[None, :] + 1) * n[:, None] / 64)


def _packed(bits: NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(bits.reshape(-1)).tobytes(), "big")


def _sharpness(gray: Image.Image) -> float:
    """Return the mean difference between neighbouring pixels, at most 512 x 512 of them."""
    small = gray.copy()
    small.thumbnail((SHARP_SIDE, SHARP_SIDE))
    cells = np.asarray(small, dtype=np.int16)
    steps = [np.abs(np.diff(cells, axis=axis)) for axis in (0, 1) if cells.shape[axis] > 1]
    return round(float(np.mean([step.mean() for step in steps])), 3) if steps else 0.0


# ---- groups ----


def _grouped(entries: Sequence[tuple[Record, Print]], near: bool, distance: int) -> list[Group]:
    if not entries:
        return []
    order = sorted(entries, key=_rank)
    hashes = np.array([[one.dhash, one.phash] for _, one in order], dtype=np.uint64).reshape(-1, 2)
    thumbs = np.array([list(one.thumb) for _, one in order], dtype=np.int16).reshape(len(order), -1)
    pixels = np.array([one.pixels for _, one in order])
    free = np.ones(len(order), dtype=bool)
    groups = []
    for i, (kept, one) in enumerate(order):
        if not free[i]:
            continue
        free[i] = False
        bits = _bits(hashes ^ hashes[i]).max(axis=1)
        same = pixels == one.pixels
        if near:
            colors = np.abs(thumbs - thumbs[i]).mean(axis=1)
            same |= (bits <= distance) & (colors <= MAX_COLOR)
        members = np.flatnonzero(same & free)
        free[members] = False
        if len(members):
            twins = [Twin(order[j][0], _kind(kept, one, *order[j]), int(bits[j])) for j in members]
            twins.sort(key=lambda twin: natural_key(twin.record.name))
            groups.append(Group(kept, tuple(twins)))
    return groups


def _rank(entry: tuple[Record, Print]) -> tuple[object, ...]:
    """Return the sort key that puts the picture to keep first."""
    record, one = entry
    return -record.size[0] * record.size[1], -one.num_bytes, -one.sharpness, natural_key(record.name)


def _kind(kept: Record, one: Print, record: Record, other: Print) -> str:
    if record.content_hash and record.content_hash == kept.content_hash and record.crop == kept.crop:
        return SAME_FILE
    return SAME_PIXELS if one.pixels == other.pixels else NEAR


def _bits(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return how many bits are set in each value."""
    return _ONES[values.reshape(-1).view(np.uint8)].reshape(*values.shape, 8).sum(axis=-1, dtype=np.int64)


_ONES = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)
