"""Which images form which batch in an epoch: a function of (train set, batch size, seed, epoch)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

from .train_set import Group, Size, TrainSet

Part = tuple[Size, tuple[int, ...]]  # a bucket, and the images of a batch


@dataclass(frozen=True)
class Batch:
    """Images of one bucket (width, height); ``indices`` point into ``TrainSet.records``, repeats included.

    Beside each index: ``flips`` says whether this use is mirrored, and ``loss_weights`` how much it
    counts in the loss (``prior_loss_weight`` for a regularisation image, else 1). ``epoch`` counts from 0.
    """

    bucket: Size
    indices: tuple[int, ...]
    flips: tuple[bool, ...] = ()
    loss_weights: tuple[float, ...] = ()
    epoch: int = 0

    def part(self, first: int, last: int) -> Batch:
        """Return the images ``first`` to ``last`` - 1 of this batch."""
        own = slice(first, last)
        return replace(
            self, indices=self.indices[own], flips=self.flips[own], loss_weights=self.loss_weights[own]
        )


def plan_epoch(train_set: TrainSet, batch_size: int, seed: int, epoch: int) -> list[Batch]:
    """Return the epoch's batches in order.

    Every record occurs ``repeats`` times, every batch holds one bucket's images of one group, and the
    last batch of a bucket may be smaller, as in kohya's trainer. ``batch_size`` serves the groups that
    have none of their own. The batches of a group that keeps pace come one by one behind the others', so that
    two micro-batches to a step are one of each (HCP-Diffusion's class images).
    """
    rng = random.Random(f"{seed}-{epoch}")
    parts: list[Part] = []
    beside: list[Part] = []
    for group in train_set.groups:
        found = _group_parts(train_set, group, group.batch_size or batch_size, rng)
        (beside if group.keeps_pace else parts).extend(found)
    rng.shuffle(parts)
    if beside:
        rng.shuffle(beside)
        parts = [part for pair in zip_longest(parts, beside) for part in pair if part is not None]
    uses: Counter[int] = Counter()
    return [_batch(train_set, bucket, part, uses, seed, epoch) for bucket, part in parts]


def is_mirrored(seed: int, epoch: int, name: str, use: int) -> bool:
    """Say whether the ``use``-th use (from 0) of a record in an epoch is mirrored: a fair coin of its own."""
    return random.Random(f"{seed}-{epoch}-{name}-{use}-flip").random() < 0.5


def _group_parts(train_set: TrainSet, group: Group, batch_size: int, rng: random.Random) -> list[Part]:
    members: dict[Size, list[int]] = {}
    for index in range(group.first, group.last):
        repeated = [index] * train_set.records[index].repeats
        members.setdefault(train_set.buckets[index], []).extend(repeated)
    parts: list[Part] = []
    for bucket in sorted(members):
        rng.shuffle(members[bucket])
        parts += [(bucket, part) for part in _parts(members[bucket], batch_size)]
    return parts


def _batch(
    train_set: TrainSet, bucket: Size, indices: tuple[int, ...], uses: Counter[int], seed: int, epoch: int
) -> Batch:
    flips, weights = [], []
    for index in indices:
        record, config = train_set.records[index], train_set.configs[index]
        flips.append(config.flip_aug and is_mirrored(seed, epoch, record.name, uses[index]))
        weights.append(config.prior_loss_weight if record.is_reg else 1.0)
        uses[index] += 1
    return Batch(bucket, indices, tuple(flips), tuple(weights), epoch)


def _parts(items: list[int], size: int) -> Iterator[tuple[int, ...]]:
    return (tuple(items[start : start + size]) for start in range(0, len(items), size))
