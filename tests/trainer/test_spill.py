"""The guard against silent paging: it speaks once, only when memory is full and steps stay slower."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragraft.trainer.engine.spill import FIRST, WINDOW, SpillGuard

TOTAL = 8 * 2**30
FULL, HALF = int(0.97 * TOTAL), TOTAL // 2


def feed(guard: SpillGuard, times: list[float], used: int = FULL) -> list[str]:
    return [note for seconds in times if (note := guard.feed(seconds, used, TOTAL))]


def test_a_full_gpu_and_slower_steps_are_named_once() -> None:
    guard = SpillGuard()
    assert feed(guard, [5.0, 2.0, 0.2] + [0.2] * 20) == []
    (note,) = feed(guard, [0.9] * 40)
    assert "0.90 s" in note and "4.5 times" in note and "7.8 of 8.0 GiB" in note
    assert "Sysmem Fallback Policy" in note and "gradient_checkpointing" in note
    assert feed(guard, [3.0] * 40) == []


def test_it_takes_a_few_steps_not_one() -> None:
    guard = SpillGuard()
    feed(guard, [0.2] * 20)
    assert feed(guard, [0.9] * 4) == []
    assert len(feed(guard, [0.9] * 2)) == 1


@given(st.lists(st.floats(0.001, 100), max_size=120), st.integers(0, int(0.94 * TOTAL)))
def test_never_without_memory_pressure(times: list[float], used: int) -> None:
    assert feed(SpillGuard(), times, used) == []


@given(st.lists(st.floats(0.001, 100), max_size=FIRST + WINDOW))
def test_never_in_the_first_steps(times: list[float]) -> None:
    assert feed(SpillGuard(), times) == []


@given(st.lists(st.floats(0.001, 100), max_size=200))
def test_at_most_once(times: list[float]) -> None:
    assert len(feed(SpillGuard(), times)) <= 1


@given(st.integers(0, 2**32), st.integers(3, 20), st.floats(2, 200))
def test_periodic_slow_steps_are_no_spill(seed: int, period: int, slow: float) -> None:
    rng = random.Random(seed)
    times = [rng.uniform(0.9, 1.3) * (slow if i % period == 0 else 1.0) for i in range(300)]
    assert feed(SpillGuard(), times) == []


@given(st.floats(0.01, 10), st.floats(1.0, 1.3))
def test_steps_that_stay_within_bounds_are_no_spill(first: float, growth: float) -> None:
    assert feed(SpillGuard(), [first] * 50 + [first * growth] * 50) == []


@given(st.floats(0.01, 10), st.floats(2.0, 50), st.integers(0, 2**32))
def test_a_lasting_slowdown_is_always_found(first: float, factor: float, seed: int) -> None:
    rng = random.Random(seed)
    calm = [first * rng.uniform(0.95, 1.05) for _ in range(FIRST + WINDOW)]
    assert len(feed(SpillGuard(), calm + [first * factor] * WINDOW)) == 1


def test_pressure_must_hold_while_steps_are_slow() -> None:
    guard = SpillGuard()
    feed(guard, [0.2] * 20)
    for i in range(40):  # another program's burst: slow, but memory is free in between
        assert guard.feed(0.9, HALF if i % 4 == 0 else FULL, TOTAL) is None


def test_steps_of_unequal_work_are_not_compared() -> None:
    guard = SpillGuard()
    mixed = [("small", 0.2), ("large", 0.9)]
    for i in range(200):
        kind, seconds = mixed[i // 20 % 2]
        assert guard.feed(seconds, FULL, TOTAL, kind) is None
    notes = [guard.feed(0.6, FULL, TOTAL, "small") for _ in range(20)]
    assert len([n for n in notes if n]) == 1


@pytest.mark.parametrize("used", [int(0.949 * TOTAL), int(0.95 * TOTAL) + 1, 2 * TOTAL])
def test_the_limit_is_95_percent(used: int) -> None:
    notes = feed(SpillGuard(), [0.2] * 20 + [0.9] * 20, used)
    assert len(notes) == (used > 0.95 * TOTAL)
