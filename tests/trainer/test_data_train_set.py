"""The frozen train set: buckets, report, fingerprint, and the batches of an epoch."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.balance import balanced_repeats
from loragraft.trainer.data.batches import plan_epoch
from loragraft.trainer.data.ratio_buckets import group_centres
from loragraft.trainer.data.records import Dataset, Record
from loragraft.trainer.data.scan import scan_folder
from loragraft.trainer.data.train_set import (
    TrainSet,
    batches_per_epoch,
    build_train_set,
    samples_per_epoch,
    steps_lines,
    steps_per_epoch,
)
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, fill, golden

S = (48, 32)


def records(*sizes: tuple[int, int], repeats: int = 1, caption: str = "a, b") -> Dataset:
    """Return a dataset of images (width, height) that exist on no disk."""
    made = tuple(
        Record(Path(f"/set/{i}.png"), f"{i}.png", (h, w), caption, "thing", repeats, f"{i:064x}")
        for i, (w, h) in enumerate(sizes)
    )
    return Dataset(Path("/set"), made, ())


def said(train_set: TrainSet, *texts: str) -> bool:
    return any(all(text in line for text in texts) for line in train_set.lines)


# ---- the reference's own dataset ----

TOML = golden("dataset_toml")
# case -> folders with repeats, and per dataset its batch size and settings
REFERENCE = {
    "minimal": ({"a": 1}, [(2, {})]),
    "two_subsets": ({"a": 5, "b": 3}, [(4, {"resolution": (512, 768)})]),
    "two_datasets": ({"a": 1}, [(4, {}), (2, {"resolution": 768})]),
    "no_bucket_bad_size": ({"a": 1}, [(2, {"enable_bucket": False})]),
}


@pytest.mark.parametrize("case", REFERENCE)
def test_buckets_and_batches_equal_the_reference(tmp_path: Path, case: str) -> None:
    folders, datasets = REFERENCE[case]
    names = {name: f"{repeats}_{name}" for name, repeats in folders.items()}
    images = {name: tuple(size) for name, size in TOML["images"].items() if name.split("/")[0] in folders}
    fill(tmp_path, {f"{names[n.split('/')[0]]}/{n.split('/')[1]}": size for n, size in images.items()})
    dataset = scan_folder(tmp_path)
    expected = TOML["cases"][case]["datasets"]
    assert len(expected) == len(datasets)
    for (batch_size, values), wanted in zip(datasets, expected, strict=True):
        train_set = build_train_set(dataset, DatasetConfig(**values))
        found: dict[str, dict[str, int]] = {}
        for record, bucket in zip(train_set.records, train_set.buckets, strict=True):
            name = record.name.split("_", 1)[1]
            found.setdefault(f"{bucket[0]}x{bucket[1]}", {})[name] = record.repeats
        assert found == wanted["buckets_image_repeats"]
        assert samples_per_epoch(train_set) == wanted["num_train_images"]
        assert batches_per_epoch(train_set, batch_size) == wanted["batches_per_epoch"]
        assert len(plan_epoch(train_set, batch_size, 0, 0)) == wanted["batches_per_epoch"]


def test_199_images_in_batches_of_8() -> None:
    train_set = build_train_set(records(*[(512, 512)] * 199), DatasetConfig())
    assert batches_per_epoch(train_set, 8) == len(plan_epoch(train_set, 8, 42, 1)) == 25


# ---- the fingerprint ----


def scanned(root: Path, **values: Any) -> str:
    return build_train_set(scan_folder(root), DatasetConfig(**values)).fingerprint


FILES: dict[str, Any] = {
    "3_x/a.png": S,
    "3_x/a.txt": "one, two",
    "3_x/b.png": S,
    "c.png": S,
    "c.txt": "three",
}


def test_the_fingerprint_tells_content_from_place(tmp_path: Path) -> None:
    root = fill(tmp_path / "here", FILES)
    same = scanned(root)
    assert scanned(fill(tmp_path / "there" / "deeper", FILES)) == same
    assert scanned(root) == same
    dataset = scan_folder(root)
    turned = dataclasses.replace(dataset, records=dataset.records[::-1], lines=("other",))
    assert build_train_set(turned, DatasetConfig()).fingerprint == same
    assert (
        build_train_set(turned, DatasetConfig()).records == build_train_set(dataset, DatasetConfig()).records
    )


def test_the_fingerprint_sees_every_change(tmp_path: Path) -> None:
    root = fill(tmp_path / "set", FILES)
    seen = {scanned(root)}

    def is_new() -> bool:
        before = len(seen)
        seen.add(scanned(root))
        return len(seen) == before + 1

    image = root / "3_x" / "a.png"
    stat, data = image.stat(), bytearray(image.read_bytes())
    other = (root / "3_x" / "b.png").read_bytes()
    image.write_bytes(other + b"\0" * (len(data) - len(other)) if len(other) <= len(data) else other)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert is_new(), "pixels"
    (root / "3_x" / "a.txt").write_text("one, two!")
    assert is_new(), "caption"
    (root / "3_x").rename(root / "4_x")
    assert is_new(), "repeats"
    (root / "4_x").rename(root / "4_y")
    assert is_new(), "class words"
    (root / "4_y" / "b.png").rename(root / "4_y" / "b2.png")
    assert is_new(), "name"
    (root / "c.png").unlink()
    (root / "c.txt").unlink()
    assert is_new(), "one image less"


CHANGES: list[dict[str, Any]] = [
    {},
    {"resolution": 448},
    {"resolution": (512, 448)},
    {"enable_bucket": False},
    {"min_bucket_reso": 320},
    {"max_bucket_reso": 960},
    {"bucket_reso_steps": 32},
    {"bucket_reso_steps": 8, "bucket_no_upscale": True},
    {"shuffle_caption": True},
    {"keep_tokens": 1},
    {"caption_separator": ";"},
    {"caption_dropout_rate": 0.1},
    {"caption_tag_dropout_rate": 0.1},
    {"flip_aug": True},
    {"balance_concepts": True},
    {"validation_split": 0.1},
    {"validation_seed": 1},
    {"prior_loss_weight": 0.5},
    {"caption_dropout_every_n_epochs": 2},
    {"caption_prefix": "x"},
    {"caption_suffix": "x"},
    {"keep_tokens_separator": "|||"},
    {"secondary_separator": ";;;"},
    {"enable_wildcard": True},
    {"token_warmup_min": 2},
    {"token_warmup_step": 5},
    {"caption_template": "a {caption}"},
    {"num_bucket": 1},
]


def test_the_fingerprint_sees_every_setting() -> None:
    dataset = records((512, 512), (300, 400))
    prints = [build_train_set(dataset, DatasetConfig(**change)).fingerprint for change in CHANGES]
    assert len(set(prints)) == len(CHANGES)
    assert {name for change in CHANGES for name in change} == {
        f.name for f in dataclasses.fields(DatasetConfig)
    }


# ---- the report ----


def test_the_table_of_buckets() -> None:
    dataset = records((512, 512), (600, 600), (512, 768), (1200, 300), (3000, 300), repeats=2)
    train_set = build_train_set(dataset, DatasetConfig())
    table = [line.split() for line in train_set.lines if line.startswith("  ")]
    assert table == [
        ["size", "images", "with", "repeats", "mean", "crop"],
        ["384x640", "1", "2", "10.1%"],
        ["512x512", "2", "4", "0.0%"],
        ["1024x256", "2", "4", "30.0%"],
    ]
    assert said(train_set, "3 buckets", "512x512")
    assert said(train_set, "Much is cut off (1)", "4.png 60%")
    assert not said(train_set, "enlarged")
    small = build_train_set(records((256, 256), (512, 512)), DatasetConfig())
    assert said(small, "enlarged up to 2 times (1)", "0.png 256x256")


def test_switches_are_said() -> None:
    dataset = records((600, 512))
    assert said(
        build_train_set(dataset, DatasetConfig(enable_bucket=False)), "No buckets", "512x512", "centre"
    )
    no_upscale = DatasetConfig(bucket_no_upscale=True)
    assert said(build_train_set(dataset, no_upscale), "min_bucket_reso and max_bucket_reso do nothing")
    assert said(build_train_set(dataset, DatasetConfig(keep_tokens=1)), "keep_tokens does nothing")
    assert said(build_train_set(dataset, DatasetConfig(shuffle_caption=True)), "moves every tag")
    kept = DatasetConfig(shuffle_caption=True, keep_tokens=2)
    assert said(build_train_set(dataset, kept), "No caption has more than 2 tags")
    assert said(build_train_set(dataset, DatasetConfig()), "Example: 0.png: 'a, b'")


def test_the_scans_lines_come_first(tmp_path: Path) -> None:
    dataset = scan_folder(fill(tmp_path, FILES))
    lines = build_train_set(dataset, DatasetConfig()).lines
    assert lines[: len(dataset.lines)] == dataset.lines
    assert len([line for line in lines if line.startswith("Example")]) == 3


def test_the_arithmetic() -> None:
    one = build_train_set(records(*[(512, 512)] * 10, repeats=4), DatasetConfig())
    assert steps_lines(one, 2, 5, epochs=3) == (
        "10 images x 4 repeats x 3 epochs / (batch 2 x accumulation 5) = 12 steps, 4 per epoch.",
    )
    assert steps_lines(one, 2, 5, steps=10)[0].startswith("10 images x 4 repeats x 2.5 epochs")
    mixed = build_train_set(records((512, 512), (512, 768), (768, 512)), DatasetConfig())
    assert (batches_per_epoch(mixed, 3), steps_per_epoch(mixed, 3, 2)) == (3, 2)
    first, second = steps_lines(mixed, 3, epochs=1)
    assert "3 images x 1 repeat x 1 epochs" in first and "= 3 steps" in first
    assert "3 batches instead of 1" in second and "3 buckets" in second
    uneven = dataclasses.replace(
        mixed, records=(*mixed.records[:2], dataclasses.replace(mixed.records[2], repeats=5))
    )
    assert steps_lines(uneven, 1, epochs=2) == (
        "3 images, 7 with their repeats, x 2 epochs / (batch 1 x accumulation 1) = 14 steps, 7 per epoch.",
    )


# ---- refusals ----


def test_images_below_one_bucket_step() -> None:
    dataset = records((512, 512), (60, 500), (20000, 30))
    with Refusal("LG-DATA-010", "2 of 3 images", "1.png (60x500), 2.png (20000x30)", "64 px"):
        build_train_set(dataset, DatasetConfig(bucket_no_upscale=True))
    assert build_train_set(dataset, DatasetConfig()).records


def test_an_empty_separator() -> None:
    with Refusal("LG-CFG-003", "caption_separator"):
        build_train_set(records(S), DatasetConfig(caption_separator="", shuffle_caption=True))
    assert build_train_set(records(S), DatasetConfig(caption_separator=""))


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


# ---- what was before stays what it was ----


def test_settings_at_their_defaults_leave_the_fingerprint_of_the_first_version() -> None:
    train_set = build_train_set(records((512, 512), (600, 300), repeats=2), DatasetConfig(keep_tokens=1))
    first = {
        "resolution": 512,
        "enable_bucket": True,
        "min_bucket_reso": 256,
        "max_bucket_reso": 1024,
        "bucket_reso_steps": 64,
        "bucket_no_upscale": False,
        "shuffle_caption": False,
        "keep_tokens": 1,
        "caption_separator": ",",
        "caption_dropout_rate": 0.0,
        "caption_tag_dropout_rate": 0.0,
    }
    rows = [
        ["0.png", f"{0:064x}", "a, b", "thing", 2, [512, 512], [512, 512]],
        ["1.png", f"{1:064x}", "a, b", "thing", 2, [704, 320], [704, 352]],
    ]
    text = json.dumps([1, first, rows], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert train_set.fingerprint == hashlib.sha256(text.encode()).hexdigest()


# ---- edits on records, and settings of subsets ----


def edited(dataset: Dataset, number: int, **changes: Any) -> Dataset:
    made = list(dataset.records)
    made[number] = dataclasses.replace(made[number], **changes)
    return dataset.replaced(made)


@pytest.mark.parametrize(
    "change",
    [
        {"mask": Path("/m.png"), "mask_hash": "abc"},
        {"crop": (0, 0, 10, 10)},
        {"background": (0, 0, 0)},
        {"is_reg": True},
        {"overrides": (("keep_tokens", 3),)},
    ],
)
def test_the_fingerprint_sees_every_edit(change: dict[str, Any]) -> None:
    dataset = records((512, 512), (512, 512))
    plain = build_train_set(dataset, DatasetConfig())
    assert build_train_set(edited(dataset, 1, **change), DatasetConfig()).fingerprint != plain.fingerprint
    assert build_train_set(edited(dataset, 1, caption_source="x"), DatasetConfig()) != plain
    same = build_train_set(edited(dataset, 1, caption_source="x"), DatasetConfig())
    assert same.fingerprint == plain.fingerprint, "where a caption came from changes nothing"


def test_a_subsets_settings_hold_for_its_records_only() -> None:
    dataset = edited(records(S, S), 1, overrides=(("flip_aug", True), ("keep_tokens", 2)))
    train_set = build_train_set(dataset, DatasetConfig(keep_tokens=1))
    assert [(c.keep_tokens, c.flip_aug) for c in train_set.configs] == [(1, False), (2, True)]


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


# ---- validation ----


def test_validation_images_are_chosen_by_content() -> None:
    dataset = records(*[S] * 20, repeats=3)
    own = (("caption_dropout_rate", 1.0),)
    dataset = dataset.replaced(dataclasses.replace(r, overrides=own) for r in dataset.records)
    config = DatasetConfig(validation_split=0.25, shuffle_caption=True, flip_aug=True)
    train_set = build_train_set(dataset, config)
    held = train_set.validation
    assert held is not None
    assert len(held.records) == 5 and len(train_set.records) == 15
    assert {r.repeats for r in held.records} == {1}
    assert not any(c.shuffle_caption or c.flip_aug or c.caption_dropout_rate for c in held.configs)
    assert not {r.name for r in held.records} & {r.name for r in train_set.records}
    assert said(train_set, "5 images of 20 kept out")
    renamed = dataset.replaced(
        dataclasses.replace(r, name=f"x/{99 - i}.png") for i, r in enumerate(dataset.records)
    )
    again = build_train_set(renamed, config).validation
    assert again is not None
    assert {r.content_hash for r in again.records} == {r.content_hash for r in held.records}
    other = build_train_set(dataset, dataclasses.replace(config, validation_seed=1)).validation
    assert other is not None
    assert {r.content_hash for r in other.records} != {r.content_hash for r in held.records}
    assert build_train_set(dataset, DatasetConfig()).validation is None


def test_copies_stay_on_one_side() -> None:
    dataset = records(*[S] * 10)
    twins = dataset.replaced(
        dataclasses.replace(r, content_hash=f"{i // 5:064x}") for i, r in enumerate(dataset.records)
    )
    held = build_train_set(twins, DatasetConfig(validation_split=0.1)).validation
    assert held is not None and len(held.records) == 5
    with Refusal("LG-DATA-088", "thing (10 images)"):
        build_train_set(twins, DatasetConfig(validation_split=0.9))
    few = build_train_set(records(S, S), DatasetConfig(validation_split=0.1))
    assert few.validation is None and said(few, "keeps no image out")


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


def test_bucket_limits_off_the_grid_count_as_the_reference_counts_them() -> None:
    off = DatasetConfig(min_bucket_reso=300, max_bucket_reso=1000)
    on = DatasetConfig(min_bucket_reso=256, max_bucket_reso=1024)
    dataset = records((512, 512), (300, 2000), (2000, 300))
    assert build_train_set(dataset, off).buckets == build_train_set(dataset, on).buckets
    assert said(build_train_set(dataset, off), "min_bucket_reso 300 counts as 256", "1000 counts as 1024")
    assert not said(build_train_set(dataset, on), "counts as")


# ---- images without words ----


def test_images_without_words_are_refused_all_at_once() -> None:
    found = records(S, S, S, caption=" ")
    with Refusal("LG-DATA-006", "3 images", "0.png, 1.png, 2.png", "WD14 Tag"):
        build_train_set(found, DatasetConfig())


@pytest.mark.parametrize("words", [{"caption_prefix": "a photo"}, {"caption_template": "a photo"}])
def test_words_around_the_caption_are_words(words: dict[str, str]) -> None:
    build_train_set(records(S, caption=""), DatasetConfig(**words))  # type: ignore[arg-type]


def test_an_image_without_words_is_trained_where_somebody_asked_for_it() -> None:
    (record,) = records(S, caption="").records
    asked = dataclasses.replace(record, caption_source="none")
    assert build_train_set(Dataset(Path("/set"), (asked,), ()), DatasetConfig()).records == (asked,)
