"""Crop as an edit of records: which part of each picture training sees; no pixel is written or stretched.

Boxes are (left, top, right, bottom) in pixels of the picture as the record shows it so far, sizes in this
file (width, height).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LoraGraftError, listed
from .images import shown
from .options import checked, option
from .records import Dataset, Record
from .report import counted

Size = tuple[int, int]
Box = tuple[int, int, int, int]
Subject = tuple[float, float, float, float]  # a box too, as detectors give it

MODES = ("keep", "beyond_aspect", "fixed", "square", "subject")
SHAPES = ("free", "square", "fixed")
# Alignment -> the share of what is cut off that goes from the left and from the top.
ALIGNMENTS: dict[str, tuple[float, float]] = {
    "center": (0.5, 0.5),
    "top": (0.5, 0),
    "bottom": (0.5, 1),
    "left": (0, 0.5),
    "right": (1, 0.5),
    "top_left": (0, 0),
    "top_right": (1, 0),
    "bottom_left": (0, 1),
    "bottom_right": (1, 1),
}
SIDES = ("left", "top", "right", "bottom")
TOUCHES_WITHIN = 0.01  # of the crop's side: a subject that near its edge is flagged


@dataclass(frozen=True)
class CropSettings:
    """How pictures are cropped."""

    mode: str = option(
        "keep",
        "keep: leave it to the buckets, which cut a little (best for mixed sizes). beyond_aspect: cut only "
        "what is longer than max_aspect. fixed: the largest part of the shape width x height. square. "
        "subject: around the subject that boxes or masks show.",
        choices=MODES,
    )
    align: str = option(
        "center",
        "Which part stays, where no subject is known.",
        choices=tuple(ALIGNMENTS),
    )
    width: int = option(
        1024,
        "For fixed: the shape is width x height. Nothing is scaled here; training does that.",
        minimum=1,
        maximum=65_536,
    )
    height: int = option(
        1024, "For fixed: the shape is width x height. See width.", minimum=1, maximum=65_536
    )
    max_aspect: float = option(
        2.0,
        "For beyond_aspect: how many times as long as wide a picture may be. The guides say 2.",
        minimum=1,
        maximum=100,
        advanced=True,
    )
    margin: float = option(
        0.2,
        "For subject: the room around it, as a share of its longer side.",
        minimum=0,
        maximum=10,
        advanced=True,
    )
    subject_shape: str = option(
        "free",
        "For subject: its own shape (free, at most max_aspect to 1), square, or width x height (fixed).",
        choices=SHAPES,
        advanced=True,
    )
    min_side: int = option(
        512,
        "For subject: no side of the cut gets shorter than this many pixels, where the picture allows it.",
        minimum=0,
        maximum=65_536,
        advanced=True,
    )


@dataclass(frozen=True)
class CropEdit:
    """What was done to one record: the ``box`` that stays of ``before``, and where its subject suffers."""

    before: Record
    box: Box
    subject: Subject | None = None
    cut_sides: tuple[str, ...] = ()
    touched_sides: tuple[str, ...] = ()

    @property
    def is_cropped(self) -> bool:
        """Say whether anything is cut off."""
        return self.box != (0, 0, *self.before.size[::-1])

    @property
    def lost(self) -> float:
        """Share of the picture's area that is cut off, 0 to 1."""
        height, width = self.before.size
        return 1 - (self.box[2] - self.box[0]) * (self.box[3] - self.box[1]) / (width * height)

    @property
    def after(self) -> Record:
        """Return the record with its crop; one that it had before is narrowed."""
        if not self.is_cropped:
            return self.before
        left, top, right, bottom = self.box
        x, y = self.before.crop[:2] if self.before.crop else (0, 0)
        crop = (left + x, top + y, right + x, bottom + y)
        return dataclasses.replace(self.before, crop=crop, size=(bottom - top, right - left))


@dataclass(frozen=True)
class Cropped:
    """The cropped dataset, the uncropped pictures of those that were cropped (regularisation), the edits."""

    dataset: Dataset
    originals: Dataset
    edits: tuple[CropEdit, ...]


