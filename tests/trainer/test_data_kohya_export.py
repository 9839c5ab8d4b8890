"""Export for kohya's trainer: what is written reads back as the very same training."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.config_files import read_blocks
from loragraft.trainer.data.kohya_export import FILE_NAME, export_kohya
from loragraft.trainer.data.scan import scan_folder
from loragraft.trainer.data.toml_text import save_settings, toml_lines
from loragraft.trainer.data.train_set import (
    Block,
    TrainSet,
    add_regularisation,
    batches_per_epoch,
    build_train_set,
    freeze_blocks,
)
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, fill

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SMALL = DatasetConfig(resolution=64, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=32)


def folder(root: Path) -> Path:
    files: dict[str, Any] = {f"3_my cat/{i}.png": (64 + 32 * i, 64) for i in range(3)}
    files |= {
        "3_my cat/0.txt": 'a "quoted" \\ caption, \u732b',
        "1_dog/a.jpg": (96, 96),
        "1_dog/b.webp": (60, 90),
    }
    return fill(root, files)


def trained(train_set: TrainSet) -> list[tuple[Any, ...]]:
    """Return what each record is trained as, whatever it is called."""
    rows = zip(train_set.records, train_set.buckets, train_set.resized, train_set.configs, strict=True)
    return sorted(
        (r.caption, r.repeats, r.is_reg, r.concept, bucket, resized, repr(config))
        for r, bucket, resized, config in rows
    )


def test_a_train_set_reads_back_as_itself(tmp_path: Path) -> None:
    config = dataclasses.replace(
        SMALL, shuffle_caption=True, keep_tokens=2, flip_aug=True, caption_prefix="x,"
    )
    train_set = build_train_set(scan_folder(folder(tmp_path / "set")), config)
    done = export_kohya(train_set, tmp_path / "out")
    assert (done.copy.made, done.copy.kept) == (5, 0)
    assert sorted(p.name for p in (tmp_path / "out" / "images").iterdir() if p.is_dir()) == [
        "1_dog",
        "3_my cat",
    ]
    again = freeze_blocks(read_blocks(done.file))
    assert trained(again) == trained(train_set)
    assert batches_per_epoch(again, 2) == batches_per_epoch(train_set, 2)
    assert any("--train_batch_size" in line for line in done.lines)
    assert build_train_set(scan_folder(tmp_path / "out" / "images"), config).records, "as train_data_dir too"
    first = (tmp_path / "out" / "images" / "3_my cat" / "00001.txt").read_text("utf-8")
    assert first == 'a "quoted" \\ caption, \u732b'
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "images").rglob("*.png")}
    second = export_kohya(train_set, tmp_path / "out")
    assert (second.copy.made, second.copy.kept) == (0, 5)
    assert {p: p.stat().st_mtime_ns for p in before} == before, "nothing is touched"


def test_groups_subsets_and_regularisation(tmp_path: Path) -> None:
    dataset = scan_folder(folder(tmp_path / "set"))
    made = list(dataset.records)
    made[0] = dataclasses.replace(made[0], overrides=(("flip_aug", True), ("keep_tokens", 2)))
    fill(tmp_path / "reg", {f"1_animal/{i}.png": (70, 70) for i in range(2)})
    first = add_regularisation(dataset.replaced(made), scan_folder(tmp_path / "reg"))
    blocks = [
        Block(first, dataclasses.replace(SMALL, prior_loss_weight=0.3), 2),
        Block(dataset, dataclasses.replace(SMALL, resolution=96), 3),
    ]
    train_set = freeze_blocks(blocks)
    done = export_kohya(train_set, tmp_path / "out", relative=True)
    assert any("--prior_loss_weight 0.3" in line for line in done.lines)
    moved = tmp_path / "elsewhere"
    (tmp_path / "out").rename(moved)
    text = (moved / FILE_NAME).read_text("utf-8")
    assert str(tmp_path) not in text and "is_reg = true" in text
    again = freeze_blocks(read_blocks(moved / FILE_NAME, base={"prior_loss_weight": 0.3}))
    rows = [row[:-1] for row in trained(train_set)]
    assert [row[:-1] for row in trained(again)] == rows
    assert [g.batch_size for g in again.groups] == [2, 3]
    flips = {c.flip_aug for c in again.configs}
    assert flips == {True, False}


def test_masks_become_alpha_channels(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    fill(root, {"masks/3_my cat/0.png": (64, 64)})
    dataset = scan_folder(root, masks="folder")
    train_set = build_train_set(dataset, SMALL)
    done = export_kohya(train_set, tmp_path / "out")
    assert any("--masked_loss" in line for line in done.lines)
    (masked,) = [r for r in freeze_blocks(read_blocks(done.file)).records if r.mask is not None]
    assert masked.mask == masked.path
    with Image.open(masked.path) as image:
        assert image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255)


def test_what_kohya_has_no_words_for(tmp_path: Path) -> None:
    dataset = scan_folder(folder(tmp_path / "set"))
    with Refusal("LG-DATA-090", "num_bucket = 2"):
        export_kohya(build_train_set(dataset, dataclasses.replace(SMALL, num_bucket=2)), tmp_path / "out")
    template = dataclasses.replace(SMALL, caption_template="art of {caption}", shuffle_caption=True)
    with Refusal("LG-DATA-090", "caption_template"):
        export_kohya(build_train_set(dataset, template), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    plain = dataclasses.replace(SMALL, caption_template="art of {caption}")
    done = export_kohya(build_train_set(dataset, plain), tmp_path / "out")
    assert {r.caption for r in freeze_blocks(read_blocks(done.file)).records} >= {"art of dog"}


def test_a_file_of_yours_is_not_replaced(tmp_path: Path) -> None:
    train_set = build_train_set(scan_folder(folder(tmp_path / "set")), SMALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE_NAME).write_text("[general]\n", "utf-8")
    with Refusal("LG-DATA-090", "dataset.toml"):
        export_kohya(train_set, tmp_path / "out")
    assert (tmp_path / "out" / FILE_NAME).read_text("utf-8") == "[general]\n"


def test_validation_images_stay_at_home(tmp_path: Path) -> None:
    dataset = scan_folder(fill(tmp_path / "set", {f"1_x/{i}.png": (64, 64) for i in range(4)}))
    train_set = build_train_set(dataset, dataclasses.replace(SMALL, validation_split=0.25))
    done = export_kohya(train_set, tmp_path / "out")
    assert any("1 images kept for validation" in line for line in done.lines)
    assert len(freeze_blocks(read_blocks(done.file)).records) == 3


@given(value=st.text(st.characters(blacklist_categories=("Cs",)), max_size=40))
@settings(max_examples=cases(2000), deadline=None)
def test_any_text_survives_toml(value: str) -> None:
    assert tomllib.loads("\n".join(toml_lines({"a": value, "b": [1, 2.5, True]}))) == {
        "a": value,
        "b": [1, 2.5, True],
    }


def test_settings_read_back(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, caption_template="a\n{caption}", token_warmup_step=0.5, flip_aug=True)
    save_settings(config, 7, tmp_path / "s.toml")
    values = tomllib.loads((tmp_path / "s.toml").read_text("utf-8"))
    assert values.pop("train_batch_size") == 7
    assert DatasetConfig(**values) == config
