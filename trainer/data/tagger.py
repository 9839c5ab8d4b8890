"""Tag a dataset's pictures: scores of one or several taggers become captions.

The rules are those of the taggers' author (thresholds, MCut, ratings, kaomojis) and of the guides
(trigger word first, several taggers merged, features pruned). Only the records change.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import LoraGraftError, listed
from .caption_ops import Edited
from .caption_templates import check_template, fill_template
from .captions import JOINED_BY, tags_of
from .images import shown
from .records import Dataset, Record
from .report import counted
from .tag_counts import count_captions, frequency_lines
from .tag_lists import TagList, plain, read_tag_list, spaced
from .tagger_models import CHARACTER, GENERAL, RATING, Labels, TaggerFiles
from .tagger_scores import Progress, Scored, Scores, score
from .tagger_session import DEVICES

EXISTING = ("replace", "append", "merge")
RATINGS = ("off", "first", "last")
COMBINE = ("union", "vote")
MIN_THRESHOLD = 0.01
# A character threshold by MCut is never lower, as in the author's own space.
MIN_CHARACTER_MCUT = 0.15


@dataclass(frozen=True)
class TagSettings:
    """How scores become tags.

    ``existing`` says what becomes of a caption that the record has: "replace" drops it, "append" keeps
    it and puts new tags behind, "merge" puts the tagger's tags first and then what else it had.
    ``exclude`` and ``always_first`` are lists as `tag_lists.read_tag_list` reads them. ``trigger`` may hold
    ``{class}``, the folder's words. "vote" wants a tag from more than half of the taggers that know it.
    """

    general_threshold: float = 0.35
    character_threshold: float = 0.85
    general_mcut: bool = False
    character_mcut: bool = False
    rating: str = "off"
    replace_underscore: bool = True
    character_first: bool = True
    trigger: str = ""
    existing: str = "replace"
    exclude: str = ""
    always_first: str = ""
    combine: str = "union"


@dataclass(frozen=True)
class Found:
    """What taggers say of one picture: tags in booru spelling, the surest first, and the rating."""

    characters: tuple[str, ...]
    general: tuple[str, ...]
    rating: str


def tag_dataset(
    dataset: Dataset,
    taggers: Sequence[TaggerFiles],
    settings: TagSettings,
    *,
    device: str = "auto",
    batch_size: int = 8,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Edited:
    """Caption every picture by the taggers' tags; the taggers run one after the other, each loaded once.

    ``progress`` gets (done, total) pictures, counted once per tagger. ``cache`` is a folder for scores,
    so that only new or changed pictures are computed. Raises LG-DATA-061 to -063, -066, -067 and LG-CFG-003.
    """
    _check(settings, device, batch_size)
    exclude = read_tag_list(settings.exclude, where="exclude")
    first = read_tag_list(settings.always_first, where="always_first")
    total = len(taggers) * len(dataset.records)
    scored = [
        score(
            dataset.records,
            files,
            device=device,
            batch_size=batch_size,
            cache=cache,
            progress=_part(progress, number * len(dataset.records), total),
        )
        for number, files in enumerate(taggers)
    ]
    found = [
        choose([one.scores[index] for one in scored], [one.labels for one in scored], settings)
        for index in range(len(dataset.records))
    ]
    written = [_ordered(tags, settings, first) for tags in found]
    captions = [
        _caption(record, [tag for tag in tags if not exclude.takes(tag)], settings)
        for record, tags in zip(dataset.records, written, strict=True)
    ]
    _check_filled(dataset, captions)
    records = [
        dataclasses.replace(record, caption=caption, caption_source="tagger")
        for record, caption in zip(dataset.records, captions, strict=True)
    ]
    lines = _lines(dataset, taggers, scored, found, settings)
    covered = Counter(tag for tags in written for tag in tags if exclude.takes(tag) or exclude.covers(tag))
    dropped = {tag: count for tag, count in covered.items() if exclude.takes(tag)}
    spared = {tag: count for tag, count in covered.items() if not exclude.takes(tag)}
    lines += _list_lines("Excluded", dropped)
    lines += _list_lines("Protected, only its full name excludes it", spared)
    lines += frequency_lines(count_captions(captions), len(captions))
    return Edited(dataset.replaced(records, *lines), tuple(lines))


def _part(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return the progress of one tagger as a part of all; ``before`` pictures are done by others."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def choose(scores: Sequence[Scores], labels: Sequence[Labels], settings: TagSettings) -> Found:
    """Return the tags of one picture out of the scores of each tagger."""
    general = _combined(scores, labels, GENERAL, settings)
    characters = _combined(scores, labels, CHARACTER, settings)
    ratings: dict[str, float] = {}
    for one, names in zip(scores, labels, strict=True):
        for output, value in zip(one.outputs, one.values, strict=True):
            if names.categories[output] == RATING:
                name = names.names[output]
                ratings[name] = ratings.get(name, 0.0) + float(value)
    rating = max(ratings, key=lambda name: ratings[name], default="")
    return Found(tuple(characters), tuple(general), rating)


def mcut(values: Sequence[float]) -> float:
    """Return the threshold in the middle of the largest gap between neighbouring scores (Largeron, 2012)."""
    ranked = sorted(values, reverse=True)
    if len(ranked) < 2:
        return 0.0
    gaps = [high - low for high, low in itertools.pairwise(ranked)]
    widest = gaps.index(max(gaps))
    return (ranked[widest] + ranked[widest + 1]) / 2


# ---- from scores to tags ----


def _combined(
    scores: Sequence[Scores], labels: Sequence[Labels], category: int, settings: TagSettings
) -> list[str]:
    """Return the category's tags, the surest first."""
    passed: list[dict[str, float]] = []
    for one, names in zip(scores, labels, strict=True):
        of_kind = {
            names.names[output]: float(value)
            for output, value in zip(one.outputs, one.values, strict=True)
            if names.categories[output] == category
        }
        num_all = len(names.by_category.get(category, ()))
        # As float32, so that a score of 0.35 is not above the threshold 0.35.
        threshold = float(np.float32(_threshold(category, list(of_kind.values()), num_all, settings)))
        passed.append({name: value for name, value in of_kind.items() if value > threshold})
    best: dict[str, float] = {}
    for tags in passed:
        for name, value in tags.items():
            best[name] = max(value, best.get(name, 0.0))
    if settings.combine == "vote":
        knowing = [names.by_category.get(category, frozenset()) for names in labels]
        votes = Counter(name for tags in passed for name in tags)
        best = {
            name: value
            for name, value in best.items()
            if 2 * votes[name] > sum(1 for known in knowing if name in known)
        }
    return sorted(best, key=lambda name: -best[name])  # stable: equal scores stay in the tagger's order


