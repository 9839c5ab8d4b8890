"""Grids and plots: prompts x seeds x strengths x checkpoints as a labelled picture, and the loss curve."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    row_labels, column_labels = [_shown(r) for r in row_labels], [_shown(c) for c in column_labels]
    title = _shown(title)
    width = max(im.width for row in cells for im in row)
    height = max(im.height for row in cells for im in row)
    font = font_for(max(11, min(22, height // 12)), [title, *row_labels, *column_labels])
    column_width = max(
        width, min(3 * width, max((round(font.getlength(c)) + 8 for c in column_labels), default=0))
    )
    label_width = (
        min(max((round(font.getlength(r)) for r in row_labels), default=0), max(220, 2 * width)) + 2 * GAP
    )
    line = round(font.size * 1.4)
    wrapped_rows = [_wrap(label, font, label_width - 2 * GAP) for label in row_labels]
    row_height = max([height, *(line * len(w) for w in wrapped_rows)])
    wrapped_columns = [_wrap(label, font, column_width) for label in column_labels]
    head = line * max((len(w) for w in wrapped_columns), default=1) + GAP
    wrapped_title = (
        _wrap(title, font, label_width + (column_width + GAP) * len(column_labels) - GAP) if title else []
    )
    top = line * len(wrapped_title) + (GAP if title else 0)
    sheet = Image.new(
        "RGB",
        (
            label_width + (column_width + GAP) * len(column_labels) + GAP,
            top + head + (row_height + GAP) * len(cells) + GAP,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(wrapped_title):
        draw.text((GAP, GAP + i * line), text, INK, font)
    for c, lines in enumerate(wrapped_columns):
        x = label_width + c * (column_width + GAP) + column_width / 2
        for i, text in enumerate(lines):
            draw.text((x, top + GAP + i * line), text, INK, font, anchor="ma")
    for r, row in enumerate(cells):
        y = top + head + r * (row_height + GAP)
        for i, text in enumerate(wrapped_rows[r]):
            offset = (row_height - line * len(wrapped_rows[r])) / 2
            draw.text((GAP, y + offset + i * line), text, INK, font)
        for c, image in enumerate(row):
            x0 = label_width + c * (column_width + GAP) + (column_width - image.width) // 2
            sheet.paste(image.convert("RGB"), (x0, y + (row_height - image.height) // 2))
    return sheet


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
