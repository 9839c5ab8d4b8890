"""A picture of what cropping does: thumbnails with the cut-off part hatched and the subject framed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from .crop import Box, CropEdit
from .images import load_upright
from .lettering import fitted, font_for

PAPER, INK, HATCH, SHADE, KEPT, SUBJECT, FLAG = (
    *("#ffffff", "#1c1e21", "#d8dce2", "#1c1e21", "#2f5fb3", "#3a9a5c", "#c8372d"),
)
GAP = 8
LINE = 18
HATCH_EVERY = 9
SHADE_ALPHA = 0.55


def crop_preview(
    edits: Sequence[CropEdit],
    *,
    max_pictures: int = 24,
    cell_px: int = 240,
    progress: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """Return a sheet of at most ``max_pictures`` pictures, those to look at first: flagged, then most cut.

    What is cut off is darkened and hatched, what stays has a blue frame, the subject a green one, and a red
    one where it touches or leaves the frame. Raises LG-DATA-009 for a picture that changed.
    """
    chosen = sorted(edits, key=_interest)[:max_pictures]
    columns = min(len(chosen), max(1, min(6, round((len(chosen) * 1.5) ** 0.5)))) or 1
    rows = max(1, -(-len(chosen) // columns))
    width = columns * (cell_px + GAP) + GAP
    sheet = Image.new("RGB", (width, rows * (cell_px + LINE + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = font_for(12, [edit.before.name for edit in chosen])
    for number, edit in enumerate(chosen):
        x = GAP + number % columns * (cell_px + GAP)
        y = GAP + number // columns * (cell_px + LINE + GAP)
        cell = crop_thumbnail(edit, cell_px)
        sheet.paste(cell, (x + (cell_px - cell.width) // 2, y + (cell_px - cell.height) // 2))
        flagged = bool(edit.cut_sides or edit.touched_sides)
        label = f"{edit.before.name}  -{edit.lost:.0%}"
        draw.text((x, y + cell_px + 2), fitted(label, font, cell_px), FLAG if flagged else INK, font)
        if progress is not None:
            progress(number + 1, len(chosen))
    return sheet


def crop_thumbnail(edit: CropEdit, longest_px: int) -> Image.Image:
    """Return one picture, its longer side ``longest_px`` at most, with its crop drawn into it."""
    image = load_upright(edit.before)
    scale = min(1.0, longest_px / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image.resize(size, Image.Resampling.BOX if scale < 0.5 else Image.Resampling.LANCZOS)
    kept = _scaled(edit.box, size, image.size)
    if edit.is_cropped:
        shaded = Image.blend(small, Image.new("RGB", size, SHADE), SHADE_ALPHA)
        _hatch(shaded)
        shaded.paste(small.crop(kept), kept[:2])
        small = shaded
    draw = ImageDraw.Draw(small)
    if edit.is_cropped:
        draw.rectangle((kept[0], kept[1], kept[2] - 1, kept[3] - 1), outline=KEPT, width=2)
    if edit.subject is not None:
        colour = FLAG if edit.cut_sides or edit.touched_sides else SUBJECT
        box = _scaled(_whole(edit.subject), size, image.size)
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=colour, width=2)
    return small


def _interest(edit: CropEdit) -> tuple[bool, bool, float]:
    return not edit.cut_sides, not edit.touched_sides, -edit.lost


def _hatch(image: Image.Image) -> None:
    draw = ImageDraw.Draw(image)
    for start in range(-image.height, image.width, HATCH_EVERY):
        draw.line((start, image.height, start + image.height, 0), HATCH)


def _whole(box: tuple[float, float, float, float]) -> Box:
    left, top, right, bottom = (round(value) for value in box)
    return left, top, right, bottom


def _scaled(box: Box, size: tuple[int, int], of: tuple[int, int]) -> Box:
    """Return a box of a picture of size ``of`` in one of size ``size``: inside it, at least one pixel."""
    x, y = size[0] / of[0], size[1] / of[1]
    left = min(max(0, round(box[0] * x)), size[0] - 1)
    top = min(max(0, round(box[1] * y)), size[1] - 1)
    right = min(size[0], max(left + 1, round(box[2] * x)))
    bottom = min(size[1], max(top + 1, round(box[3] * y)))
    return left, top, right, bottom
