"""The batches of an epoch: every image as often as it repeats, and some of its uses mirrored."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.batches import plan_epoch
from loragraft.trainer.data.train_set import batches_per_epoch, build_train_set
from loragraft_tests.trainer.made_records import S, edited, records

# ---- batches ----

SHAPES = st.sampled_from([(512, 512), (512, 768), (768, 512), (640, 480), (1200, 300), (300, 300)])


@given(
    shapes=st.lists(st.tuples(SHAPES, st.integers(1, 7)), min_size=1, max_size=30),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
)
def any_epoch(shapes: list[tuple[tuple[int, int], int]], batch_size: int, seed: int, epoch: int) -> None:
    dataset = records(*[size for size, _ in shapes])
    made = tuple(
        dataclasses.replace(r, repeats=repeats)
        for r, (_, repeats) in zip(dataset.records, shapes, strict=True)
    )
    train_set = build_train_set(dataclasses.replace(dataset, records=made), DatasetConfig())
    batches = plan_epoch(train_set, batch_size, seed, epoch)
    assert batches == plan_epoch(train_set, batch_size, seed, epoch)
    assert len(batches) == batches_per_epoch(train_set, batch_size)
    shown = Counter(index for batch in batches for index in batch.indices)
    assert shown == {i: record.repeats for i, record in enumerate(train_set.records)}
    partial = Counter(batch.bucket for batch in batches if len(batch.indices) < batch_size)
    assert all(count == 1 for count in partial.values()), "one smaller batch per bucket at most"
    for batch in batches:
        assert 1 <= len(batch.indices) <= batch_size
        assert {train_set.buckets[i] for i in batch.indices} == {batch.bucket}


@pytest.mark.parametrize("num_examples", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_an_epoch_shows_every_image_as_often_as_it_repeats(num_examples: int) -> None:
    settings(max_examples=num_examples, deadline=None, derandomize=num_examples < 1000)(any_epoch)()


def test_epochs_and_seeds_differ_and_stay() -> None:
    train_set = build_train_set(records(*[(512, 512)] * 20, *[(512, 768)] * 20), DatasetConfig())
    plans = {(seed, epoch): plan_epoch(train_set, 4, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len({tuple(plan) for plan in plans.values()}) == 9
    small = build_train_set(records(*[(768, 512)] * 3, *[(512, 768)] * 3), DatasetConfig())
    # Written down: a resumed run must find the plan that it was interrupted in, in any version.
    assert [batch.indices for batch in plan_epoch(small, 2, 42, 1)] == [(4, 3), (2, 0), (1,), (5,)]


# ---- mirrored uses ----


def test_a_coin_for_each_use_mirrors_it() -> None:
    dataset = edited(records(S, S, repeats=200), 1, overrides=(("flip_aug", True),))
    train_set = build_train_set(dataset, DatasetConfig())
    plans = [plan_epoch(train_set, 4, 7, epoch) for epoch in (0, 1)]
    assert plans[0] == plan_epoch(train_set, 4, 7, 0)
    coins = [[f for b in plan for i, f in zip(b.indices, b.flips, strict=True) if i == 1] for plan in plans]
    assert not any(f for b in plans[0] for i, f in zip(b.indices, b.flips, strict=True) if i == 0)
    assert all(70 <= sum(row) <= 130 for row in coins), "about half"
    assert coins[0] != coins[1]
    assert [b.epoch for b in plans[1]] == [1] * len(plans[1])
    assert {w for b in plans[0] for w in b.loss_weights} == {1.0}


def test_the_coin_does_not_depend_on_the_batch_size() -> None:
    train_set = build_train_set(records(*[S] * 6, repeats=3), DatasetConfig(flip_aug=True))

    def per_record(batch_size: int) -> Counter[tuple[int, bool]]:
        plan = plan_epoch(train_set, batch_size, 1, 2)
        return Counter(pair for b in plan for pair in zip(b.indices, b.flips, strict=True))

    assert per_record(1) == per_record(5)
