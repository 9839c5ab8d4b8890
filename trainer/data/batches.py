"""Which images form which batch in an epoch: a function of (train set, batch size, seed, epoch)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from .train_set import Size, TrainSet


@dataclass(frozen=True)
class Batch:
    """Images of one bucket (width, height); ``indices`` point into ``TrainSet.records``, repeats included."""

    bucket: Size
    indices: tuple[int, ...]


def plan_epoch(train_set: TrainSet, batch_size: int, seed: int, epoch: int) -> list[Batch]:
    """Return the epoch's batches in order.

    Every record occurs ``repeats`` times, every batch holds one bucket's images, and the last batch
    of a bucket may be smaller, as in kohya's trainer.
    """
    rng = random.Random(f"{seed}-{epoch}")
    members: dict[Size, list[int]] = {}
    for index, (record, bucket) in enumerate(zip(train_set.records, train_set.buckets, strict=True)):
        members.setdefault(bucket, []).extend([index] * record.repeats)
    batches: list[Batch] = []
    for bucket in sorted(members):
        rng.shuffle(members[bucket])
        batches += [Batch(bucket, part) for part in _parts(members[bucket], batch_size)]
    rng.shuffle(batches)
    return batches


def _parts(items: list[int], size: int) -> Iterator[tuple[int, ...]]:
    return (tuple(items[start : start + size]) for start in range(0, len(items), size))
