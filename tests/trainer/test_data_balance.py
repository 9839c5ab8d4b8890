"""Repeats that balance the concepts, and buckets after the images' own aspect ratios."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.balance import balanced_repeats
from loragraft.trainer.data.ratio_buckets import group_centres
from loragraft.trainer.data.train_set import build_train_set, samples_per_epoch
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.made_records import S, records, said

# ---- balance ----


@pytest.mark.parametrize(
    ("counts", "repeats"),
    [
        ({"nekochan": 76, "maid": 16}, {"nekochan": 1, "maid": 5}),
        ({"a": 10}, {"a": 1}),
        ({"a": 10, "b": 10}, {"a": 1, "b": 1}),
        # 100, 140, 120 differ by 1.4; 100, 70, 120 by 1.71
        ({"a": 100, "b": 70, "c": 60}, {"a": 1, "b": 2, "c": 2}),
        ({"a": 1000, "b": 1}, {"a": 1, "b": 100}),
    ],
)
def test_balanced_repeats(counts: dict[str, int], repeats: dict[str, int]) -> None:
    assert balanced_repeats(counts) == repeats


@given(counts=st.lists(st.integers(1, 120), min_size=1, max_size=4))
@settings(max_examples=cases(3000), deadline=None)
def test_no_other_choice_is_nearer_to_equal(counts: list[int]) -> None:
    names = dict(enumerate(counts))
    chosen = balanced_repeats(names)
    largest = max(counts)
    spread = _spread([n * chosen[i] for i, n in names.items()])
    options = [
        {min(100, max(1, f)) for f in (largest // n, math.ceil(largest / n), largest // n + 1)}
        for n in counts
    ]
    best = min(
        _spread([n * f for n, f in zip(counts, picked, strict=True)])
        for picked in itertools.product(*options)
    )
    assert spread <= best * (1 + 1e-9)
    assert chosen[counts.index(largest)] == 1


def _spread(products: list[int]) -> float:
    return max(products) / min(products)


def test_balance_replaces_the_repeats_and_says_so() -> None:
    dataset = records(*[S] * 92)
    made = [
        dataclasses.replace(r, concept="nekochan" if i < 76 else "maid", repeats=1 if i < 76 else 6)
        for i, r in enumerate(dataset.records)
    ]
    by_hand = build_train_set(dataset.replaced(made), DatasetConfig())
    assert samples_per_epoch(by_hand) == 172, "1 x 76 + 6 x 16"
    balanced = build_train_set(dataset.replaced(made), DatasetConfig(balance_concepts=True))
    assert samples_per_epoch(balanced) == 76 + 5 * 16
    assert said(balanced, "nekochan 76 x 1 = 76", "maid 16 x 5 = 80")
    assert said(balanced, "replaced")
    assert said(build_train_set(records(S), DatasetConfig(balance_concepts=True)), "only one concept")


# ---- buckets after the images' own aspect ratios ----


def test_ratio_buckets_group_the_aspect_ratios() -> None:
    sizes = [(512, 768), (520, 768), (768, 512), (770, 512), (1000, 1000)]
    config = DatasetConfig(num_bucket=3, bucket_reso_steps=8)
    train_set = build_train_set(records(*sizes), config)
    first, second, third, fourth, fifth = train_set.buckets
    assert first == second and third == fourth and fifth == (512, 512)
    assert first[0] < first[1] and third[0] > third[1]
    assert all(side % 8 == 0 for bucket in train_set.buckets for side in bucket)
    assert all(abs(w * h - 512 * 512) < 0.03 * 512 * 512 for w, h in train_set.buckets)
    assert said(train_set, "3 buckets of about the area of 512x512", "aspect ratios")
    with Refusal("LG-DATA-086", "num_bucket is 6", "5 images"):
        build_train_set(records(*sizes), dataclasses.replace(config, num_bucket=6))
    assert len(set(build_train_set(records(*[S] * 9), DatasetConfig(num_bucket=4)).buckets)) == 1


@given(
    values=st.lists(st.floats(-3, 3).map(lambda v: round(v, 3)), min_size=1, max_size=9),
    k=st.integers(1, 4),
)
@settings(max_examples=cases(2000), deadline=None)
def test_the_grouping_is_the_best_there_is(values: list[float], k: int) -> None:
    centres = group_centres(values, k)
    points = sorted(set(values))
    assert len(centres) == min(k, len(points)) and centres == sorted(centres)
    cost = sum(min((v - c) ** 2 for c in centres) for v in values)
    best = math.inf
    for cuts in itertools.combinations(range(1, len(points)), len(centres) - 1):
        bounds = [0, *cuts, len(points)]
        groups = [points[a:b] for a, b in itertools.pairwise(bounds)]
        total = 0.0
        for group in groups:
            inside = [v for v in values if v in group]
            mean = sum(inside) / len(inside)
            total += sum((v - mean) ** 2 for v in inside)
        best = min(best, total)
    assert cost <= best + 1e-6
