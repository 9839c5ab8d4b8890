"""Grids and plots: prompts x seeds x strengths x checkpoints as a labelled picture, and the loss curve."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

from .data.lettering import font_for
from .errors import LoraGraftError

PAPER, INK, FAINT, RAW, SMOOTH, MARK = "#ffffff", "#1c1e21", "#d8dce2", "#b9c6dd", "#2f5fb3", "#3a9a5c"
GAP = 6
MAX_VALUES = 100
RANGE = re.compile(r"^\s*(-?[\d.]+)\s*-\s*(-?[\d.]+)\s*(?:\[\s*(\d+)\s*\])?\s*$")


def parse_range(text: str, *, what: str = "strengths") -> list[float]:
    """Read "0, 0.7-1.5 [5]" as 0, 0.7, 0.9, 1.1, 1.3, 1.5: numbers and ranges of [n] evenly spaced values.

    A range without [n] has 5 values. Raises LG-NODE-010 for anything else and for more than 100 values.
    """
    values: list[float] = []
    for item in text.split(","):
        try:
            if match := RANGE.match(item):
                low, high, count = float(match[1]), float(match[2]), int(match[3] or 5)
                if not 1 <= count <= MAX_VALUES:
                    raise ValueError(f"{count} values")
                step = (high - low) / max(1, count - 1)
                values += [round(low + i * step, 6) for i in range(count)]
            else:
                values.append(float(item))
        except ValueError:
            values = [float("nan")]
            break
    if not values or len(values) > MAX_VALUES or any(v != v or abs(v) > 1000 for v in values):
        raise LoraGraftError(
            "LG-NODE-010",
            f"The {what} {text[:60]!r} cannot be read.",
            where=what,
            why=f"expected numbers and ranges, at most {MAX_VALUES} values.",
            fix="write for instance 0, 1 or 0, 0.7-1.5 [5]",
        )
    return list(dict.fromkeys(values))


def grid(
    cells: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Lay images out in labelled rows and columns; all cells take the size of the largest."""
    at = _layout(cells, [_shown(r) for r in row_labels], [_shown(c) for c in column_labels], _shown(title))
    sheet = Image.new("RGB", (at.x(len(at.columns)) + GAP, at.y(len(cells)) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(at.title):
        draw.text((GAP, GAP + i * at.line), text, INK, at.font)
    for c, lines in enumerate(at.columns):
        for i, text in enumerate(lines):
            middle = at.x(c) + at.column_width / 2
            draw.text((middle, at.top + GAP + i * at.line), text, INK, at.font, anchor="ma")
    for r, row in enumerate(cells):
        offset = (at.row_height - at.line * len(at.rows[r])) / 2
        for i, text in enumerate(at.rows[r]):
            draw.text((GAP, at.y(r) + offset + i * at.line), text, INK, at.font)
        for c, image in enumerate(row):
            x0 = at.x(c) + (at.column_width - image.width) // 2
            sheet.paste(image.convert("RGB"), (x0, at.y(r) + (at.row_height - image.height) // 2))
    return sheet


@dataclass(frozen=True)
class _Layout:
    """Where a grid's parts lie, in pixels: the title, the columns' labels below ``top``, then the rows."""

    font: ImageFont.FreeTypeFont
    line: int
    title: list[str]
    rows: list[list[str]]
    columns: list[list[str]]
    top: int
    head: int
    label_width: int
    column_width: int
    row_height: int

    def x(self, column: int) -> int:
        return self.label_width + column * (self.column_width + GAP)

    def y(self, row: int) -> int:
        return self.top + self.head + row * (self.row_height + GAP)


def _layout(
    cells: Sequence[Sequence[Image.Image]], rows: Sequence[str], columns: Sequence[str], title: str
) -> _Layout:
    """Measure a grid: labels widen columns and the margin up to a limit, and wrap behind it."""
    width = max(im.width for row in cells for im in row)
    height = max(im.height for row in cells for im in row)
    font = font_for(max(11, min(22, height // 12)), [title, *rows, *columns])
    line = round(font.size * 1.4)
    column_width = max(width, min(3 * width, max((round(font.getlength(c)) + 8 for c in columns), default=0)))
    longest = max((round(font.getlength(r)) for r in rows), default=0)
    label_width = min(longest, max(220, 2 * width)) + 2 * GAP
    in_rows = [_wrap(label, font, label_width - 2 * GAP) for label in rows]
    in_columns = [_wrap(label, font, column_width) for label in columns]
    whole = label_width + (column_width + GAP) * len(columns) - GAP
    in_title = _wrap(title, font, whole) if title else []
    return _Layout(
        font,
        line,
        in_title,
        in_rows,
        in_columns,
        top=line * len(in_title) + (GAP if title else 0),
        head=line * max((len(w) for w in in_columns), default=1) + GAP,
        label_width=label_width,
        column_width=column_width,
        row_height=max([height, *(line * len(w) for w in in_rows)]),
    )


def chart(
    losses: Sequence[float], saves: Sequence[int] = (), size: tuple[int, int] = (900, 420)
) -> Image.Image:
    """Plot a loss per step, raw and smoothed, with a mark at each saved step; ``size`` is (width, height)."""
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), font_for(13)
    left, top, right, bottom = 70, 24, size[0] - 20, size[1] - 40
    if not losses:
        draw.text((left, top), "no steps", INK, font)
        return sheet
    smooth = smoothed(losses)
    low, high = min(losses), max(losses)
    if high - low < 1e-12:  # a constant loss still has a place on the paper
        low, high = low - 0.5, high + 0.5

    def point(i: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * (i / max(1, len(losses) - 1))
        return x, bottom - (bottom - top) * (value - low) / (high - low)

    for k in range(5):
        value = low + (high - low) * k / 4
        y = point(0, value)[1]
        draw.line((left, y, right, y), FAINT)
        draw.text((left - 8, y), f"{value:.4g}", INK, font, anchor="rm")
    for step in saves:
        x = point(step - 1, low)[0]
        draw.line((x, top, x, bottom), MARK)
    for values, colour, width in ((losses, RAW, 1), (smooth, SMOOTH, 2)):
        for a, b in pairwise([point(i, v) for i, v in enumerate(values)]):
            draw.line((*a, *b), colour, width)
    draw.text((left, bottom + 8), "1", INK, font, anchor="ma")
    draw.text((right, bottom + 8), str(len(losses)), INK, font, anchor="ra")
    draw.text(((left + right) / 2, bottom + 8), "step", INK, font, anchor="ma")
    draw.text((left, 4), "loss: raw and smoothed" + (", green: saved" if saves else ""), INK, font)
    return sheet


def smoothed(values: Sequence[float], decay: float = 0.95) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(mean / weight)
    return result


def _shown(text: str) -> str:
    """Return the text without what cannot be drawn: control characters, and halves of letters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        first, *more = _pieces(word, font, width)
        if lines and font.getlength(f"{lines[-1]} {first}") <= width:
            lines[-1] += f" {first}"
        else:
            lines.append(first)
        lines += more
    return lines or [""]


def _pieces(word: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break a word that is wider than a line, behind an underscore where there is one, as in file names."""
    pieces = []
    while font.getlength(word) > width and len(word) > 1:
        fits = next((n for n in range(len(word) - 1, 1, -1) if font.getlength(word[:n]) <= width), 1)
        cut = word.rfind("_", 0, fits) + 1 or fits
        pieces.append(word[:cut])
        word = word[cut:]
    return [*pieces, word]
