"""The fingerprint of a train set: content and settings change it, places do not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.scan import scan_folder
from loragraft.trainer.data.train_set import build_train_set
from loragraft_tests.trainer.data_folders import fill
from loragraft_tests.trainer.made_records import FILES, S, edited, records


def scanned(root: Path, **values: Any) -> str:
    return build_train_set(scan_folder(root), DatasetConfig(**values)).fingerprint


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
