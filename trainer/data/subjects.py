"""Where the subject of each picture is, from what detector nodes give: bounding boxes or masks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LoraGraftError, listed
from .bridge import shrunk
from .crop import Subject
from .images import shown, upright_mask
from .options import bad_option
from .records import Dataset
from .report import counted

SEVERAL = ("all", "largest")
EDGES = ("x", "y", "width", "height")
MASK_THRESHOLD = 0.5


def subjects_from_boxes(
    values: Sequence[Any],
    sizes: Sequence[tuple[int, int]],
    *,
    several: str = "all",
    longest_side: int = 0,
) -> list[Subject | None]:
    """Return each picture's subject from BOUNDING_BOX values; None where nothing was detected.

    A value is one box, the boxes of one picture, or lists of boxes for several pictures, as ComfyUI's
    detectors give them; a single box or flat list holds for all pictures. ``sizes`` are (height, width) of
    the pictures; where the boxes were found on pictures shrunk to ``longest_side``, they are scaled back.
    ``several`` boxes in a picture count together, or only the largest. Raises LG-DATA-048, LG-DATA-051.
    """
    if several not in SEVERAL:
        raise bad_option("several", several, f"one of {', '.join(SEVERAL)}")
    found, is_shared = _per_picture(values)
    if is_shared and len(found) == 1:
        found = found * len(sizes)
    if len(found) != len(sizes):
        raise LoraGraftError(
            "LG-DATA-048",
            f"Boxes for {counted(len(found), 'picture')}, but there are {len(sizes)}.",
            where="bboxes",
            why="each picture needs its own, in the same order, or one that holds for all.",
            fix="give the detector the images of this very dataset (Dataset to Images), all of them",
        )
    subjects = []
    for boxes, (height, width) in zip(found, sizes, strict=True):
        seen = shrunk((width, height), longest_side)
        x, y = width / seen[0], height / seen[1]
        scaled = [(b[0] * x, b[1] * y, b[2] * x, b[3] * y) for b in boxes]
        subjects.append(_one_of(scaled, several))
    return subjects


def subject_from_mask(mask: np.ndarray, size: tuple[int, int]) -> Subject | None:
    """Return the box around what a mask (H, W) in 0..1 selects in a picture of (height, width).

    None where it selects nothing. A mask of another size than the picture is stretched to it.
    """
    selected = mask > MASK_THRESHOLD
    rows, columns = np.flatnonzero(selected.any(axis=1)), np.flatnonzero(selected.any(axis=0))
    if not len(rows):
        return None
    y, x = size[0] / mask.shape[0], size[1] / mask.shape[1]
    return (
        float(columns[0] * x),
        float(rows[0] * y),
        float((columns[-1] + 1) * x),
        float((rows[-1] + 1) * y),
    )


def own_subjects(dataset: Dataset) -> list[Subject | None]:
    """Return the box around each record's own mask; None for a record without one. Raises LG-DATA-009."""
    return [
        None
        if record.mask is None
        else subject_from_mask(np.asarray(upright_mask(record), np.float32) / 255, record.size)
        for record in dataset.records
    ]


def subjects_from_file(path: Path | str, dataset: Dataset, *, several: str = "all") -> list[Subject | None]:
    """Return the subjects that a JSON file of boxes names; None for a picture that it does not hold.

    The file is an object of picture names and their boxes, {"a.png": [{"x": 1, "y": 2, "width": 30,
    "height": 40}]}, or a list of boxes for each picture in order. Raises LG-DATA-048 and LG-DATA-051.
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable([f"{shown(file)}: {shown(error, 100)}"]) from error
    names = [record.name for record in dataset.records]
    if isinstance(content, dict):
        if unknown := sorted(set(content) - set(names)):
            raise _unreadable([f"no picture is called {shown(name)}" for name in unknown])
        boxes = [content.get(name, []) for name in names]
        content = [[box] if isinstance(box, dict) else box for box in boxes]
    if not isinstance(content, list):
        raise _unreadable([f"{shown(file)} holds neither an object nor a list"])
    return subjects_from_boxes(content, [record.size for record in dataset.records], several=several)


def _per_picture(values: Sequence[Any]) -> tuple[list[list[Subject]], bool]:
    """Return the boxes of each picture, and whether they came without a picture of their own."""
    found: list[list[Subject]] = []
    is_shared = True
    wrong: list[str] = []
    for value in values:
        if isinstance(value, Mapping):
            found.append(_read([value], wrong))
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
            is_shared = False
            found += [_read(boxes, wrong) for boxes in value]
        elif isinstance(value, (list, tuple)):
            found.append(_read(value, wrong))
        else:
            wrong.append(shown(repr(value), 60))
    if wrong:
        raise _unreadable(wrong)
    return found, is_shared


def _read(boxes: Sequence[Any], wrong: list[str]) -> list[Subject]:
    read: list[Subject] = []
    for box in boxes:
        try:
            x, y, width, height = (float(box[edge]) for edge in EDGES)
        except (TypeError, KeyError, ValueError, IndexError):
            wrong.append(shown(repr(box), 60))
            continue
        if not all(map(math.isfinite, (x, y, width, height))) or width <= 0 or height <= 0:
            wrong.append(shown(repr(box), 60))
        else:
            read.append((x, y, x + width, y + height))
    return read


def _unreadable(wrong: Sequence[str]) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-051",
        f"Unreadable bounding boxes: {len(wrong)}.",
        where=listed(wrong, limit=5),
        why="a box holds the numbers x, y, width and height in pixels, width and height above 0.",
        fix="link a detector whose output is ComfyUI's own BOUNDING_BOX, or use its mask",
    )


def _one_of(boxes: Sequence[Subject], several: str) -> Subject | None:
    if not boxes:
        return None
    if several == "largest":
        return max(boxes, key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)