def _threshold(category: int, values: list[float], num_all: int, settings: TagSettings) -> float:
    # What is below the floor of scores counts as 0.
    cut = mcut(values + [0.0] * (num_all > len(values)))
    if category == CHARACTER:
        return max(MIN_CHARACTER_MCUT, cut) if settings.character_mcut else settings.character_threshold
    return cut if settings.general_mcut else settings.general_threshold


def _ordered(found: Found, settings: TagSettings, first: TagList) -> list[str]:
    groups = [found.characters, found.general]
    tags = [tag for group in (groups if settings.character_first else groups[::-1]) for tag in group]
    there = {plain(tag): tag for tag in tags}
    front = [there[name] for name in dict.fromkeys(first.names) if name in there]
    front += [tag for tag in tags if first.covers(tag) and tag not in front]
    rest = [tag for tag in tags if tag not in front]
    rating = [found.rating] if found.rating else []
    before, after = {"first": (rating, []), "last": ([], rating)}.get(settings.rating, ([], []))
    ordered = [*before, *front, *rest, *after]
    return [spaced(tag) for tag in ordered] if settings.replace_underscore else ordered


# ---- from tags to captions ----


def _caption(record: Record, tags: Sequence[str], settings: TagSettings) -> str:
    trigger = tags_of(fill_template(settings.trigger, {"class": record.concept}), ",")
    own = tags_of(record.caption, ",") if has_own_caption(record) else []
    order = {"replace": [*tags], "append": [*own, *tags], "merge": [*tags, *own]}[settings.existing]
    unique: dict[str, str] = {}
    for tag in [*trigger, *order]:
        unique.setdefault(plain(tag), tag)
    return JOINED_BY.join(unique.values())


