"""The frozen train set: buckets, report, fingerprint, and the batches of an epoch."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.batches import plan_epoch
from loragraft.trainer.data.records import Dataset, Record, scan_folder
from loragraft.trainer.data.train_set import (
    TrainSet,
    batches_per_epoch,
    build_train_set,
    samples_per_epoch,
    steps_lines,
    steps_per_epoch,
)
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
