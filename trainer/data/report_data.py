"""All that is known of a train set before training, as one plain structure.

The lines of text, the JSON, the HTML file and the pictures are made from what this returns, so that
they cannot contradict each other. Every value is a str, int, float, bool, None, list or dict.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import resolution_wh
from .advice import Advice, advise
from .balance import concept_of
from .captions import tags_of
from .records import Record
from .tag_counts import count_tags
from .train_set import TrainSet, batches_per_epoch, samples_per_epoch, steps_per_epoch

FORMAT, VERSION = "loragraft dataset report", 1
TOP_TAGS = 50
NUM_EXAMPLES = 3
MAX_NAMES = 200
TOKEN_LIMITS = (75, 150, 225)
BATCH_SIZES = (1, 2, 4, 8)
WORD = re.compile(r"\w+|[^\w\s]")
LEFT_OUT = ("Skipped", "Left out")


@dataclass(frozen=True)
class Viewpoint:
    """What a report may know beside the train set; nothing of it changes what is trained.

    ``kind`` is what the LoRA is to learn (one of KINDS). ``num_tokens`` counts a caption's tokens as the
    base's tokenizer does, without its start and end marks. ``known_word`` says why a trigger word is one
    that the base model may know already, or None. ``near`` holds groups of names of similar pictures.
    """

    kind: str = ""
    batch_size: int = 1
    accumulation: int = 1
    epochs: int = 1
    num_tokens: Callable[[str], int] | None = None
    known_word: Callable[[str], str | None] | None = None
    near: Sequence[Sequence[str]] = field(default=())


def report_data(train_set: TrainSet, view: Viewpoint | None = None) -> dict[str, Any]:
    """Return the report of a train set as plain data, ready for JSON."""
    view = view or Viewpoint()
    records = train_set.records
    report: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": train_set.fingerprint,
        "kind": view.kind,
        "images": _images(train_set),
        "left_out": [line for line in train_set.lines if line.startswith(LEFT_OUT)],
        "concepts": _concepts(records),
        "groups": [_group(train_set, number, view) for number in range(len(train_set.groups))],
        "resolutions": _resolutions(records),
        "tags": _tags(train_set),
        "captions": _captions(train_set, view),
        "steps": _steps(train_set, view),
        "lines": list(train_set.lines),
    }
    report["warnings"] = [
        _warning(advice) for advice in advise(train_set, report, view.known_word, view.near)
    ]
    return report


def _images(train_set: TrainSet) -> dict[str, int]:
    held = len(train_set.validation.records) if train_set.validation else 0
    reg = [r for r in train_set.records if r.is_reg]
    return {
        "used": len(train_set.records),
        "training": len(train_set.records) - len(reg),
        "regularisation": len(reg),
        "validation": held,
        "masked": sum(r.mask is not None for r in train_set.records),
        "samples": samples_per_epoch(train_set),
        "regularisation_samples": sum(r.repeats for r in reg),
    }


def _concepts(records: Sequence[Record]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, bool], list[Record]] = {}
    for record in records:
        groups.setdefault((concept_of(record), record.is_reg), []).append(record)
    total = sum(r.repeats for r in records if not r.is_reg) or 1
    rows = []
    for (name, is_reg), members in groups.items():
        samples = sum(r.repeats for r in members)
        rows.append(
            {
                "name": name,
                "regularisation": is_reg,
                "images": len(members),
                "repeats": sorted({r.repeats for r in members}),
                "samples": samples,
                "share": None if is_reg else round(samples / total, 4),
            }
        )
    return rows


def _group(train_set: TrainSet, number: int, view: Viewpoint) -> dict[str, Any]:
    group = train_set.groups[number]
    batch_size = group.batch_size or view.batch_size
    members: dict[tuple[int, int], list[int]] = {}
    for index in range(group.first, group.last):
        members.setdefault(train_set.buckets[index], []).append(index)
    rows = []
    for (width, height), inside in sorted(members.items()):
        samples = sum(train_set.records[i].repeats for i in inside)
        rows.append(
            {
                "size": [width, height],
                "images": len(inside),
                "samples": samples,
                "lost": round(sum(_lost(train_set, i) for i in inside) / len(inside), 4),
                "enlarged": sum(_enlargement(train_set, i) > 1 for i in inside),
                "batches": math.ceil(samples / batch_size),
                "leftover": samples % batch_size,
            }
        )
    return {
        "number": number + 1,
        "images": group.last - group.first,
        "batch_size": batch_size,
        "resolution": list(resolution_wh(group.config)),
        "enable_bucket": group.config.enable_bucket,
        "buckets": rows,
    }


def _lost(train_set: TrainSet, index: int) -> float:
    (w, h), (wide, high) = train_set.buckets[index], train_set.resized[index]
    return 1 - w * h / max(1, wide * high)


def _enlargement(train_set: TrainSet, index: int) -> float:
    height, width = train_set.records[index].size
    wide, high = train_set.resized[index]
    return max(wide / width, high / height)


def _resolutions(records: Sequence[Record]) -> dict[str, Any]:
    sizes = Counter(record.size[::-1] for record in records)
    sides = sorted(min(record.size) for record in records)
    return {
        "different": len(sizes),
        "sizes": [[w, h, count] for (w, h), count in sizes.most_common(MAX_NAMES)],
        "short_side": {"smallest": sides[0], "median": sides[len(sides) // 2], "largest": sides[-1]},
        "megapixels": [round(r.size[0] * r.size[1] / 1e6, 3) for r in records],
    }


def _tags(train_set: TrainSet) -> dict[str, Any]:
    separator = train_set.config.caption_separator
    own = [record for record in train_set.records if not record.is_reg]
    counts = count_tags(own, separator)
    everywhere = [tag for tag, n in counts.items() if n == len(own)]
    once = [tag for tag, n in counts.items() if n == 1]
    return {
        "captions": len(own),
        "different": len(counts),
        "top": [[tag, n] for tag, n in counts.most_common(TOP_TAGS)],
        "in_all": everywhere[:MAX_NAMES],
        "in_one": once[:MAX_NAMES],
        "num_in_one": len(once),
    }


def _captions(train_set: TrainSet, view: Viewpoint) -> dict[str, Any]:
    own = [r for r in train_set.records if not r.is_reg]
    count = view.num_tokens or (lambda text: len(WORD.findall(text)))
    lengths = {caption: count(caption) for caption in {r.caption for r in own}}
    within = {str(limit): sum(lengths[r.caption] <= limit for r in own) for limit in TOKEN_LIMITS}
    longest = max(own, key=lambda r: lengths[r.caption], default=None)
    last = len(own) - 1
    spread = sorted({round(i * last / (NUM_EXAMPLES - 1)) for i in range(NUM_EXAMPLES)}) if own else []
    return {
        "counted_by": "the tokenizer" if view.num_tokens else "words and marks, an estimate",
        "within": within,
        "over": [r.name for r in own if lengths[r.caption] > TOKEN_LIMITS[0]][:MAX_NAMES],
        "longest": [longest.name, lengths[longest.caption]] if longest else None,
        "empty": sum(not r.caption for r in own),
        "styles": dict(Counter(caption_style(r.caption, train_set.config.caption_separator) for r in own)),
        "sources": dict(Counter(r.caption_source or "unknown" for r in own)),
        "examples": [[own[i].name, own[i].caption] for i in spread],
    }


def caption_style(caption: str, separator: str) -> str:
    """Return "tags", "sentence", "words" (a few, of no evident kind) or "none"."""
    tags = tags_of(caption, separator)
    if not tags:
        return "none"
    words = [len(tag.split()) for tag in tags]
    if len(tags) >= 3 and sum(words) / len(words) <= 3:
        return "tags"
    if max(words) >= 7 or (caption.rstrip().endswith(".") and sum(words) >= 5):
        return "sentence"
    return "words"


def _steps(train_set: TrainSet, view: Viewpoint) -> dict[str, Any]:
    samples = samples_per_epoch(train_set)
    per_epoch = steps_per_epoch(train_set, view.batch_size, view.accumulation)
    return {
        "samples": samples,
        "epochs": view.epochs,
        "batch_size": view.batch_size,
        "accumulation": view.accumulation,
        "formula": round(samples * view.epochs / (view.batch_size * view.accumulation), 2),
        "steps_per_epoch": per_epoch,
        "steps": per_epoch * view.epochs,
        "batches_by_size": [
            [size, batches_per_epoch(train_set, size), math.ceil(samples / size)] for size in BATCH_SIZES
        ],
    }


def _warning(advice: Advice) -> dict[str, Any]:
    return {
        "id": advice.id,
        "text": advice.text,
        "fix": advice.fix,
        "source": advice.source,
        "names": list(advice.names[:MAX_NAMES]),
        "num_names": len(advice.names),
    }


def enlargements(train_set: TrainSet) -> Mapping[str, float]:
    """Return the images that are enlarged, with the factor."""
    found = {r.name: _enlargement(train_set, i) for i, r in enumerate(train_set.records)}
    return {name: factor for name, factor in found.items() if factor > 1}
