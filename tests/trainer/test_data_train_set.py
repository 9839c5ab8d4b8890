"""The frozen train set: buckets, report, refusals, images kept out of training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.batches import plan_epoch
from loragraft.trainer.data.records import Dataset
from loragraft.trainer.data.scan import scan_folder
from loragraft.trainer.data.train_set import (
    batches_per_epoch,
    build_train_set,
    samples_per_epoch,
    steps_lines,
    steps_per_epoch,
)
from loragraft_tests.trainer.data_folders import Refusal, fill, golden
from loragraft_tests.trainer.made_records import FILES, S, records, said

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


def test_bucket_limits_off_the_grid_count_as_the_reference_counts_them() -> None:
    off = DatasetConfig(min_bucket_reso=300, max_bucket_reso=1000)
    on = DatasetConfig(min_bucket_reso=256, max_bucket_reso=1024)
    dataset = records((512, 512), (300, 2000), (2000, 300))
    assert build_train_set(dataset, off).buckets == build_train_set(dataset, on).buckets
    assert said(build_train_set(dataset, off), "min_bucket_reso 300 counts as 256", "1000 counts as 1024")
    assert not said(build_train_set(dataset, on), "counts as")


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