def has_own_caption(record: Record) -> bool:
    """Say whether the caption was written for this picture, not taken from its folder's name."""
    return bool(record.caption) and record.caption_source != "folder" and record.caption != record.concept


def _check_filled(dataset: Dataset, captions: Sequence[str]) -> None:
    empty = [record.name for record, text in zip(dataset.records, captions, strict=True) if not text.strip()]
    if empty:
        raise LoraGraftError(
            "LG-DATA-067",
            f"The tagger leaves {counted(len(empty), 'image')} without a tag.",
            where=listed(shown(name) for name in empty),
            why="no tag is as sure as the threshold, or all were excluded; an empty caption teaches nothing.",
            fix="lower general_threshold, exclude less, or fill in trigger",
        )


# ---- words ----


def _lines(
    dataset: Dataset,
    taggers: Sequence[TaggerFiles],
    scored: Sequence[Scored],
    found: Sequence[Found],
    settings: TagSettings,
) -> list[str]:
    counts = [len(one.characters) + len(one.general) for one in found]
    names = " + ".join(files.name for files in taggers)
    how = f", {settings.combine} of {len(taggers)} taggers" if len(taggers) > 1 else ""
    lines = [f"Tagged {counted(len(found), 'image')} with {names}{how}."]
    lines += [line for one in scored for line in one.lines]
    if counts:
        mean = float(np.mean(counts))
        lines.append(f"Tags found per image: {mean:.1f} on average, {min(counts)} to {max(counts)}.")
    ratings = Counter(one.rating for one in found if one.rating)
    if ratings:
        lines.append(f"Ratings: {listed(f'{name} {count}' for name, count in ratings.most_common())}.")
    if settings.existing != "replace":
        without = sum(1 for record in dataset.records if not has_own_caption(record))
        lines.append(f"{counted(without, 'image')} had no caption of their own to {settings.existing}.")
    else:
        lost = sum(1 for record in dataset.records if has_own_caption(record))
        lines.append(f"{counted(lost, 'caption')} replaced.")
    number = len(tags_of(settings.trigger, ","))
    if number:
        lines.append(f"Trigger words: {counted(number, 'tag')} in front; shuffle with keep_tokens {number}.")
    return lines


def _list_lines(what: str, counts: Mapping[str, int]) -> list[str]:
    ranked = Counter(counts).most_common()
    return [f"{what}: {listed(f'{shown(tag)} ({count})' for tag, count in ranked)}."] if ranked else []


def _check(settings: TagSettings, device: str, batch_size: int) -> None:
    for name in ("general_threshold", "character_threshold"):
        value = getattr(settings, name)
        if not MIN_THRESHOLD <= value <= 1:
            raise _setting(name, value, f"{MIN_THRESHOLD} to 1")
    choices = {"rating": RATINGS, "existing": EXISTING, "combine": COMBINE}
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            raise _setting(name, getattr(settings, name), f"one of {', '.join(allowed)}")
    if device not in DEVICES:
        raise _setting("device", device, f"one of {', '.join(DEVICES)}")
    if not 1 <= batch_size <= 256:
        raise _setting("batch_size", batch_size, "1 to 256")
    check_template(settings.trigger, ["class"], where="trigger")


def _setting(name: str, value: object, expected: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-CFG-003",
        f"Setting '{name}' is {shown(repr(value), 40)}, expected {expected}.",
        where=name,
        why="the pictures would be tagged in another way than you asked for.",
        fix=f"set {name} to {expected}",
    )
