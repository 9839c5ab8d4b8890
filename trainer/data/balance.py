"""How often each image counts: repeats that balance the concepts, and kohya's rule for regularisation."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from .records import Record
from .report import counted

# A concept is repeated at most this often: more would train its few images by heart.
MAX_BALANCED = 100

Key = TypeVar("Key", bound=Hashable)


def balanced_repeats(counts: Mapping[Key, int], *, cap: int = MAX_BALANCED) -> dict[Key, int]:
    """Return repeats so that images x repeats are as near to equal as whole numbers allow.

    The largest concept keeps one repeat, and the largest product is as small a multiple of the
    smallest as can be reached; of equals the fewest samples win. 76 and 16 images give 1 and 5.
    """
    largest = max(counts.values())
    # Either side of the exact factor is a candidate; the narrowest window over all products wins.
    options = {
        key: sorted({min(cap, max(1, f)) for f in (largest // count, math.ceil(largest / count))})
        for key, count in counts.items()
    }
    products = sorted((factor * counts[key], i) for i, key in enumerate(counts) for factor in options[key])
    keys = list(counts)
    inside: Counter[int] = Counter()
    best: tuple[float, int, int] | None = None
    start = 0
    for stop, (high, who) in enumerate(products):
        inside[who] += 1
        while inside[products[start][1]] > 1:
            inside[products[start][1]] -= 1
            start += 1
        if len(+inside) == len(keys):
            width = high / products[start][0]
            if best is None or width < best[0] * (1 - 1e-12):
                best = (width, start, stop)
    assert best is not None, "every concept has a candidate"
    chosen: dict[Key, int] = {}
    for product, who in products[best[1] : best[2] + 1]:
        chosen.setdefault(keys[who], product // counts[keys[who]])
    return {key: chosen[key] for key in keys}


def balance_records(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Return the records with balanced repeats, and what to say about it."""
    counts = Counter(concept_of(record) for record in records)
    if len(counts) < 2:
        return list(records), ["balance_concepts does nothing: there is only one concept."]
    repeats = balanced_repeats(counts)
    parts = [f"{label} {n} x {repeats[label]} = {n * repeats[label]}" for label, n in counts.items()]
    lines = [f"Balanced: {'; '.join(parts)}."]
    capped = [label for label, factor in repeats.items() if factor == MAX_BALANCED]
    if capped:
        lines.append(f"At most {MAX_BALANCED} repeats are given: {', '.join(capped)} stays below the others.")
    if any(record.repeats != 1 for record in records):
        lines.append("The repeats that folders or settings ask for are replaced by these.")
    made = [dataclasses.replace(r, repeats=repeats[concept_of(r)]) for r in records]
    return made, lines


def repeat_regularisation(
    records: Sequence[Record], target: int
) -> tuple[list[Record], list[Record], list[str]]:
    """Repeat regularisation images until they make ``target`` samples, as kohya's trainer does.

    Its rule: add each image with its own repeats until the target is reached, and leave the rest out;
    if all are in and more are needed, give one repeat more to each in turn. Returns the records used,
    those left out, and what to say about it.
    """
    repeats: list[int] = []
    total = 0
    for record in records:
        if total >= target:
            break
        repeats.append(record.repeats)
        total += record.repeats
    if 0 < total < target:
        rounds, rest = divmod(target - total, len(repeats))
        repeats = [r + rounds + (i < rest) for i, r in enumerate(repeats)]
        total = target
    used = [dataclasses.replace(r, repeats=n) for r, n in zip(records, repeats, strict=False)]
    left_out = list(records[len(used) :])
    line = (
        f"Regularisation: {counted(len(used), 'image')} used {total} times in all, "
        f"for {counted(target, 'training sample')}"
    )
    line += f"; {len(left_out)} more are not needed." if left_out else "."
    return used, left_out, [line]


def concept_of(record: Record) -> str:
    """Return what a record belongs to: its class words, else its folder, else the whole set."""
    return record.concept or (record.name.split("/")[0] if "/" in record.name else "(all)")
