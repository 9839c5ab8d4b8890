"""Captions from a list, as captioning models give them, and how often tags occur."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.data import caption_lists
from loragraft.trainer.data.caption_lists import read_caption_list, set_captions
from loragraft.trainer.data.caption_templates import fill_template
from loragraft.trainer.data.tag_counts import change_lines, count_captions, count_tags, frequency_lines
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.test_data_caption_ops import dataset, texts


def test_each_image_gets_its_text_in_order() -> None:
    edited = set_captions(dataset("a", "b"), ["A cat.", "A dog,\n on a mat.\n"])
    assert texts(edited) == ["A cat.", "A dog, on a mat."]
    assert all(record.caption_source == "list" for record in edited.dataset.records)
    assert "1 caption of several lines were joined into one line." in edited.lines


def test_templates() -> None:
    data = dataset("red, hat", "tree")
    found = set_captions(
        data, ["A cat {x}.", "B"], template="{trigger}, {caption} {tags}, {class}", trigger="zz"
    )
    assert texts(found) == ["zz, A cat {x}. red, hat, ohwx girl", "zz, B tree, ohwx girl"]
    assert texts(set_captions(data, ["A", "B"], template="{trigger}")) == ["ohwx girl"] * 2


def test_a_wrong_number_of_captions_is_refused() -> None:
    for captions in ([], ["a"], ["a", "b", "c"]):
        with Refusal("LG-DATA-075", f"{len(captions)} caption", "2 images"):
            set_captions(dataset("a", "b"), captions)


def test_texts_that_are_missing_are_named_together() -> None:
    with Refusal("LG-DATA-076", "2 images", "0.png (caption)", "2.png (caption)"):
        set_captions(dataset("a", "b", "c"), ["", "x", " \n"])
    with Refusal("LG-DATA-076", "0.png (trigger)"):
        set_captions(dataset("a", concept=""), ["x"], template="{trigger}, {caption}")
    assert texts(set_captions(dataset("a"), [""], template="{tags}")) == ["a"]


def test_a_template_is_checked_before_anything_else() -> None:
    with Refusal("LG-DATA-071", "{captoin}", "{caption}"):
        set_captions(dataset("a"), [], template="{captoin}")


def test_lists_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(b"\xef\xbb\xbfa cat\r\n\nc\n")
    assert read_caption_list(file) == ["a cat", "", "c"]
    file = tmp_path / "list.json"
    file.write_text(json.dumps(["a\nb", "\u732b"]), "utf-8")
    assert read_caption_list(file) == ["a\nb", "\u732b"]
    for content in ('{"a": 1}', "[1]", "[", "[" * 100_000, '"a"'):
        file.write_text(content, "utf-8")
        with Refusal("LG-DATA-077", "list.json"):
            read_caption_list(file)
    with Refusal("LG-DATA-077"):
        read_caption_list(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with Refusal("LG-DATA-077", "latin.txt"):
        read_caption_list(tmp_path / "latin.txt")
    monkeypatch.setattr(caption_lists, "MAX_LIST_BYTES", 2)
    with Refusal("LG-DATA-077", "larger"):
        read_caption_list(tmp_path / "latin.txt")


# ---- templates ----


@settings(max_examples=cases(1000), deadline=None)
@given(st.text(max_size=40), st.text(max_size=20))
def test_escaped_text_passes_a_template_unchanged(literal: str, caption: str) -> None:
    escaped = literal.replace("{", "{{").replace("}", "}}")
    filled = fill_template(escaped + " {caption}", {"caption": caption})
    if caption.strip():
        assert filled == " ".join(f"{literal} {caption}".split())


def test_holes_close_up() -> None:
    words = {"a": "", "b": "x", "c": " "}
    assert fill_template("{a}, {b}, {c}", words) == "x"
    assert fill_template("photo of {a} {b}", words) == "photo of x"
    assert fill_template("{b},{b}", words) == "x,x"
    assert fill_template("{a}{c}", words) == ""


# ---- frequencies ----


def test_a_tag_counts_once_per_image() -> None:
    counts = count_captions(["b, a, a", "a", "c, a"])
    assert list(counts.items()) == [("a", 3), ("b", 1), ("c", 1)]
    assert count_tags(dataset("b, a, a", "a", "c, a").records) == counts


def test_the_table_of_frequencies() -> None:
    assert frequency_lines(count_captions(["b, a", "a"]), 2, top=1) == [
        "2 different tags in 2 captions.",
        "       2  a",
        "  and 1 more tags",
        "In every caption (1): a.",
        "In one caption only (1): b.",
    ]


def test_changes_are_ranked_by_size() -> None:
    before, after = count_captions(["a, b", "a", "a"]), count_captions(["b, c", "b", "a"])
    assert change_lines(before, after, top=2) == [
        "Tag frequencies, before -> after: 3 changed, 0 gone, 1 new.",
        "       3 -> 1      a",
        "       1 -> 2      b",
        "  and 1 more",
    ]
    assert change_lines(before, before) == ["Tag frequencies: nothing changed."]
