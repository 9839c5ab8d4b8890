"""Freeze a dataset for training: every record in its bucket, with a fingerprint and a report."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import DatasetConfig, as_dict
from ..errors import LoraGraftError, listed
from .buckets import Choice, select_bucket
from .folders import natural_key
from .images import shown
from .records import Dataset, Record
from .report import bucket_lines, caption_use_lines, counted, size_text

Size = tuple[int, int]

# Part of the fingerprint: raise it when the same records and settings would train on other pixels.
VERSION = 1


@dataclass(frozen=True)
class TrainSet:
    """Records in an order of their own (by name, whatever the scan's order) with what becomes of each.

    ``buckets`` and ``resized`` hold one (width, height) per record: resize to ``resized``, cut
    ``bucket`` from the centre. ``fingerprint`` is equal for equal content and settings, wherever
    the folder lies.
    """

    records: tuple[Record, ...]
    config: DatasetConfig
    buckets: tuple[Size, ...]
    resized: tuple[Size, ...]
    lines: tuple[str, ...]
    fingerprint: str


def build_train_set(dataset: Dataset, config: DatasetConfig) -> TrainSet:
    """Assign every record to its bucket and report what that does to the pictures.

    Raises LG-DATA-010 for images too small to fill one bucket step without being enlarged.
    """
    if not config.caption_separator and (config.shuffle_caption or config.caption_tag_dropout_rate > 0):
        raise LoraGraftError(
            "LG-CFG-003",
            "Setting 'caption_separator' is empty, expected what stands between two tags.",
            where="caption_separator",
            why="without it a caption has no tags to shuffle or leave out.",
            fix="set caption_separator to ',', or switch shuffle_caption and caption_tag_dropout_rate off",
        )
    records = tuple(sorted(dataset.records, key=lambda record: natural_key(record.name)))
    choices = [select_bucket(record.size[::-1], config) for record in records]
    _check_sizes(records, choices, config)
    return TrainSet(
        records=records,
        config=config,
        buckets=tuple(choice.bucket for choice in choices),
        resized=tuple(choice.resized for choice in choices),
        lines=(
            *dataset.lines,
            *bucket_lines(records, choices, config),
            *caption_use_lines(records, config),
        ),
        fingerprint=_fingerprint(records, choices, config),
    )


def samples_per_epoch(train_set: TrainSet) -> int:
    """Return how many images an epoch shows, repeats included."""
    return sum(record.repeats for record in train_set.records)


def batches_per_epoch(train_set: TrainSet, batch_size: int) -> int:
    """Return the number of batches in an epoch: every bucket's last one may be smaller."""
    sizes: Counter[Size] = Counter()
    for record, bucket in zip(train_set.records, train_set.buckets, strict=True):
        sizes[bucket] += record.repeats
    return sum(math.ceil(size / batch_size) for size in sizes.values())


def steps_per_epoch(train_set: TrainSet, batch_size: int, accumulation: int) -> int:
    """Return the number of optimizer steps in an epoch; the last one may accumulate fewer batches."""
    return math.ceil(batches_per_epoch(train_set, batch_size) / accumulation)


def steps_lines(
    train_set: TrainSet,
    batch_size: int,
    accumulation: int = 1,
    *,
    epochs: int | None = None,
    steps: int | None = None,
) -> tuple[str, ...]:
    """Return the arithmetic of a run in words, for ``epochs`` epochs or for ``steps`` steps."""
    samples = samples_per_epoch(train_set)
    batches = batches_per_epoch(train_set, batch_size)
    per_epoch = steps_per_epoch(train_set, batch_size, accumulation)
    if epochs is not None:
        num_epochs, steps = f"{epochs}", epochs * per_epoch
    else:
        steps = per_epoch if steps is None else steps
        num_epochs = f"{steps / per_epoch:.4g}"
    repeats = {record.repeats for record in train_set.records}
    if len(repeats) == 1:
        images = f"{counted(len(train_set.records), 'image')} x {counted(repeats.pop(), 'repeat')}"
    else:
        images = f"{counted(len(train_set.records), 'image')}, {samples} with their repeats,"
    lines = [
        f"{images} x {num_epochs} epochs / (batch {batch_size} x accumulation {accumulation}) "
        f"= {steps} steps, {per_epoch} per epoch."
    ]
    ideal = math.ceil(samples / batch_size)
    if batches != ideal:
        lines.append(
            f"An epoch has {batches} batches instead of {ideal}: a batch holds images of one bucket only, "
            f"so each of the {len(set(train_set.buckets))} buckets may end in a smaller one."
        )
    return tuple(lines)


def _fingerprint(records: Sequence[Record], choices: Sequence[Choice], config: DatasetConfig) -> str:
    content = [
        VERSION,
        as_dict(config),
        [
            [r.name, r.content_hash, r.caption, r.concept, r.repeats, c.bucket, c.resized]
            for r, c in zip(records, choices, strict=True)
        ],
    ]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_sizes(records: Sequence[Record], choices: Sequence[Choice], config: DatasetConfig) -> None:
    small = [
        f"{shown(record.name)} ({size_text(record.size[::-1])})"
        for record, choice in zip(records, choices, strict=True)
        if 0 in choice.bucket
    ]
    if small:
        raise LoraGraftError(
            "LG-DATA-010",
            f"{len(small)} of {len(records)} images are too small or too narrow for a bucket.",
            where=listed(small),
            why=f"bucket_no_upscale is on, and a bucket side is at least {config.bucket_reso_steps} px.",
            fix="remove these images, switch bucket_no_upscale off, or lower bucket_reso_steps",
        )
