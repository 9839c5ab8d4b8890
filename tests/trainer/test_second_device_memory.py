"""A second device's memory: what is given back and when, and how the measures that save it are found."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch

from loragraft.trainer import loop, together
from loragraft.trainer.engine import captured, planner
from loragraft.trainer.engine.planner import plan
from loragraft.trainer.engine.predictor import PREVIEW, SAMPLING
from loragraft.trainer.engine.swap import LARGEST_PIECE, pieces
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.test_captured_logic import Replayed, graphs
from loragraft_tests.trainer.test_planner import BLOCKS, GIB, START, costs

__all__ = ["graphs"]  # a fixture


@pytest.mark.parametrize("stops", [False, True])
def test_the_base_is_gone_when_a_run_has_ended(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    """A GPU's memory is wanted by what comes next, not by the next of Python's collections."""
    seen: list[Any] = []
    left: list[bool] = []
    real, opened = together._let_go, together.open_runs

    def open_runs(*args: Any) -> Any:
        found = opened(*args)
        seen.append(weakref.ref(found[0].parts.denoiser))
        return found

    def let_go(held: Any, device: Any) -> None:
        real(held, torch.device("cuda"))  # as on a GPU
        left.append(seen[0]() is not None)

    monkeypatch.setattr(together, "open_runs", open_runs)
    monkeypatch.setattr(together, "_let_go", let_go)
    gc.disable()
    try:
        if stops:
            training.stop_after(2)
        else:
            training.events(max_train_steps=2)
    finally:
        gc.enable()
    assert left == [False]


def test_no_graph_holds_memory_when_the_preview_is_drawn(
    training: runs.Training, graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[int, int]] = []
    released: list[int] = []
    real, release = loop.draw_preview, captured.Captured.release

    def draw(run: Any) -> Any:
        held.append((len(run.engine._graphs), len(run.engine._updates)))
        return real(run)

    def counted(self: Any) -> None:
        released.append(len(self._graphs))
        release(self)

    monkeypatch.setattr(loop, "draw_preview", draw)
    monkeypatch.setattr(captured.Captured, "release", counted)
    training.finish(engine="captured", max_train_steps=12)
    assert released and released[0] > 0
    assert held == [(0, 0)]


def test_graphs_are_gone_when_the_last_preview_is_drawn_but_not_between_steps() -> None:
    case = replace(START, captured=True)
    for name, pool in ((PREVIEW, 0), (SAMPLING, 4 * GIB)):
        drawing = costs(others={name: GIB})
        assert drawing.predict(case).phases[name] == GIB + pool
        assert name not in drawing.predict(replace(case, draws=False)).phases


def test_few_cases_are_predicted_to_find_the_number_of_blocks() -> None:
    rng, most = random.Random(0), 0
    for _ in range(500):
        blocks = rng.randint(2, 130)
        saved = sorted((rng.randint(90, 100) for _ in range(blocks)), reverse=True)
        floor = rng.choice((0, sum(saved) // 3))
        totals = [max(sum(saved) - done, floor) for done in (0, *accumulate(saved))]
        room = rng.randint(totals[-1], totals[0])
        asked: set[int] = set()

        def total_of(count: int, asked: set[int] = asked, totals: list[int] = totals) -> int:
            asked.add(count)
            return totals[count]

        found = planner._crossing(0, blocks, total_of, room)
        assert found == next(n for n, total in enumerate(totals) if total <= room)
        if not floor:
            most = max(most, len(asked) - 2)  # the ends are known before
    assert most <= 6


def test_what_would_leave_all_blocks_in_place_is_named() -> None:
    of_weights = costs()
    full = of_weights.predict(replace(START, checkpointed=BLOCKS)).total
    made = plan(of_weights, START, full - GIB // 4, num_swappable=BLOCKS)
    assert made.choice.swapped
    assert any("base_storage" in line and "all blocks in place" in line for line in made.lines)
    assert not any("all blocks in place" in line for line in plan(of_weights, START, 64 * GIB).lines)


FLUX = [680_000_000 // 256 * 256] * 19 + [283_000_000 // 256 * 256] * 38


@pytest.mark.parametrize("sizes", [FLUX, FLUX[30:], [100, 0, 0, 300], [0], [], [3 * LARGEST_PIECE]])
def test_pinned_pieces_are_powers_of_two_and_nearly_full(sizes: list[int]) -> None:
    found = list(pieces(sizes))
    assert [size for _, members in found for size in members] == sizes
    for piece, members in found:
        assert piece.bit_count() == 1 and sum(members) <= piece
    if sizes[:1] and sizes[0] in FLUX:
        assert sum(piece for piece, _ in found) < 1.15 * sum(sizes)
