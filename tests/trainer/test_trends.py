"""What figures say, on given sequences."""

from __future__ import annotations

import random

import pytest

from loragraft.trainer.trends import Measure, best, explodes, overfits_from


def measures(losses: list[float], averages: list[float] | None = None, saved: str = "") -> list[Measure]:
    falling = [1.0 - 0.01 * i for i in range(len(losses))]
    flags = saved or "y" * len(losses)
    return [
        Measure(10 * (i + 1), loss, average, flag == "y")
        for i, (loss, average, flag) in enumerate(zip(losses, averages or falling, flags, strict=True))
    ]


@pytest.mark.parametrize(
    ("losses", "saved", "expected"),
    [
        ([], "", None),
        ([3.0], "y", 10),
        ([3.0, 1.0, 2.0], "yyy", 20),
        ([3.0, 1.0, 2.0], "yny", 30),
        ([2.0, 1.0, 1.0], "yyy", 20),
        ([2.0, 1.0], "nn", None),
    ],
)
def test_the_best_is_the_lowest_that_was_saved(losses: list[float], saved: str, expected: int | None) -> None:
    found = best(measures(losses, saved=saved))
    assert (found.step if found else None) == expected


@pytest.mark.parametrize(
    ("losses", "averages", "expected"),
    [
        ([5, 4, 3, 2], None, None),
        ([2, 3, 4, 5], None, 3),
        ([5, 2, 3, 4, 5], None, 4),
        ([2, 3, 4, 3.9, 5, 6], None, None),  # two rises, a fall, two rises
        ([2, 3, 3, 4, 5], None, None),  # an equal value is no rise
        ([2, 3, 4, 5], [1.0, 1.1, 1.2, 1.3], None),  # the training loss rises too: it diverges
        ([2, 3, 4, 5], [1.0, 1.2, 1.1, 0.9], 3),  # what counts are the two ends
        ([2, 3, 4, 5, 6, 7], None, 3),  # the first time
        ([1, 2, 3], None, None),
    ],
)
def test_overfitting(losses: list[float], averages: list[float] | None, expected: int | None) -> None:
    assert overfits_from(measures(list(map(float, losses)), averages)) == expected


def test_overfitting_once_named_stays_named_at_the_same_place() -> None:
    rng = random.Random(3)
    for _ in range(200):
        series = measures([rng.random() for _ in range(20)], [rng.random() for _ in range(20)])
        found = [overfits_from(series[:n]) for n in range(21)]
        first = next((x for x in found if x is not None), None)
        assert all(x in (None, first) for x in found)
        assert first is None or found.index(first) == first + 1


NOISY = [0.02, 0.3, 0.05, 0.9, 0.1, 0.01, 0.2, 0.04] * 20  # batches of one image: a loss of each timestep


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], False),
        ([1e9] * 100, False),
        (NOISY, False),
        ([*NOISY, 40.0, 50.0], False),  # two far ones
        ([*NOISY, 40.0, 0.1, 50.0, 0.1, 60.0], True),
        ([*NOISY, 40.0, 40.0, 40.0, 40.0, 40.0], True),
        ([*NOISY, 3.0, 3.0, 3.0, 3.0, 3.0], False),  # worse, but not beyond
        ([0.1] * 19 + [1e3] * 5, False),  # too few before
        ([0.1] * 20 + [1e3] * 5, True),
        ([1e3] * 100 + [0.1] * 100 + [6.0] * 5, True),  # what lies long before does not count
        ([0.1] * 100 + [4.9] * 5, False),
    ],
)
def test_explosions(losses: list[float], expected: bool) -> None:
    assert explodes(losses) is expected


def test_ordinary_losses_never_explode() -> None:
    """A million draws as wide as a model that knows its images has them at random timesteps."""
    rng = random.Random(0)
    losses = [10 ** rng.uniform(-3, 0) for _ in range(30_000)]
    assert not any(explodes(losses[max(0, n - 105) : n]) for n in range(25, len(losses), 3))
