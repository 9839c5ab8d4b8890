"""What a run's figures say: the best validation, overfitting, and a loss that explodes. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

RISES = 3  # validations in a row above the one before
EXPLODES = 50.0  # times the usual loss
NOW, USUAL, LEAST = (
    5,
    100,
    20,
)  # steps: what is judged, what it is compared with, and how many of these at least


class Measure(NamedTuple):
    """One validation: its mean loss, the training loss averaged over an epoch then, whether it was saved."""

    step: int
    loss: float
    average: float
    saved: bool


def best(measures: Sequence[Measure]) -> Measure | None:
    """Return the saved step of the lowest loss, the earliest of equal ones; None where none was saved."""
    return min((m for m in measures if m.saved), key=lambda m: m.loss, default=None)


def overfits_from(measures: Sequence[Measure]) -> int | None:
    """Return the index of the first validation that shows overfitting; None where none does.

    It has risen for RISES validations in a row, and over them the training loss has fallen: the images are
    learned by heart. A validation that rises together with the training loss is something else (a learning
    rate too high), and a single rise is noise.
    """
    for last in range(RISES, len(measures)):
        series = measures[last - RISES : last + 1]
        if all(b.loss > a.loss for a, b in pairwise(series)) and series[-1].average < series[0].average:
            return last
    return None


def explodes(losses: Sequence[float]) -> bool:
    """Say whether the newest step losses lie far beyond those before.

    The median of the last NOW steps must exceed EXPLODES times the median of the up to USUAL steps before,
    of which there must be LEAST: a single step at an early timestep may well be that far from the median.
    """
    before, now = losses[-NOW - USUAL : -NOW], losses[-NOW:]
    return len(before) >= LEAST and median(now) > EXPLODES * median(before)
