"""Draw groups of duplicates: one row for each, the picture that is kept in front."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .duplicates import Group
from .images import load_upright
from .records import Record
from .report import size_text

THUMB = 160
LABEL = 18
GAP = 8
MAX_ROWS = 12
MAX_TWINS = 5
GROUND, INK, KEPT = (32, 32, 32), (220, 220, 220), (90, 190, 110)


def duplicate_sheet(groups: Sequence[Group]) -> Image.Image:
    """Return a picture of the first 12 groups, each with its best picture (framed) and up to 5 twins.

    Raises LG-DATA-009 for a picture that changed.
    """
    rows = [
        [(group.kept, "kept"), *((twin.record, twin.kind) for twin in group.twins[:MAX_TWINS])]
        for group in groups[:MAX_ROWS]
    ]
    columns = max((len(row) for row in rows), default=2)
    cell = THUMB + GAP
    height = max(1, len(rows)) * (THUMB + LABEL + GAP) + GAP
    sheet = Image.new("RGB", (columns * cell + GAP, height), GROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    if not rows:
        draw.text((GAP, GAP), "No duplicates.", INK, font)
    for y, row in enumerate(rows):
        for x, (record, label) in enumerate(row):
            left, top = GAP + x * cell, GAP + y * (THUMB + LABEL + GAP)
            draw.text((left, top), f"{label}, {size_text(record.size[::-1])}", INK, font)
            picture = _thumbnail(record)
            place = left + (THUMB - picture.width) // 2, top + LABEL + (THUMB - picture.height) // 2
            sheet.paste(picture, place)
            if x == 0:
                corner = place[0] + picture.width, place[1] + picture.height
                draw.rectangle(
                    (place[0] - 2, place[1] - 2, corner[0] + 1, corner[1] + 1), outline=KEPT, width=2
                )
    return sheet


def _thumbnail(record: Record) -> Image.Image:
    picture = load_upright(record)
    picture.thumbnail((THUMB, THUMB))
    return picture
