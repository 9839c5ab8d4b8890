"""Kohya's dataset config: the reference's own cases, its order of looking things up, and better refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.batches import plan_epoch
from loragraft.trainer.data.dataset_toml import read_dataset_config
from loragraft.trainer.data.kohya_keys import check_config
from loragraft.trainer.data.train_set import Block, TrainSet, batches_per_epoch, freeze_blocks
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, fill, golden

TOML = golden("dataset_toml")
ERRORS = {"unknown_key": "LG-DATA-080", "missing_dir": "LG-DATA-082", "wrong_type": "LG-DATA-081"}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder with the reference's images and captions."""
    root = tmp_path / "images"
    fill(root, {name: tuple(size) for name, size in TOML["images"].items()} | TOML["captions"])
    return root


def write(root: Path, text: str, name: str = "dataset.toml") -> Path:
    for placeholder, folder in TOML["placeholders"].items():
        text = text.replace(placeholder, (root / folder).as_posix())
    file = root / name
    file.write_text(text, "utf-8")
    return file


def seen(blocks: list[Block]) -> list[dict[str, Any]]:
    """Return what the reference prints of each [[datasets]] table, as we make it."""
    result = []
    for block in blocks:
        train_set = freeze_blocks([block])
        buckets: dict[str, dict[str, int]] = {}
        captions = {}
        for record, (w, h) in zip(train_set.records, train_set.buckets, strict=True):
            name = f"{record.path.parent.name}/{record.path.name}"
            buckets.setdefault(f"{w}x{h}", {})[name] = record.repeats
            captions[name] = record.caption
        result.append(
            {
                "batch_size": block.batch_size,
                "num_train_images": sum(r.repeats for r in train_set.records if not r.is_reg),
                "num_reg_images": sum(r.is_reg for r in train_set.records),
                "batches_per_epoch": batches_per_epoch(train_set, 1),
                "buckets_image_repeats": buckets,
                "captions": captions,
            }
        )
        assert len(plan_epoch(train_set, 1, 3, 0)) == batches_per_epoch(train_set, 1)
    return result


@pytest.mark.parametrize("case", TOML["cases"])
def test_the_references_cases(pictures: Path, case: str) -> None:
    entry = TOML["cases"][case]
    file = write(pictures, entry["toml"])
    if case in ERRORS:
        with Refusal(ERRORS[case], "dataset.toml"):
            read_dataset_config(file)
        return
    if case == "two_subsets":  # the reference trains two images without any words and goes on
        with Refusal("LG-DATA-006", "2 of 5", "3.png, 4.png", "class_tokens"):
            read_dataset_config(file)
    assert seen(read_dataset_config(file, missing_captions="empty")) == entry["datasets"]


def test_all_eight_cases_are_there() -> None:
    assert len(TOML["cases"]) == 8


def test_several_datasets_are_groups_with_their_own_batch_size(pictures: Path) -> None:
    blocks = read_dataset_config(write(pictures, TOML["cases"]["two_datasets"]["toml"]))
    train_set = freeze_blocks(blocks)
    assert [(g.first, g.last, g.batch_size) for g in train_set.groups] == [(0, 5, 4), (5, 10, 2)]
    assert batches_per_epoch(train_set, 1) == 5 + 4
    assert train_set.configs[0].resolution == 512 and train_set.configs[9].resolution == 768
    assert train_set.records[0].name == "1/0.png" and train_set.records[5].name == "2/0.png"
    for batch in plan_epoch(train_set, 1, 5, 0):
        assert len({index < 5 for index in batch.indices}) == 1, "a batch never mixes groups"
    assert any("Group 2: 5 images, batch size 2" in line for line in train_set.lines)


