"""Dataset files: what is written is read again, wherever the folder moves; anything else is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.data.records import Dataset, Record
from loragraft.trainer.data.records_file import load_dataset, save_dataset
from loragraft.trainer.data.scan import scan_folder
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, fill

S = (48, 32)
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
part = st.text("abc \u00e9\u732b.-_1", min_size=1, max_size=8).filter(lambda p: p.strip(".") != "")
name = st.lists(part, min_size=1, max_size=3).map("/".join)
small = st.integers(0, 255)
box = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(51, 99), st.integers(51, 99))
sha = st.text("0123456789abcdef", min_size=64, max_size=64) | st.just("")


@st.composite
def record(draw: st.DrawFn) -> Record:
    root = Path("/data/set")
    called = draw(name)
    path = draw(st.sampled_from([root / called, Path("/data/other") / called, Path("/elsewhere/x.png")]))
    mask = draw(st.sampled_from([None, path, Path("/data/masks") / called]))
    return Record(
        path=path,
        name=called,
        size=(draw(st.integers(1, 5000)), draw(st.integers(1, 5000))),
        caption=draw(text),
        concept=draw(text),
        repeats=draw(st.integers(1, 10_000)),
        content_hash=draw(sha),
        mask=mask,
        mask_hash=draw(sha) if mask else "",
        crop=draw(st.none() | box),
        background=draw(st.tuples(small, small, small)),
        is_reg=draw(st.booleans()),
        caption_source=draw(text),
        overrides=draw(st.sampled_from([(), (("resolution", (512, 768)), ("keep_tokens", 1))])),
    )


@given(st.lists(record(), max_size=4, unique_by=lambda r: r.name), st.lists(text, max_size=3))
@settings(max_examples=cases(500), deadline=None)
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], lines: list[str]
) -> None:
    file = tmp_path_factory.getbasetemp() / "any" / "x.json"
    dataset = Dataset(Path("/data/set"), tuple(records), tuple(lines))
    save_dataset(dataset, file)
    assert load_dataset(file) == dataset


def test_the_file_moves_with_its_pictures(tmp_path: Path) -> None:
    fill(tmp_path / "here" / "set" / "2_cat", {"a.png": S, "a.txt": "a cat"})
    dataset = scan_folder(tmp_path / "here" / "set")
    save_dataset(dataset, tmp_path / "here" / "set.json")
    assert str(tmp_path) not in (tmp_path / "here" / "set.json").read_text("utf-8")
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = load_dataset(tmp_path / "there" / "set.json")
    assert moved.root == tmp_path / "there" / "set"
    assert [r.path for r in moved.records] == [tmp_path / "there" / "set" / "2_cat" / "a.png"]
    assert moved.records[0].path.is_file()
    assert moved.lines == dataset.lines


def valid(tmp_path: Path) -> dict[str, Any]:
    fill(tmp_path / "2_cat", {"a.png": S, "b.png": S})
    save_dataset(scan_folder(tmp_path), tmp_path / "x.json")
    return dict(json.loads((tmp_path / "x.json").read_text("utf-8")))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"repeat": 3}, "records[0].repeat is unknown, did you mean repeats?"),
        ({"repeats": 0}, "records[0].repeats is 0, expected a whole number from 1"),
        ({"repeats": True}, "repeats is True"),
        ({"repeats": 2.0}, "repeats is 2.0"),
        ({"size": [32]}, "size is [32], expected [height, width]"),
        ({"name": "../a.png"}, "expected a relative path without '..'"),
        ({"name": "/a.png"}, "expected a relative path"),
        ({"name": "a//b"}, "expected a relative path"),
        ({"content_hash": "abc"}, "expected a sha256"),
        ({"crop": [10, 0, 5, 9]}, "expected [left, top, right, bottom]"),
        ({"mask": "beta"}, 'expected "alpha"'),
        ({"background": [0, 0, 300]}, "expected [red, green, blue]"),
        ({"caption": None}, "caption is None"),
        ({"is_reg": 1}, "is_reg is 1"),
        ({"name": "2_cat/b.png"}, "two records are called 2_cat/b.png"),
    ],
)
def test_wrong_records(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    content = valid(tmp_path)
    content["records"][0].update(change)
    (tmp_path / "x.json").write_text(json.dumps(content), "utf-8")
    with Refusal("LG-DATA-020", "x.json", reason):
        load_dataset(tmp_path / "x.json")


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    content = valid(tmp_path)
    del content["records"][0]["caption"]
    content["records"][1] = 3
    content["root"] = 5
    content["recrods"] = []
    (tmp_path / "x.json").write_text(json.dumps(content), "utf-8")
    with Refusal(
        "LG-DATA-020",
        "recrods is unknown, did you mean records?",
        "root is 5, expected a path",
        "records[0].caption is missing",
        "records[1] is no object",
    ):
        load_dataset(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON"),
        (b"[]", "does not say"),
        (b'{"format": "other"}', "does not say"),
        (b'{"format": "loragraft dataset", "version": 9}', "its version is 9"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON"),
    ],
)
def test_other_files(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with Refusal("LG-DATA-020", reason):
        load_dataset(tmp_path / "x.json")
    with Refusal("LG-DATA-020", "No such file"):
        load_dataset(tmp_path / "gone.json")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
KEYS = ["name", "path", "size", "caption", "repeats", "content_hash", "mask", "crop", "overrides", "new"]


@given(st.sampled_from(KEYS), values)
@settings(max_examples=cases(1000), deadline=None)
def test_any_value_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: object
) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzzed"
    if not root.exists():
        valid(root)
    content = json.loads((root / "x.json").read_text("utf-8"))
    content["records"][0][key] = value
    (root / "y.json").write_text(json.dumps(content), "utf-8")
    try:
        loaded = load_dataset(root / "y.json")
    except LoraGraftError as error:
        assert error.code == "LG-DATA-020"
        assert "records[0]" in error.where or "two records" in error.where
    else:
        save_dataset(loaded, root / "z.json")
        assert load_dataset(root / "z.json") == loaded
