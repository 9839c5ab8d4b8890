"""Records to pictures and back, so that any image tool can take part between two steps of a dataset."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from ..errors import LoraGraftError, listed
from .images import load_upright, shown, upright_mask
from .options import bad_option
from .records import Dataset, Record
from .report import counted
from .working_copy import Encoding, Item, own_stems, write_items

Size = tuple[int, int]

BYTES_PER_PIXEL = 4 * (3 + 1)  # float32, three colours and a mask
MEMORY_SHARE = 0.6  # of what is free; the tools between need some too


def shrunk(size: Size, longest_side: int) -> Size:
    """Return (width, height) shrunk so that no side is longer than ``longest_side`` (0: as it is)."""
    scale = longest_side / max(size)
    if not longest_side or scale >= 1:
        return size
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def chosen_records(dataset: Dataset, first: int = 0, count: int = 0) -> Dataset:
    """Return the records from number ``first`` on (the first is 0), ``count`` of them at most (0: all).

    Raises LG-CFG-003 where that leaves none.
    """
    if not 0 <= first < len(dataset.records):
        raise bad_option("first", first, f"0 to {len(dataset.records) - 1}")
    if count < 0:
        raise bad_option("count", count, "0 or more")
    chosen = dataset.records[first : first + count if count else None]
    if len(chosen) == len(dataset.records):
        return dataset
    line = f"Chosen: {len(chosen)} of {len(dataset.records)} pictures, from number {first} on."
    return dataset.replaced(chosen, line)


def check_memory(records: Sequence[Record], longest_side: int, free_bytes: int) -> None:
    """Raise LG-DATA-053 where the pictures of these records would take most of the free memory."""
    needed = 0
    for record in records:
        width, height = shrunk((record.size[1], record.size[0]), longest_side)
        needed += width * height * BYTES_PER_PIXEL
    if needed > free_bytes * MEMORY_SHARE:
        raise LoraGraftError(
            "LG-DATA-053",
            f"{counted(len(records), 'picture')} would take {needed / 2**30:.1f} GiB of memory; "
            f"{free_bytes / 2**30:.1f} are free.",
            where="Dataset to Images",
            why="every picture is unpacked at once, and the tools that follow need as much again.",
            fix="take a part of them (first, count), or shrink them (longest_side)",
        )


def to_picture(record: Record, longest_side: int = 0) -> tuple[Image.Image, Image.Image]:
    """Return a record's picture (RGB) and its mask (L, white: learn), of one size, upright and cropped."""
    image = load_upright(record)
    size = shrunk(image.size, longest_side)
    mask = upright_mask(record) if record.mask is not None else Image.new("L", size, 255)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.BILINEAR)
    return image, mask