def test_the_order_of_looking_a_setting_up(pictures: Path) -> None:
    text = """
[general]
resolution = 512
keep_tokens = 1
shuffle_caption = true
caption_extension = '.txt'
[[datasets]]
keep_tokens = 2
caption_prefix = 'x'
[[datasets.subsets]]
image_dir = '%A'
class_tokens = 'x'
keep_tokens = 3
[[datasets.subsets]]
image_dir = '%B'
class_tokens = 'x'
"""
    base = {"keep_tokens": 9, "caption_suffix": "y", "max_bucket_reso": 768}
    (block,) = read_dataset_config(write(pictures, text), base=base)
    assert block.batch_size is None
    assert block.config == DatasetConfig(
        resolution=512,
        keep_tokens=2,
        shuffle_caption=True,
        caption_prefix="x",
        caption_suffix="y",
        enable_bucket=False,
        max_bucket_reso=768,
    )
    train_set = freeze_blocks([block])
    kept = {
        r.path.parent.name: c.keep_tokens for r, c in zip(train_set.records, train_set.configs, strict=True)
    }
    assert kept == {"a": 3, "b": 2}
    assert {r.overrides for r in train_set.records} == {(("keep_tokens", 3),), ()}
    assert train_set.records[0].name == "a/0.png"


def test_kohyas_default_caption_extension_is_said(pictures: Path) -> None:
    file = write(pictures, TOML["cases"]["minimal"]["toml"])
    (block,) = read_dataset_config(file)
    assert any("3 .txt files" in line and "caption_extension" in line for line in block.dataset.lines)


def test_the_folders_own_name_says_nothing(pictures: Path) -> None:
    (pictures / "b").rename(pictures / "10_cat")
    text = (
        f"[general]\nresolution = 512\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{pictures}/10_cat'\n"
    )
    with Refusal("LG-DATA-006", "4 of 4"):
        read_dataset_config(write(pictures, text))
    (block,) = read_dataset_config(write(pictures, text + "class_tokens = 'dog'\nnum_repeats = 2"))
    assert {(r.caption, r.concept, r.repeats) for r in block.dataset.records} == {("dog", "dog", 2)}


def test_wildcards_take_all_lines(pictures: Path) -> None:
    (pictures / "a" / "0.txt").write_text("one\n\ntwo, {a|b}\n", "utf-8")
    text = "[general]\nresolution=512\ncaption_extension='.txt'\nenable_wildcard=true\n[[datasets]]\n"
    text += "[[datasets.subsets]]\nimage_dir='%A'\nclass_tokens='x'\n"
    (block,) = read_dataset_config(write(pictures, text))
    assert block.dataset.records[0].caption == "one\ntwo, {a|b}"


def test_a_json_config_is_the_same(pictures: Path) -> None:
    subset = {"image_dir": str(pictures / "a"), "class_tokens": "x"}
    config = {"general": {"resolution": 512}, "datasets": [{"subsets": [subset]}]}
    file = pictures / "c.json"
    file.write_text(json.dumps(config), "utf-8")
    (block,) = read_dataset_config(file)
    assert len(block.dataset.records) == 5


