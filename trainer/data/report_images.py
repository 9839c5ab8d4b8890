"""The report in pictures: what each bucket trains on, the images' sizes, and the most frequent tags."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from ..errors import LoraGraftError
from .images import load_upright
from .lettering import fitted, font_for
from .report import counted
from .train_set import TrainSet

PAPER, INK, FAINT, BAR, MARK = "#ffffff", "#1c1e21", "#d8dce2", "#5b83c4", "#d08a1d"
GAP = 8
THUMB_PX = 112
PER_ROW = 8
MAX_BUCKETS = 24
WIDTH = 2 * GAP + PER_ROW * (THUMB_PX + GAP)
NUM_TAGS = 25
NUM_BINS = 16


def report_pictures(
    train_set: TrainSet,
    report: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[str, Image.Image]]:
    """Return the pictures with their titles; ``progress`` is told (done, total) for each thumbnail."""
    return [
        ("What training sees, by bucket", bucket_sheet(train_set, progress)),
        ("Short sides of the images", size_histogram(train_set)),
        ("Most frequent tags", tag_bars(report)),
    ]


def bucket_sheet(train_set: TrainSet, progress: Callable[[int, int], None] | None = None) -> Image.Image:
    """Return a sheet with a row for each bucket: its first pictures, cut as training cuts them."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, bucket in enumerate(train_set.buckets):
        members.setdefault(bucket, []).append(index)
    buckets = sorted(members, key=lambda b: (-len(members[b]), b))
    rows = buckets[:MAX_BUCKETS]
    font = font_for(14)
    line, row_height = 22, 22 + THUMB_PX + GAP
    rest = len(buckets) - len(rows)
    sheet = Image.new("RGB", (WIDTH, GAP + len(rows) * row_height + (line if rest else 0)), PAPER)
    draw = ImageDraw.Draw(sheet)
    total = sum(min(PER_ROW, len(members[b])) for b in rows)
    done = 0
    for number, bucket in enumerate(rows):
        top = GAP + number * row_height
        inside = members[bucket]
        samples = sum(train_set.records[i].repeats for i in inside)
        title = f"{bucket[0]}x{bucket[1]}: {counted(len(inside), 'image')}, {samples} with repeats"
        draw.text((GAP, top), title, INK, font)
        for column, index in enumerate(inside[:PER_ROW]):
            thumb = _thumb(train_set, index)
            left = GAP + column * (THUMB_PX + GAP)
            sheet.paste(thumb, (left, top + line))
            done += 1
            if progress is not None:
                progress(done, total)
    if rest:
        draw.text((GAP, GAP + len(rows) * row_height), f"and {rest} more buckets", INK, font)
    return sheet


def size_histogram(train_set: TrainSet) -> Image.Image:
    """Return a histogram of the images' short sides; the training size is marked."""
    sides = [min(record.size) for record in train_set.records]
    wanted = min(min(bucket) for bucket in train_set.buckets)
    high = max(*sides, wanted, 2)
    width = -(-high // NUM_BINS)
    bins = [0] * NUM_BINS
    for side in sides:
        bins[min(NUM_BINS - 1, (side - 1) // width)] += 1
    sheet, font = Image.new("RGB", (WIDTH, 260), PAPER), font_for(13)
    draw = ImageDraw.Draw(sheet)
    left, right, top, bottom = 32, WIDTH - 32, 40, 220
    step = (right - left) / NUM_BINS
    tallest = max(bins)
    draw.text((GAP, 6), "short side in pixels; orange: the smallest bucket side", INK, font)
    for i, count in enumerate(bins):
        x = left + i * step
        y = bottom - (bottom - top) * count / tallest
        draw.rectangle((x + 1, y, x + step - 2, bottom), BAR)
        if count:
            draw.text((x + step / 2, y - 2), str(count), INK, font, anchor="mb")
        if i % 2 == 1:
            draw.text((x + step, bottom + 6), str((i + 1) * width), INK, font, anchor="ma")
    mark = left + (right - left) * min(1.0, wanted / (NUM_BINS * width))
    draw.line((mark, top, mark, bottom + 4), MARK, 2)
    draw.line((left, bottom, right, bottom), FAINT)
    return sheet


def tag_bars(report: Mapping[str, Any]) -> Image.Image:
    """Return bars of the most frequent tags."""
    top: Sequence[Sequence[Any]] = report["tags"]["top"][:NUM_TAGS]
    font = font_for(13, [str(tag) for tag, _ in top])
    sheet = Image.new("RGB", (WIDTH, 34 + 20 * max(1, len(top))), PAPER)
    draw = ImageDraw.Draw(sheet)
    title = f"tags of {report['tags']['captions']} captions" if top else "no tags"
    draw.text((GAP, 6), title, INK, font)
    label, most = 260, top[0][1] if top else 1
    for i, (tag, count) in enumerate(top):
        y = 32 + 20 * i
        draw.text((label - GAP, y), fitted(str(tag), font, label - 2 * GAP), INK, font, anchor="ra")
        length = (WIDTH - label - 60) * count / most
        draw.rectangle((label, y + 1, label + length, y + 15), BAR)
        draw.text((label + length + 6, y), str(count), INK, font)
    return sheet


def _thumb(train_set: TrainSet, index: int) -> Image.Image:
    """Return what training sees of a record, small; a grey field where the file changed meanwhile."""
    bucket, resized = train_set.buckets[index], train_set.resized[index]
    try:
        image = load_upright(train_set.records[index])
    except LoraGraftError:  # the run itself refuses it with the reason; the picture is only a look
        return Image.new("RGB", (THUMB_PX, THUMB_PX), FAINT)
    scale_x, scale_y = image.width / resized[0], image.height / resized[1]
    left, top = (resized[0] - bucket[0]) / 2 * scale_x, (resized[1] - bucket[1]) / 2 * scale_y
    box = (left, top, left + bucket[0] * scale_x, top + bucket[1] * scale_y)
    shrink = THUMB_PX / max(bucket)
    size = max(1, round(bucket[0] * shrink)), max(1, round(bucket[1] * shrink))
    return image.resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


def picture_files(pictures: Sequence[tuple[str, Image.Image]]) -> Iterator[tuple[str, Image.Image]]:
    """Yield each picture with a file name made from its title."""
    for title, image in pictures:
        yield f"{title.split(',')[0].lower().replace(' ', '-')}.png", image