def crop_dataset(
    dataset: Dataset,
    settings: CropSettings | None = None,
    subjects: Sequence[Subject | None] | None = None,
    *,
    reg_caption: str = "",
) -> Cropped:
    """Return the dataset with a crop for each record that needs one, and the originals of these.

    ``subjects`` holds a box for each record, None where nothing was found; modes other than "subject" then
    keep it in view. ``originals`` are marked as regularisation, counted once, with ``reg_caption`` where it
    is given. Raises LG-CFG-003, LG-DATA-048, LG-DATA-049 and LG-DATA-050.
    """
    settings = checked(settings or CropSettings())
    found = _checked_subjects(dataset, settings, subjects)
    edits = tuple(
        _edit(record, settings, subject) for record, subject in zip(dataset.records, found, strict=True)
    )
    originals = [
        dataclasses.replace(
            edit.before, is_reg=True, repeats=1, caption=reg_caption.strip() or edit.before.caption
        )
        for edit in edits
        if edit.is_cropped
    ]
    lines = crop_lines(edits, settings)
    return Cropped(
        dataset.replaced((edit.after for edit in edits), *lines),
        Dataset(
            dataset.root,
            tuple(originals),
            (f"{counted(len(originals), 'uncropped original')}, as regularisation.",),
        ),
        edits,
    )


# ---- geometry ----


def crop_box(size: Size, settings: CropSettings, subject: Subject | None = None) -> Box:
    """Return the part of a picture of this (width, height) that stays; never more than the picture."""
    if settings.mode == "subject" and subject is not None:
        return _around(size, settings, subject)
    aspect = _wanted_aspect(size, settings)
    if aspect is None:
        return (0, 0, *size)
    window = largest(size, aspect)
    if subject is not None:
        return _centred(size, window, subject)
    shares = ALIGNMENTS[settings.align]
    left, top = (round((side - part) * share) for side, part, share in zip(size, window, shares, strict=True))
    return left, top, left + window[0], top + window[1]


def largest(size: Size, aspect: float) -> Size:
    """Return the largest (width, height) of this aspect within ``size``, sides rounded, at least 1."""
    width, height = size
    if width / height > aspect:
        return max(1, min(width, round(height * aspect))), height
    return width, max(1, min(height, round(width / aspect)))


def _wanted_aspect(size: Size, settings: CropSettings) -> float | None:
    """Return the width/height that the mode asks for; None where the picture may stay as it is."""
    aspect = size[0] / size[1]
    if settings.mode == "beyond_aspect":
        nearest = min(max(aspect, 1 / settings.max_aspect), settings.max_aspect)
        return None if nearest == aspect else nearest
    return {"fixed": settings.width / settings.height, "square": 1.0}.get(settings.mode)


def _around(size: Size, settings: CropSettings, subject: Subject) -> Box:
    """Return the subject's box with its margin, in its shape, as far as the picture reaches."""
    left, top, right, bottom = subject
    margin = settings.margin * max(right - left, bottom - top)
    subject = _clipped(size, subject)
    inside = _clipped(size, (left - margin, top - margin, right + margin, bottom + margin))
    width, height = max(1.0, inside[2] - inside[0]), max(1.0, inside[3] - inside[1])
    if settings.subject_shape == "free":
        wide, high = max(width, height / settings.max_aspect), max(height, width / settings.max_aspect)
        wide, high = max(wide, float(settings.min_side)), max(high, float(settings.min_side))
        window = min(size[0], round(wide)), min(size[1], round(high))
        return _centred(size, window, inside, subject)
    aspect = settings.width / settings.height if settings.subject_shape == "fixed" else 1.0
    # The smallest height whose window of this aspect covers the box and has no side below min_side.
    high = max(height, width / aspect, settings.min_side * max(1.0, 1 / aspect))
    most = largest(size, aspect)
    if high >= most[1]:
        return _centred(size, most, inside, subject)
    window = min(most[0], max(1, round(high * aspect))), max(1, round(high))
    return _centred(size, window, inside, subject)


def _centred(size: Size, window: Size, around: Subject, inner: Subject | None = None) -> Box:
    """Return the window with ``around`` in its middle, moved as far as needed to lie in the picture.

    Where the window is too small for ``around``, ``inner`` decides: it stays whole if it fits, else it is
    in the middle.
    """
    starts = []
    for axis, (side, part) in enumerate(zip(size, window, strict=True)):
        start = round((around[axis] + around[axis + 2] - part) / 2)
        if inner is not None:
            first, last = math.floor(inner[axis]), math.ceil(inner[axis + 2])
            fits = last - first <= part
            start = min(max(start, last - part), first) if fits else round((first + last - part) / 2)
        starts.append(min(max(0, start), side - part))
    left, top = starts
    return left, top, left + window[0], top + window[1]