def test_relative_folders(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[general]\nresolution=512\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='b'\nclass_tokens='x'\n"
    file = write(pictures, text)
    (block,) = read_dataset_config(file)
    assert block.dataset.root == (pictures / "b").resolve(), "beside the file"
    fill(pictures / "here", {"b/only.png": (64, 64)})
    monkeypatch.chdir(pictures / "here")
    (block,) = read_dataset_config(file)
    assert len(block.dataset.records) == 1, "the working folder first, as in the reference"
    asked: list[str] = []

    def gate(text: str) -> Path:
        asked.append(text)
        raise LoraGraftError("LG-PATH-002", "no", where="x", why="y", fix="z")

    with Refusal("LG-PATH-002"):
        read_dataset_config(file, resolve=gate)
    assert asked == ["b"]


HEAD = "[general]\nresolution=512\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='%A'\nclass_tokens='x'\n"


@pytest.mark.parametrize(
    ("text", "code", "mentions"),
    [
        ("resolution = 512\n" + HEAD, "LG-DATA-080", ["resolution", "[general]"]),
        (HEAD + "num_repeat = 2\nkeep_token = 1\n", "LG-DATA-080", ["num_repeats", "keep_tokens"]),
        (HEAD + "batch_size = 2\n", "LG-DATA-080", ["datasets[0].subsets[0].batch_size"]),
        (HEAD + "num_repeats = '2'\nflip_aug = 1\n", "LG-DATA-081", ["2 values", "'2'", "true or false"]),
        (HEAD + "num_repeats = 0\n", "LG-DATA-081", ["num_repeats is 0"]),
        (HEAD + "keep_tokens = -1\n", "LG-CFG-003", ["keep_tokens"]),
        (HEAD + "caption_dropout_rate = 1.5\n", "LG-CFG-003", ["caption_dropout_rate"]),
        (HEAD + "color_aug = true\nrandom_crop = true\n", "LG-DATA-083", ["2 settings", "pixels"]),
        (HEAD + "face_crop_aug_range = [1.0, 2.0]\n", "LG-DATA-083", ["face_crop_aug_range"]),
        (HEAD + "conditioning_data_dir = 'x'\n", "LG-DATA-083", ["ControlNet"]),
        (HEAD + HEAD.split("\n", 3)[3], "LG-DATA-085", ["subsets[1]"]),
        ("[general]\nresolution=512\n", "LG-DATA-081", ["[[datasets]]"]),
        ("[[datasets]]\nresolution=512\n", "LG-DATA-081", ["[[datasets.subsets]]"]),
        ("[[datasets]]\nresolution=512\n[[datasets.subsets]]\n", "LG-DATA-081", ["image_dir"]),
        (HEAD.replace("resolution=512", ""), "LG-DATA-081", ["resolution"]),
        (HEAD.replace("512", "500"), "LG-CFG-005", ["500"]),
        ("general = 3\n", "LG-DATA-081", ["general"]),
        ("[general\n", "LG-DATA-084", ["line 1"]),
        ("[general]\nx='\\\\'\nresolution = \"D:\\photos\"\n", "LG-DATA-084", ["single quotes"]),
        (HEAD + "is_reg = true\n", "LG-DATA-087", ["regularisation"]),
    ],
)
def test_refusals(pictures: Path, text: str, code: str, mentions: list[str]) -> None:
    with Refusal(code, *mentions):
        freeze_blocks(read_dataset_config(write(pictures, text)))


def test_values_that_ask_for_nothing_are_taken(pictures: Path) -> None:
    text = HEAD + "color_aug = false\nrandom_crop = false\ncache_info = true\n"
    assert read_dataset_config(write(pictures, text))


def test_every_missing_folder_is_named(pictures: Path) -> None:
    (pictures / "empty").mkdir()
    text = HEAD + "[[datasets.subsets]]\nimage_dir='%A/nope'\n[[datasets.subsets]]\nimage_dir='"
    with Refusal("LG-DATA-082", "2 of 3 folders", "subsets[1]", "subsets[2]", "no such folder"):
        read_dataset_config(write(pictures, text + f"{pictures}/empty'\n"))


def test_a_file_that_is_no_text(pictures: Path) -> None:
    file = pictures / "x.toml"
    file.write_bytes("a = 'ü'".encode("latin-1"))
    with Refusal("LG-DATA-084", "UTF-8"):
        read_dataset_config(file)
    file.write_bytes(b"#" * (2**20 + 1))
    with Refusal("LG-DATA-084", "MiB"):
        read_dataset_config(file)
    with Refusal("LG-DATA-084", "No such file"):
        read_dataset_config(pictures / "none.toml")
    (pictures / "deep.json").write_text("[" * 100_000, "utf-8")
    with Refusal("LG-DATA-084"):
        read_dataset_config(pictures / "deep.json")


# ---- regularisation, as the reference counts ----


def reference_repeats(own: list[int], target: int) -> list[int]:
    """Return the reference's loop, step by step."""
    result: list[int] = []
    n, first = 0, True
    while n < target:
        for i, repeats in enumerate(own):
            if first:
                result.append(repeats)
                n += repeats
            else:
                result[i] += 1
                n += 1
            if n >= target:
                break
        first = False
    return result


@pytest.mark.parametrize("seed", range(20))
def test_regularisation_is_repeated_or_cut_as_in_the_reference(seed: int) -> None:
    import random

    from loragraft.trainer.data.balance import repeat_regularisation
    from loragraft_tests.trainer.made_records import records

    rng = random.Random(seed)
    own = [rng.randint(1, 4) for _ in range(rng.randint(1, 9))]
    target = rng.randint(1, 40)
    dataset = records(*[(64, 64)] * len(own))
    import dataclasses

    regs = [dataclasses.replace(r, repeats=n, is_reg=True) for r, n in zip(dataset.records, own, strict=True)]
    used, left_out, _ = repeat_regularisation(regs, target)
    assert [r.repeats for r in used] == reference_repeats(own, target)
    assert len(used) + len(left_out) == len(own)


def test_prior_loss_weight(pictures: Path) -> None:
    text = TOML["cases"]["with_reg"]["toml"].replace(
        "[[datasets]]", "[[datasets]]\nprior_loss_weight = 0.3", 1
    )
    train_set: TrainSet = freeze_blocks(read_dataset_config(write(pictures, text)))
    weights = {
        (train_set.records[i].is_reg, w)
        for batch in plan_epoch(train_set, 1, 0, 0)
        for i, w in zip(batch.indices, batch.loss_weights, strict=True)
    }
    assert weights == {(False, 1.0), (True, 0.3)}


# ---- any content ----

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["resolution", "batch_size", "num_repeats", "keep_tokens", "flip_aug", "image_dir", "x"]
)
TABLE = st.dictionaries(KEYS, PLAIN, max_size=3)


