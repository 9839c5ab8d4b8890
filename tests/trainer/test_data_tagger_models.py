"""Where taggers are found, what their label files may hold, and the table of what may be fetched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.data import tagger_models
from loragraft.trainer.data.tagger_models import (
    KNOWN,
    choose_taggers,
    find_taggers,
    read_labels,
)
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, fill

HEADER = "tag_id,name,category,count\n"
LABELS = HEADER + "1,general,9,5\n2,1girl,0,7\n3,hatsune_miku,4,9\n"


# ---- the table ----


def test_the_table_pins_every_file() -> None:
    assert len({known.name for known in KNOWN}) == len(KNOWN)
    for known in KNOWN:
        assert known.repo == f"SmilingWolf/{known.name}"
        assert re.fullmatch(r"[0-9a-f]{40}", known.commit)
        assert [pin.file for pin in known.files] == ["model.onnx", "selected_tags.csv"]
        for pin in known.files:
            assert re.fullmatch(r"[0-9a-f]{64}", pin.sha256)
            assert pin.size is None or pin.size > 100_000
    hashes = [known.files[0].sha256 for known in KNOWN]
    assert len(set(hashes)) == len(hashes)


def test_the_taggers_of_the_guides_are_known() -> None:
    names = {known.name for known in KNOWN}
    assert {"wd-v1-4-swinv2-tagger-v2", "wd-swinv2-tagger-v3", "wd-eva02-large-tagger-v3"} <= names


# ---- finding ----


def test_all_layouts_are_found_and_the_first_folder_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    fill(
        tmp_path,
        {
            "ours/wd-a/model.onnx": "x",
            "ours/wd-a/selected_tags.csv": LABELS,
            "ours/both/model.onnx": "x",
            "ours/both/model.safetensors": "x",
            "ours/both/config.json": "{}",
            "ours/both/selected_tags.csv": LABELS,
            "ours/weights/model.safetensors": "x",
            "ours/weights/config.json": "{}",
            "ours/weights/selected_tags.csv": LABELS,
            "ours/no-labels/model.onnx": "x",
            "ours/no-config/model.safetensors": "x",
            "ours/no-config/selected_tags.csv": LABELS,
            "theirs/wd-b.onnx": "x",
            "theirs/wd-b.csv": LABELS,
            "theirs/wd-a.onnx": "x",
            "theirs/wd-a.csv": LABELS,
            "theirs/lonely.onnx": "x",
            "theirs/SmilingWolf_wd-kohya/model.onnx": "x",
            "theirs/SmilingWolf_wd-kohya/selected_tags.csv": LABELS,
            "theirs/readme.txt": "x",
            "hub/models--SmilingWolf--wd-c/snapshots/abc/model.onnx": "x",
            "hub/models--SmilingWolf--wd-c/snapshots/abc/selected_tags.csv": LABELS,
            "hub/models--other--wd-d/snapshots/abc/model.onnx": "x",
            "hub/models--other--wd-d/snapshots/abc/selected_tags.csv": LABELS,
            "hub/version.txt": "1",
        },
    )
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    found = find_taggers([tmp_path / "ours", tmp_path / "missing", tmp_path / "theirs"])
    assert set(found) == {"wd-a", "both", "weights", "wd-b", "wd-c", "wd-kohya"}
    assert found["wd-a"].graph == tmp_path / "ours/wd-a/model.onnx"
    assert found["wd-b"].labels == tmp_path / "theirs/wd-b.csv"
    assert found["both"].graph and found["both"].weights
    assert found["weights"].graph is None and found["weights"].weights
    assert "wd-c" not in find_taggers([tmp_path / "ours"], hub_cache=False)


def test_the_hub_cache_is_where_its_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    folder = tagger_models.hub_cache_folder
    assert folder() == Path("~/.cache/huggingface/hub").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert folder() == Path("/x/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/y")
    assert folder() == Path("/y/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/z")
    assert folder() == Path("/z")


def test_names_are_chosen_and_auto_takes_the_first_known_one(tmp_path: Path) -> None:
    files = {f"{name}/{file}": LABELS for name in ("my-own", "wd-vit-tagger-v3", "wd-v1-4-moat-tagger-v2")
             for file in ("model.onnx", "selected_tags.csv")}  # fmt: skip
    fill(tmp_path, files)
    found = find_taggers([tmp_path], hub_cache=False)
    assert [f.name for f in choose_taggers(["auto"], found, [])] == ["wd-vit-tagger-v3"]
    twice = ["my-own", "wd-vit-tagger-v3", "my-own"]
    assert [f.name for f in choose_taggers(twice, found, [])] == ["my-own", "wd-vit-tagger-v3"]
    only = {"my-own": found["my-own"]}
    assert [f.name for f in choose_taggers(["auto"], only, [])] == ["my-own"]


def test_what_is_missing_is_said_with_where_was_looked_and_how_to_get_it() -> None:
    with Refusal("LG-DATA-060", "wd-swin-tagger-v3", "models/taggers", "wd-swinv2-tagger-v3", "Download"):
        choose_taggers(["wd-swin-tagger-v3", "other"], {}, ["models/taggers"])
    with Refusal("LG-DATA-060", "No tagger was found"):
        choose_taggers(["auto"], {}, ["here"])
    with Refusal("LG-DATA-060"):
        choose_taggers(["../../etc/passwd", "a\nb"], {}, ["here"])


# ---- labels ----


def test_labels_of_all_three_categories(tmp_path: Path) -> None:
    file = tmp_path / "selected_tags.csv"
    file.write_bytes(b"\xef\xbb\xbf" + LABELS.replace("\n", "\r\n").encode())
    labels = read_labels(file)
    assert labels.names == ("general", "1girl", "hatsune_miku")
    assert labels.categories == (9, 0, 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "columns"),
        (b"a,b\n1,2\n", "columns"),
        (HEADER.encode(), "no tags"),
        (HEADER.encode() + b"1,\xff\xfe,0,1\n", "utf-8"),
        (HEADER.encode() + b"1,a\0b,0,1\n", "zero bytes"),
        (HEADER.encode() + b'1,"a\nb",0,1\n', "row 2"),
        (HEADER.encode() + b'1,"unclosed,0,1\n2,b,0,1\n', "unexpected end"),
        (HEADER.encode() + b"1,a,0\n2,b,zero,1\n3,,0,1\n4,ok,0,1\n", "row 3"),
        (HEADER.encode() + b"1," + b"x" * 400 + b",0,1\n", "row 2"),
        (HEADER.encode() + b'1,"a,b",0,1\n', "row 2"),
        (HEADER.encode() + "1,a\u2028b,0,1\n".encode(), "row 2"),
        (HEADER.encode() + b"1,a,-1,1\n", "row 2"),
        (HEADER.encode() + "1,a,\u0663,1\n".encode(), "row 2"),
        (HEADER.encode() + b"1," + b"x" * 200_000 + b",0,1\n", "field larger"),
    ],
)
def test_hostile_labels_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "selected_tags.csv"
    file.write_bytes(content)
    with Refusal("LG-DATA-063", "selected_tags.csv", words):
        read_labels(file)


def test_all_broken_rows_are_named_and_caps_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "selected_tags.csv"
    file.write_text(HEADER + "1,a,x,1\n2,b,0,1\n3,c,y,1\n", "utf-8")
    with Refusal("LG-DATA-063", "row 2", "row 4"):
        read_labels(file)
    monkeypatch.setattr(tagger_models, "MAX_ROWS", 2)
    file.write_text(HEADER + "1,a,0,1\n2,b,0,1\n", "utf-8")
    assert len(read_labels(file).names) == 2
    file.write_text(HEADER + "1,a,0,1\n2,b,0,1\n3,c,0,1\n", "utf-8")
    with Refusal("LG-DATA-063", "more than 2 rows"):
        read_labels(file)
    monkeypatch.setattr(tagger_models, "MAX_CSV_BYTES", 10)
    with Refusal("LG-DATA-063", "larger"):
        read_labels(file)
    with Refusal("LG-DATA-063", "No such file"):
        read_labels(tmp_path / "none.csv")


@settings(max_examples=cases(2000), deadline=None)
@given(
    st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: (HEADER + text).encode("utf-8", "ignore"))
)
def test_any_bytes_are_labels_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.csv"
    file.write_bytes(content)
    try:
        labels = read_labels(file)
    except LoraGraftError as error:
        assert error.code == "LG-DATA-063" and str(error).count("\n") == 3
    else:
        assert labels.names and len(labels.names) == len(labels.categories)
        assert all(name and name.isprintable() and "," not in name for name in labels.names)