def from_pictures(
    pictures: Sequence[np.ndarray],
    folder: Path | str,
    *,
    like: Dataset | None = None,
    captions: Sequence[str] | None = None,
    masks: Sequence[np.ndarray] | None = None,
    class_tokens: str = "",
    encoding: Encoding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Write pictures into a working copy and return its dataset.

    pictures: (H, W, 3) float in 0..1; masks: (H, W) float in 0..1, 1: learn there. Names, concepts,
    repeats, captions and masks are those of ``like``, picture by picture; ``captions`` and ``masks`` replace
    them. A mask that is white all over is none. What was written before with the same pixels stays untouched.
    Raises LG-DATA-052, LG-DATA-054, and those of `working_copy.write_items`.
    """
    _check_counts(len(pictures), like, captions, masks)
    encoding = encoding or Encoding()
    records = like.records if like is not None else [_new(n, class_tokens) for n in range(len(pictures))]
    names = [r.name for r in records]
    _check_values(pictures, masks, names)
    items, bent = [], []
    for number, (record, stem) in enumerate(zip(records, own_stems(records), strict=True)):
        if captions is not None:
            record = dataclasses.replace(record, caption=captions[number].strip(), caption_source="list")
        pixels = _eight_bit(pictures[number], record.background)
        mask = None if masks is None else _eight_bit(masks[number])
        if masks is None and record.mask is not None:
            if _same_shape(record, pixels):
                mask = np.asarray(upright_mask(record))
            else:
                bent.append(record.name)
        items.append(_item(record, stem + encoding.suffix, pixels, mask, encoding))
    lines = list(like.lines) if like is not None else []
    if bent:
        lines.append(f"Masks dropped, for the images have other shapes now: {listed(map(shown, bent))}")
    return write_items(folder, items, lines=lines, progress=progress).dataset


# ---- one picture ----


def _item(record: Record, name: str, pixels: np.ndarray, mask: np.ndarray | None, encoding: Encoding) -> Item:
    if mask is not None and (mask == 255).all():
        mask = None
    digest = hashlib.sha256(repr((pixels.shape, dataclasses.astuple(encoding))).encode())
    digest.update(pixels.tobytes())
    if mask is not None:
        digest.update(repr(mask.shape).encode() + mask.tobytes())
    return Item(
        record,
        name,
        digest.hexdigest(),
        _saver(pixels, encoding),
        None if mask is None else _saver(mask, Encoding("png")),
    )


def _saver(pixels: np.ndarray, encoding: Encoding) -> Callable[[IO[bytes]], object]:
    return lambda file: encoding.save(Image.fromarray(pixels), file)


def _eight_bit(values: np.ndarray, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Return 0..255 of values in 0..1, a fourth channel used as opacity."""
    clean = values.clip(0, 1)
    if values.ndim == 3 and values.shape[2] == 4:
        opacity = clean[..., 3:]
        clean = clean[..., :3] * opacity + np.asarray(background, np.float32) / 255 * (1 - opacity)
    return np.ascontiguousarray((clean * 255 + 0.5).astype(np.uint8))


def _same_shape(record: Record, pixels: np.ndarray) -> bool:
    """Say whether a picture has its record's aspect ratio, so that the record's mask still lies on it."""
    height, width = record.size
    return abs(width / height - pixels.shape[1] / pixels.shape[0]) <= 0.02 * width / height


def _new(number: int, class_tokens: str) -> Record:
    words = class_tokens.strip()
    name = f"{number + 1:05}.png"
    return Record(Path(name), name, (1, 1), words, words, 1, "", caption_source="folder" if words else "")


# ---- refusals ----


def _check_counts(
    num_pictures: int,
    like: Dataset | None,
    captions: Sequence[str] | None,
    masks: Sequence[np.ndarray] | None,
) -> None:
    others = {
        "records in dataset": None if like is None else len(like.records),
        "captions": None if captions is None else len(captions),
        "masks": None if masks is None else len(masks),
    }
    wrong = [f"{count} {name}" for name, count in others.items() if count not in (None, num_pictures)]
    if wrong or not num_pictures:
        raise LoraGraftError(
            "LG-DATA-052",
            f"{counted(num_pictures, 'image')}, but {' and '.join(wrong) or 'one is needed'}.",
            where="Images to Dataset",
            why="each image takes its name, caption and mask from the same place in the other lists.",
            fix="give lists of the same length; unlink those that belong to other pictures",
        )


def _check_values(
    pictures: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None, names: Sequence[str]
) -> None:
    wrong = []
    for number, picture in enumerate(pictures):
        if picture.ndim != 3 or picture.shape[2] not in (3, 4) or 0 in picture.shape:
            wrong.append(f"{shown(names[number])} (shape {'x'.join(map(str, picture.shape))})")
        elif not np.isfinite(picture).all():
            wrong.append(f"{shown(names[number])} (values that are no numbers)")
        elif masks is not None and (masks[number].ndim != 2 or not np.isfinite(masks[number]).all()):
            wrong.append(f"{shown(names[number])} (its mask)")
    if wrong:
        raise LoraGraftError(
            "LG-DATA-054",
            f"{len(wrong)} of {counted(len(pictures), 'image')} cannot be written.",
            where=listed(wrong),
            why="a picture has a height, a width, three or four colours, and values from 0 to 1.",
            fix="check the node that made them; values that are no numbers often mean black previews",
        )