@given(
    config=st.fixed_dictionaries(
        {},
        optional={
            "general": TABLE | PLAIN,
            "datasets": st.lists(TABLE | PLAIN, max_size=2) | PLAIN,
            "other": PLAIN,
        },
    )
)
@settings(max_examples=cases(3000), deadline=None)
def test_any_content_is_taken_or_refused_in_full(config: Any) -> None:
    try:
        check_config(config, "x.toml")
    except LoraGraftError as error:
        assert error.code in ("LG-DATA-080", "LG-DATA-081", "LG-DATA-083")
        assert all([error.where, error.why, error.fix])


@given(data=st.binary(max_size=120), suffix=st.sampled_from([".toml", ".json"]))
@settings(max_examples=cases(2000), deadline=None)
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    file = tmp_path_factory.getbasetemp() / f"any{suffix}"
    file.write_bytes(data)
    with pytest.raises(LoraGraftError) as refused:
        read_dataset_config(file)
    assert refused.value.code.startswith("LG-")


def test_pictures_of_the_config_are_never_opened_for_writing(pictures: Path) -> None:
    before = {p: p.read_bytes() for p in pictures.rglob("*") if p.is_file()}
    read_dataset_config(write(pictures, HEAD, "other.toml"))
    after = {p: p.read_bytes() for p in pictures.rglob("*") if p.is_file() and p.name != "other.toml"}
    assert after == before
    assert Image.open(pictures / "a" / "0.png").size == (512, 512)


def test_a_metadata_file_instead_of_caption_files(pictures: Path) -> None:
    entries = {"0.png": {"caption": "words", "tags": "a, b"}, "1": {"tags": "c"}}
    (pictures / "meta.json").write_text(json.dumps(entries), "utf-8")
    (block,) = read_dataset_config(write(pictures, HEAD + "metadata_file = 'meta.json'\n"))
    captions = {r.path.name: r.caption for r in block.dataset.records}
    assert captions["0.png"].startswith("words") and "b" in captions["0.png"]
    assert captions["1.png"] == "c" and captions["2.png"] == "x"


def test_alpha_masks(pictures: Path) -> None:
    Image.new("RGBA", (512, 512), (9, 9, 9, 40)).save(pictures / "a" / "0.png")
    (block,) = read_dataset_config(write(pictures, HEAD + "alpha_mask = true\n"))
    masked = [r for r in block.dataset.records if r.mask is not None]
    assert [r.path.name for r in masked] == ["0.png"] and masked[0].mask == masked[0].path