def _clipped(size: Size, box: Subject) -> Subject:
    width, height = size
    return max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3])


def _edit(record: Record, settings: CropSettings, subject: Subject | None) -> CropEdit:
    size = record.size[::-1]
    box = crop_box(size, settings, subject)
    if subject is None:
        return CropEdit(record, box)
    inside = _clipped(size, subject)
    cut, touched = [], []
    for side, name in enumerate(SIDES):
        room = (inside[side] - box[side]) * (1 if side < 2 else -1)
        if room < -0.5:
            cut.append(name)
        elif room <= max(1.0, TOUCHES_WITHIN * (box[side % 2 + 2] - box[side % 2])):
            touched.append(name)
    return CropEdit(record, box, subject, tuple(cut), tuple(touched))


# ---- what is said ----


def crop_lines(edits: Sequence[CropEdit], settings: CropSettings) -> list[str]:
    """Return the report: how many are cropped and how much is lost, and what to look at."""
    cropped = [edit for edit in edits if edit.is_cropped]
    lines = [f"Cropped ({settings.mode}): {len(cropped)} of {counted(len(edits), 'picture')}."]
    if cropped:
        lost = [edit.lost for edit in cropped]
        lines[0] = (
            f"{lines[0][:-1]}; cut off: {min(lost):.0%} to {max(lost):.0%} of their area, "
            f"{sum(lost) / len(lost):.0%} on average."
        )
    for title, names in (
        ("The subject is cut off", [_flag(e, e.cut_sides) for e in edits if e.cut_sides]),
        ("The subject touches the edge", [_flag(e, e.touched_sides) for e in edits if e.touched_sides]),
        ("Smaller than asked for after the crop", [n for e in edits if (n := _too_small(e, settings))]),
        (
            "No subject was found; left as they are",
            [shown(e.before.name) for e in edits if e.subject is None and settings.mode == "subject"],
        ),
    ):
        if names:
            lines.append(f"{title}: {listed(names)}")
    return lines


def _flag(edit: CropEdit, sides: Sequence[str]) -> str:
    return f"{shown(edit.before.name)} ({', '.join(sides)})"


def _too_small(edit: CropEdit, settings: CropSettings) -> str:
    width, height = edit.box[2] - edit.box[0], edit.box[3] - edit.box[1]
    if settings.mode != "fixed" or (width >= settings.width and height >= settings.height):
        return ""
    return f"{shown(edit.before.name)} ({width}x{height})"


# ---- refusals ----


def _checked_subjects(
    dataset: Dataset, settings: CropSettings, subjects: Sequence[Subject | None] | None
) -> Sequence[Subject | None]:
    if subjects is None:
        if settings.mode == "subject":
            raise LoraGraftError(
                "LG-DATA-050",
                "Cropping around the subject needs to know where it is.",
                where="mode: subject",
                why="neither boxes nor masks were given.",
                fix="link a detector's bounding boxes or masks, or take another mode",
            )
        return [None] * len(dataset.records)
    if len(subjects) != len(dataset.records):
        raise LoraGraftError(
            "LG-DATA-048",
            f"{counted(len(subjects), 'subject')} for {counted(len(dataset.records), 'picture')}.",
            where="boxes or masks",
            why="each picture needs its own, in the same order, or one that holds for all.",
            fix="give the detector the images of this very dataset (Dataset to Images), all of them",
        )
    outside = [
        f"{shown(record.name)} ({', '.join(f'{v:g}' for v in box)} in {record.size[1]}x{record.size[0]})"
        for record, box in zip(dataset.records, subjects, strict=True)
        if box is not None and not _is_inside(record, box)
    ]
    if outside:
        raise LoraGraftError(
            "LG-DATA-049",
            f"Outside of their pictures: {counted(len(outside), 'subject')}.",
            where=listed(outside),
            why="the boxes belong to pictures of another size or order.",
            fix="detect on the images of this dataset; if they were shrunk, say so in boxes_longest_side",
        )
    return subjects


def _is_inside(record: Record, box: Subject) -> bool:
    """Say whether a box has an area, and its middle lies in the picture (detectors may reach beyond it)."""
    height, width = record.size
    left, top, right, bottom = box
    slack = 0.1 * max(width, height) + 2
    within = -slack <= left and -slack <= top and right <= width + slack and bottom <= height + slack
    return (
        within
        and left < right
        and top < bottom
        and right > 0
        and bottom > 0
        and left < width
        and top < height
    )
