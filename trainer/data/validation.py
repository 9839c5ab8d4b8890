"""Keep some images out of training, chosen by their content: the same ones wherever the folder lies."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Sequence

from ..errors import LoraGraftError, listed
from .balance import concept_of
from .records import Record
from .report import counted


def hold_out(
    records: Sequence[Record], share: float, seed: int
) -> tuple[list[Record], list[Record], list[str]]:
    """Split each concept's images into those that train and those that only measure, and say so.

    The order is a hash over (seed, content), so copies of one picture stay on one side. Held images are
    used once each. Raises LG-DATA-088 where a concept would lose all of its images.
    """
    concepts: dict[str, list[Record]] = {}
    for record in records:
        concepts.setdefault(concept_of(record), []).append(record)
    held: set[str] = set()
    too_few: list[str] = []
    for name, members in concepts.items():
        copies = Counter(_content(record) for record in members)
        wanted = math.floor(len(members) * share + 0.5)
        taken = 0
        for content in sorted(copies, key=lambda c: _order(c, seed)):
            if taken >= wanted:
                break
            held.add(content)
            taken += copies[content]
        if taken == len(members):
            too_few.append(f"{name} ({counted(len(members), 'image')})")
    if too_few:
        raise LoraGraftError(
            "LG-DATA-088",
            f"validation_split {share:g} leaves nothing to train on.",
            where=listed(too_few),
            why="every concept needs an image that is trained on.",
            fix="lower validation_split, or add images",
        )
    training = [r for r in records if _content(r) not in held]
    kept_out = [dataclasses.replace(r, repeats=1) for r in records if _content(r) in held]
    line = f"Validation: {counted(len(kept_out), 'image')} of {len(records)} kept out of training."
    if not kept_out:
        line = f"validation_split {share:g} keeps no image out: every concept has too few."
    return training, kept_out, [line]


def _content(record: Record) -> str:
    return record.content_hash or record.name  # only the header was read: its name has to do


def _order(content: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}-{content}".encode()).hexdigest()
