"""Captured steps without a GPU: a graph that replays by calling its work again, everything else as it is.

This shows the bookkeeping (keys, buffers, updates, fallbacks), not that CUDA can capture the work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer import opened as opened_module
from loragraft.trainer.engine import captured, steps
from loragraft.trainer.engine.captured import Captured
from loragraft_tests.trainer import runs


class Replayed:
    """Stands for a CUDA graph: the work runs again and writes over its first result."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self.work, self.result, self.times = work, work(), 0

    def replay(self) -> None:
        self.times += 1
        self.result.copy_(self.work())


class FakeStream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Replayed]]:
    """Let the CPU pass for a device with CUDA graphs; returns every graph that is made."""
    made: list[Replayed] = []

    def record(self: Captured, work: Callable[[], torch.Tensor]) -> Any:
        if self._failed is not None:
            raise AssertionError("captured after a failure")
        # What a capture records is not executed: gradients and values stay as they are.
        flat = self.fused.flat
        values, grads = flat.values.clone(), flat.grads.clone()
        states = {
            id(p): {k: v.clone() for k, v in state.items()}
            for o in self.fused.optimizers
            if o._inner is not None
            for p, state in o._inner.state.items()
        }
        made.append(Replayed(work))
        flat.values.copy_(values)
        flat.grads.copy_(grads)
        for o in self.fused.optimizers:
            if o._inner is not None:
                for p, state in o._inner.state.items():
                    for key, value in state.items():
                        value.copy_(states[id(p)][key])
        return made[-1], made[-1].result

    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(Captured, "_record", record)
    monkeypatch.setattr(captured, "_capture_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    always = (lambda precision, optimizer: True, "")
    monkeypatch.setattr(steps, "NEEDS", {**steps.NEEDS, "captured": (always,)})
    yield made


def compare(training: runs.Training, **common: Any) -> tuple[api.Finished, api.Finished]:
    fused = training.elsewhere("fused").finish(engine="fused", **common)
    return fused, training.elsewhere("captured").finish(engine="captured", **common)


def assert_same(ours: api.Finished, theirs: api.Finished) -> None:
    """A captured rate is a float32 tensor, so the last bits may differ."""
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    a, b = (
        torch.cat([t.float().flatten() for t in api.lora_tensors(f.lora_file).values()])
        for f in (ours, theirs)
    )
    assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler": "cosine", "lr_warmup_steps": 3},
        {"gradient_accumulation_steps": 3, "min_snr_gamma": 5.0},
        {"clip_skip": 2, "network_train_unet_only": False, "conv_dim": 2},
    ],
    ids=["schedule", "accumulation", "clip skip"],
)
def test_replayed_steps_are_uncaptured_ones(
    training: runs.Training, graphs: list[Replayed], settings: dict[str, Any]
) -> None:
    fused, replayed = compare(training, max_train_steps=10, **settings)
    assert_same(replayed, fused)
    assert sum(g.times for g in graphs) >= 10


def test_a_graph_serves_each_set_of_shapes_once(training: runs.Training, graphs: list[Replayed]) -> None:
    training.finish(engine="captured", max_train_steps=12)
    batches = [b for epoch in range(3) for b in runs.epoch_parts(training.train_set, epoch, 1)]
    shapes = {(b[0].bucket, len(b[0].indices)) for b in batches}
    assert len(graphs) == len(shapes) + 1  # and one for the update


def test_there_are_no_more_graphs_than_allowed(
    training: runs.Training, graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "MAX_GRAPHS", 1)
    fused, replayed = compare(training, max_train_steps=12)
    assert_same(replayed, fused)
    assert len(graphs) == 2  # and the update's


def test_a_shape_that_comes_once_gets_no_graph(training: runs.Training, graphs: list[Replayed]) -> None:
    training.finish(engine="captured", max_train_steps=4)  # an epoch, with each shape once
    assert [g.result.ndim for g in graphs] == [0]


def test_a_capture_that_computes_something_else_is_not_used(
    training: runs.Training, graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Replayed.replay

    def wrong(self: Replayed) -> None:
        real(self)
        if self.result.ndim:  # losses, so a micro-batch
            self.result += 1.0
            flats[0].grads += 1.0

    flats: list[Any] = []
    opened = opened_module.Fused.__init__

    def init(self: Any, losses_of: Any, optimizers: Any, flat: Any, *others: Any) -> None:
        flats[:] = [flat]
        opened(self, losses_of, optimizers, flat, *others)

    monkeypatch.setattr(opened_module.Fused, "__init__", init)
    monkeypatch.setattr(Replayed, "replay", wrong)
    fused = training.elsewhere("fused").finish(engine="fused", max_train_steps=5)
    events = training.elsewhere("captured").events(engine="captured", max_train_steps=5)
    (note,) = [e.text for e in runs.of(events, api.Note)]
    assert "not captured" in note and "differ" in note
    assert len([g for g in graphs if g.result.ndim]) == 1
    assert_same(runs.only(events, api.Finished), fused)


def test_runs_side_by_side_share_a_graph(training: runs.Training, graphs: list[Replayed]) -> None:
    def train(name: str, engine: str) -> dict[int, api.Finished]:
        place = training.elsewhere(name)
        pairs = [
            (
                training.train_set,
                runs.settings(output_name=f"r{n}", engine=engine, learning_rate=rate, max_train_steps=6),
            )
            for n, rate in enumerate((1e-3, 1e-2))
        ]
        events = api.train_together(training.base, pairs, places=place.places, device="cpu")
        return {n: e for n, e in events if isinstance(e, api.Finished)}

    fused, replayed = train("fused", "fused"), train("captured", "captured")
    for number in (0, 1):
        assert_same(replayed[number], fused[number])
    assert len([g for g in graphs if g.result.ndim == 0]) == 2  # an update each
    assert all(g.result.shape == (2,) for g in graphs if g.result.ndim)


def test_a_stopped_captured_run_continues_bit_by_bit(training: runs.Training, graphs: list[Replayed]) -> None:
    straight = training.elsewhere("straight").finish(engine="captured", max_train_steps=8)
    training.stop_after(5, engine="captured", max_train_steps=8)
    continued = training.finish(engine="captured", max_train_steps=8)
    assert continued.lora_file.read_bytes() == straight.lora_file.read_bytes()
