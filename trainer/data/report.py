"""Say in plain words what training will do to a dataset's pictures and captions, before it is spent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..config import DatasetConfig, resolution_wh
from ..errors import listed
from .buckets import Choice, Size, bucket_limits
from .captions import tags_of
from .folders import natural_key
from .images import shown

if TYPE_CHECKING:
    from .records import Record

# An image that loses more than this share of its area is named.
LARGE_CROP = 1 / 3
NUM_EXAMPLES = 3
NUM_NAMES = 8


def bucket_lines(records: Sequence[Record], choices: Sequence[Choice], config: DatasetConfig) -> list[str]:
    """Return the table of buckets, and the images that lose much or are enlarged."""
    members: dict[Size, list[int]] = {}
    for index, choice in enumerate(choices):
        members.setdefault(choice.bucket, []).append(index)
    lines = [_bucket_title(config, len(members)), *_moved_limits(config)]
    lines.append(f"  {'size':>11}  {'images':>6}  {'with repeats':>12}  {'mean crop':>9}")
    for bucket in sorted(members):
        inside = members[bucket]
        repeats = sum(records[i].repeats for i in inside)
        crop = sum(choices[i].cropped for i in inside) / len(inside)
        lines.append(f"  {size_text(bucket):>11}  {len(inside):>6}  {repeats:>12}  {crop:>9.1%}")
    cut, enlarged, factors = [], [], [1.0]
    for record, choice in zip(records, choices, strict=True):
        if choice.cropped > LARGE_CROP:
            cut.append(f"{record.name} {choice.cropped:.0%}")
        factor = max(choice.resized[0] / record.size[1], choice.resized[1] / record.size[0])
        if factor > 1:
            enlarged.append(f"{record.name} {size_text(record.size[::-1])}")
            factors.append(factor)
    lines += _noted("Much is cut off", cut)
    lines += _noted(f"Smaller than their bucket, enlarged up to {max(factors):.2g} times", enlarged)
    return lines


def caption_use_lines(records: Sequence[Record], config: DatasetConfig) -> list[str]:
    """Return some captions, and the caption settings that have no effect on them."""
    last = len(records) - 1
    spread = sorted({round(i * last / (NUM_EXAMPLES - 1)) for i in range(NUM_EXAMPLES)})
    lines = [f"Example: {shown(records[i].name)}: '{shown(records[i].caption)}'" for i in spread]
    varies = config.shuffle_caption or config.caption_tag_dropout_rate > 0
    free = any(len(tags_of(r.caption, config.caption_separator)) > config.keep_tokens for r in records)
    if config.keep_tokens and not varies:
        lines.append("keep_tokens does nothing: neither shuffle_caption nor caption_tag_dropout_rate is on.")
    elif varies and not free:
        lines.append(f"No caption has more than {config.keep_tokens} tags: none is shuffled or left out.")
    elif config.shuffle_caption and config.keep_tokens == 0:
        lines.append("shuffle_caption moves every tag; keep_tokens 1 would keep a trigger word in front.")
    return lines


def group_line(number: int, num_images: int, batch_size: int | None) -> str:
    """Return the heading of one group of images that form batches only among themselves."""
    size = f"batch size {batch_size}" if batch_size else "the run's batch size"
    return f"Group {number}: {counted(num_images, 'image')}, {size}."


def counted(number: int, noun: str) -> str:
    """Return "1 image", "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size_text(size: Size) -> str:
    """Return "512x768" for (512, 768)."""
    return f"{size[0]}x{size[1]}"


def _bucket_title(config: DatasetConfig, used: int) -> str:
    area = size_text(resolution_wh(config))
    if not config.enable_bucket:
        return f"No buckets: every image is scaled to cover {area} and cut from its centre."
    if config.num_bucket:
        return (
            f"{counted(used, 'bucket')} of about the area of {area}, made from the images' aspect ratios "
            "(num_bucket; min_bucket_reso and max_bucket_reso do nothing)."
        )
    if config.bucket_no_upscale:
        return (
            f"{counted(used, 'bucket')} of at most the area of {area}, after the images' own sizes "
            "(bucket_no_upscale; min_bucket_reso and max_bucket_reso do nothing)."
        )
    return f"{counted(used, 'bucket')} of at most the area of {area}."


def _moved_limits(config: DatasetConfig) -> list[str]:
    if not config.enable_bucket or config.bucket_no_upscale or config.num_bucket:
        return []
    given = {"min_bucket_reso": config.min_bucket_reso, "max_bucket_reso": config.max_bucket_reso}
    moved = [
        f"{name} {value} counts as {used}"
        for (name, value), used in zip(given.items(), bucket_limits(config), strict=True)
        if value != used
    ]
    return [f"{', '.join(moved)}, on whole bucket_reso_steps."] if moved else []


def _noted(text: str, names: Iterable[str]) -> list[str]:
    items = [shown(name) for name in sorted(names, key=natural_key)]
    return [f"{text} ({len(items)}): {listed(items, limit=NUM_NAMES)}."] if items else []
