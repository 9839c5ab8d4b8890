"""Say in plain words what a scan found and what training will do to it, before anything is spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from PIL import ImageFile

from ..config import DatasetConfig, resolution_wh
from ..errors import listed
from .buckets import Choice, Size
from .caption_files import CaptionText
from .captions import tags_of
from .folders import Found, Walk, natural_key
from .images import ImageFacts, shown

if TYPE_CHECKING:
    from .records import Record

# An image that loses more than this share of its area is named.
LARGE_CROP = 1 / 3
NUM_EXAMPLES = 3
NUM_NAMES = 8


def scan_image_lines(records: Sequence[Record], root_name: str, facts: Mapping[str, ImageFacts]) -> list[str]:
    """Return how many images there are, how often they count, and what is odd about some."""
    total = sum(record.repeats for record in records)
    lines = [f"{counted(len(records), 'image')} in {shown(root_name)}, {total} with repeats."]
    groups = Counter((record.repeats, record.concept) for record in records)
    for (repeats, concept), count in groups.items():
        words = f"class words '{shown(concept)}'" if concept else "no class words"
        lines.append(f"  {repeats} x {counted(count, 'image')}, {words}")
    same: dict[str, list[str]] = {}
    for record in records:
        same.setdefault(record.content_hash, []).append(record.name)
    twins = [" = ".join(names) for names in same.values() if len(names) > 1]
    alpha = [r.name for r in records if facts[r.name].has_alpha]
    animated = [r.name for r in records if facts[r.name].is_animated]
    lines += _noted("The same picture more than once", twins)
    lines += _noted("Transparent parts are laid on white", alpha)
    lines += _noted("Only the first frame or page is used", animated)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        lines.append(
            "Another part of this process makes Pillow accept truncated images; some may go unnoticed."
        )
    return lines


def scan_caption_lines(
    records: Sequence[Record],
    pairs: Mapping[str, list[str]],
    captions: Mapping[str, CaptionText],
    orphans: Sequence[str],
) -> list[str]:
    """Return where the captions come from, and which files were not taken as they are."""
    used = {record.name: pairs[record.name][0] for record in records if pairs[record.name]}
    sources = Counter(PurePosixPath(name).suffix.casefold() for name in used.values())
    parts = [f"{count} from {suffix} files" for suffix, count in sources.items()]
    if len(used) < len(records):
        parts.append(f"{len(records) - len(used)} from class words, having no caption file")
    several = [
        f"{image} ({', '.join(pairs[image])})"
        for image in used
        if len({captions[name].text for name in pairs[image]}) > 1
    ]
    shared = [name for name, count in Counter(used.values()).items() if count > 1]
    long = [name for name in set(used.values()) if captions[name].num_lines > 1]
    return [
        f"Captions: {', '.join(parts)}.",
        *_noted("Several caption files that differ, the first is used", several),
        *_noted("Caption files that several images share", shared),
        *_noted("Caption files of several lines, only the first is used", long),
        *_noted("Caption files that belong to no image", orphans),
    ]


def scan_left_out_lines(
    bad: Mapping[str, str], dropped: Sequence[Found], found: Walk, others: Sequence[str]
) -> list[str]:
    """Return what lies in the folder and is not trained on."""
    unread = [path.name for path in found.unread_folders]
    return [
        *_noted("Skipped, cannot be read", [f"{name} ({reason})" for name, reason in bad.items()]),
        *_noted("Left out, the folder's name asks for 0 repeats", [file.name for file in dropped]),
        *_noted("Left out, links that lead out of the folder or nowhere", found.links),
        *_noted("Left out, links to folders", found.linked_folders),
        *_noted("Left out, neither files nor folders", found.special),
        *_noted("Left out, hidden", found.hidden),
        *_noted("Left out, folders in this one, because 'recursive' is off", unread),
        *_noted("Left out, not images", others),
    ]


def bucket_lines(records: Sequence[Record], choices: Sequence[Choice], config: DatasetConfig) -> list[str]:
    """Return the table of buckets, and the images that lose much or are enlarged."""
    members: dict[Size, list[int]] = {}
    for index, choice in enumerate(choices):
        members.setdefault(choice.bucket, []).append(index)
    lines = [_bucket_title(config, len(members))]
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
    if config.bucket_no_upscale:
        return (
            f"{counted(used, 'bucket')} of at most the area of {area}, after the images' own sizes "
            "(bucket_no_upscale; min_bucket_reso and max_bucket_reso do nothing)."
        )
    return f"{counted(used, 'bucket')} of at most the area of {area}."


def _noted(text: str, names: Iterable[str]) -> list[str]:
    items = [shown(name) for name in sorted(names, key=natural_key)]
    return [f"{text} ({len(items)}): {listed(items, limit=NUM_NAMES)}."] if items else []
