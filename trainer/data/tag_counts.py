"""How often each tag occurs, and what an edit changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import listed
from .captions import tags_of
from .images import shown

if TYPE_CHECKING:
    from .records import Record

NUM_TOP = 30
NUM_NAMES = 12


def count_tags(records: Iterable[Record], separator: str = ",") -> Counter[str]:
    """Return in how many images each tag occurs (once per image, without repeats), most frequent first."""
    return count_captions((record.caption for record in records), separator)


def count_captions(captions: Iterable[str], separator: str = ",") -> Counter[str]:
    """Return in how many captions each tag occurs, most frequent first, then by name."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(dict.fromkeys(tags_of(caption, separator), 1))
    return Counter(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))


def frequency_lines(counts: Mapping[str, int], num_images: int, *, top: int = NUM_TOP) -> list[str]:
    """Return a table of the most frequent tags, and those in all and in only one image."""
    lines = [f"{len(counts)} different tags in {num_images} captions."]
    lines += [f"  {count:>6}  {shown(tag)}" for tag, count in list(counts.items())[:top]]
    if len(counts) > top:
        lines.append(f"  and {len(counts) - top} more tags")
    everywhere = [tag for tag, count in counts.items() if count == num_images]
    once = [tag for tag, count in counts.items() if count == 1]
    if everywhere and num_images > 1:
        lines.append(f"In every caption ({len(everywhere)}): {_names(everywhere)}.")
    if once and num_images > 1:
        lines.append(f"In one caption only ({len(once)}): {_names(once)}.")
    return lines


def change_lines(before: Mapping[str, int], after: Mapping[str, int], *, top: int = NUM_TOP) -> list[str]:
    """Return which tags became more or less frequent, the largest changes first."""
    changes = {
        tag: (before.get(tag, 0), after.get(tag, 0))
        for tag in {**before, **after}
        if before.get(tag, 0) != after.get(tag, 0)
    }
    if not changes:
        return ["Tag frequencies: nothing changed."]
    gone = sum(1 for old, new in changes.values() if not new)
    new_tags = sum(1 for old, new in changes.values() if not old)
    lines = [f"Tag frequencies, before -> after: {len(changes)} changed, {gone} gone, {new_tags} new."]
    ranked = sorted(changes.items(), key=lambda item: (-abs(item[1][1] - item[1][0]), item[0]))
    lines += [f"  {old:>6} -> {new:<6} {shown(tag)}" for tag, (old, new) in ranked[:top]]
    if len(ranked) > top:
        lines.append(f"  and {len(ranked) - top} more")
    return lines


def _names(tags: Sequence[str]) -> str:
    return listed((shown(tag) for tag in tags), limit=NUM_NAMES)
