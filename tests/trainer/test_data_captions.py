"""Captions: what training makes of them, which file belongs to which image, and in which encoding."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.caption_files import (
    MAX_CAPTION_BYTES,
    CaptionFileError,
    likely_encoding,
    pair_captions,
    read_caption,
)
from loragraft.trainer.data.captions import is_varied, vary_caption
from loragraft_tests.trainer.data_folders import golden, picture

OURS = {f.name for f in dataclasses.fields(DatasetConfig)}
CASES = [case for case in golden("captions") if set(case["options"]) <= OURS]
EXTENSIONS = (".txt", ".caption")


# ---- what training makes of a caption ----


@pytest.mark.parametrize("case", CASES, ids=[str(case["options"]) for case in CASES])
def test_outcomes_equal_the_reference(case: dict[str, Any]) -> None:
    config = DatasetConfig(**case["options"])
    seen = {vary_caption(case["caption"], config, random.Random(f"draw {i}")) for i in range(400)}
    assert seen == set(case["outcomes"])
    assert len(seen) == case["num_outcomes"]


def test_the_golden_file_has_cases_for_us() -> None:
    assert len(CASES) == 4


def test_plain_captions_stay_as_they_are_and_draw_nothing() -> None:
    rng = random.Random(1)
    before = rng.getstate()
    config = DatasetConfig(keep_tokens=1)
    assert vary_caption("a,b ,  c,,", config, rng) == "a,b ,  c,,"
    assert rng.getstate() == before
    assert not is_varied(config)


@pytest.mark.parametrize(
    "change", [{"shuffle_caption": True}, {"caption_dropout_rate": 0.1}, {"caption_tag_dropout_rate": 0.1}]
)
def test_settings_that_vary_a_caption_are_told(change: dict[str, Any]) -> None:
    config = DatasetConfig(**change)
    assert is_varied(config)
    assert len({vary_caption("a, b, c, d", config, random.Random(i)) for i in range(200)}) > 1


def test_dropout_rates_are_met() -> None:
    rng = random.Random("rates")
    config = DatasetConfig(caption_dropout_rate=0.1, caption_tag_dropout_rate=0.3, keep_tokens=1)
    drawn = [vary_caption("a, b, c", config, rng) for _ in range(4000)]
    assert drawn.count("") / 4000 == pytest.approx(0.1, abs=0.02)
    kept = [caption for caption in drawn if caption]
    assert all(caption.startswith("a") for caption in kept)
    assert sum("b" in caption for caption in kept) / len(kept) == pytest.approx(0.7, abs=0.03)


def test_another_separator() -> None:
    config = DatasetConfig(shuffle_caption=True, caption_separator=";", keep_tokens=1)
    seen = {vary_caption("x y; a, b; c", config, random.Random(i)) for i in range(50)}
    assert seen == {"x y, a, b, c", "x y, c, a, b"}


TAGS = st.lists(
    st.text(st.characters(blacklist_characters=",\n\r", blacklist_categories=("Cs",))), max_size=8
)


@given(tags=TAGS, keep=st.integers(0, 4), seed=st.integers(0, 99), drop=st.sampled_from([0.0, 0.5, 1.0]))
def any_caption(tags: list[str], keep: int, seed: int, drop: float) -> None:
    config = DatasetConfig(shuffle_caption=True, keep_tokens=keep, caption_tag_dropout_rate=drop)
    caption = ",".join(tags)
    result = vary_caption(caption, config, random.Random(f"{seed}"))
    assert result == vary_caption(caption, config, random.Random(f"{seed}")), "a function of its seed"
    whole = [tag.strip() for tag in tags if tag.strip()]
    left = result.split(", ") if result else []
    assert left[:keep] == whole[:keep]
    assert not (set(left) - set(whole))
    if drop == 0:
        assert sorted(left) == sorted(whole)
    if drop == 1:
        assert left == whole[:keep]


@pytest.mark.parametrize("num_examples", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_shuffling_keeps_the_tags(num_examples: int) -> None:
    settings(max_examples=num_examples, deadline=None, derandomize=num_examples < 1000)(any_caption)()


# ---- which file belongs to which image ----


def test_a_caption_belongs_to_the_image_of_its_name_in_its_folder() -> None:
    pairs, orphans = pair_captions(
        ["a/x.png", "b/x.png", "b/y.tar.png", "b/z"],
        ["a/x.txt", "b/x.caption", "b/y.tar.txt", "b/y.txt", "b/z.txt", "x.txt"],
        EXTENSIONS,
    )
    assert pairs == {
        "a/x.png": ["a/x.txt"],
        "b/x.png": ["b/x.caption"],
        "b/y.tar.png": ["b/y.tar.txt"],
        "b/z": ["b/z.txt"],
    }
    assert orphans == ["b/y.txt", "x.txt"]


def test_the_full_name_goes_before_the_stem_and_txt_before_caption() -> None:
    pairs, orphans = pair_captions(
        ["x.png", "x.jpg"], ["x.txt", "x.caption", "x.jpg.txt", "x.jpg.caption"], EXTENSIONS
    )
    assert pairs["x.png"] == ["x.txt", "x.caption"]
    assert pairs["x.jpg"] == ["x.jpg.txt", "x.jpg.caption", "x.txt", "x.caption"]
    assert orphans == []


def test_capitals_and_unicode_composition_do_not_matter_unless_both_exist() -> None:
    pairs, orphans = pair_captions(
        ["IMG_1.PNG", "caf\u00e9.png"], ["img_1.TXT", "cafe\u0301.txt"], EXTENSIONS
    )
    assert pairs == {"IMG_1.PNG": ["img_1.TXT"], "caf\u00e9.png": ["cafe\u0301.txt"]}
    pairs, orphans = pair_captions(["A.png", "a.png"], ["A.txt", "a.txt"], EXTENSIONS)
    assert pairs == {"A.png": ["A.txt"], "a.png": ["a.txt"]}
    assert orphans == []


# ---- reading a caption file ----


@pytest.mark.parametrize(
    ("data", "text", "num_lines"),
    [
        (b"a, b", "a, b", 1),
        (b"\xef\xbb\xbf  a, b \r\n", "a, b", 1),
        (b"one\r\ntwo\r\n\r\n", "one", 2),
        (b"one\rtwo", "one", 2),
        (b"\n\n one", "one", 1),
        (b"", "", 0),
        (b" \r\n\t\n", "", 0),
        (b"\xef\xbb\xbf", "", 0),
        ("\u9ed2\u732b, \U0001f408, \u05d0\u05d1".encode(), "\u9ed2\u732b, \U0001f408, \u05d0\u05d1", 1),
        (b"<script>alert(1)</script>", "<script>alert(1)</script>", 1),
        ("a\u2028b".encode(), "a\u2028b", 1),
    ],
)
def test_the_first_line_that_says_something_counts(
    tmp_path: Path, data: bytes, text: str, num_lines: int
) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    caption = read_caption(path)
    assert (caption.text, caption.num_lines) == (text, num_lines)


ENCODED = [
    ("a cat, caf\u00e9", "utf-16", "UTF-16"),
    ("a cat, caf\u00e9", "utf-16-le", "UTF-16"),
    ("a cat, caf\u00e9", "utf-16-be", "UTF-16"),
    ("a cat", "utf-16-le", "UTF-16"),
    ("a cat", "utf-32", "UTF-32"),
    ("\u4e00\u53ea\u9ed1\u8272\u7684\u732b\uff0c\u5750\u5728\u7a97\u53f0\u4e0a", "gbk", "GBK"),
    ("1girl, \u9ed1\u53d1, \u5fae\u7b11", "gbk", "GBK"),
    ("\u9ed2\u3044\u732b\u304c\u5ea7\u3063\u3066\u3044\u308b", "shift_jis", "Shift_JIS"),
    ("\uac80\uc740 \uace0\uc591\uc774\uac00 \uc549\uc544 \uc788\ub2e4", "euc_kr", "EUC-KR"),
    ("\u0447\u0435\u0440\u043d\u0430\u044f \u043a\u043e\u0448\u043a\u0430", "cp1251", "Windows-1251"),
    ("a caf\u00e9 in M\u00fcnchen, na\u00efve, fa\u00e7ade", "cp1252", "Windows-1252"),
    ("it\u2019s a cat", "cp1252", "Windows-1252"),
]


@pytest.mark.parametrize(("text", "encoding", "name"), ENCODED)
def test_another_encoding_is_refused_by_its_likely_name(
    tmp_path: Path, text: str, encoding: str, name: str
) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode(encoding))
    assert likely_encoding(text.encode(encoding)) == name
    with pytest.raises(CaptionFileError, match=f"^looks like {name}$"):
        read_caption(path)


def test_what_is_no_caption_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"x" * (MAX_CAPTION_BYTES + 1))
    with pytest.raises(CaptionFileError, match=r"1\.0 MiB"):
        read_caption(path)
    picture().save(path, format="PNG")
    with pytest.raises(CaptionFileError, match="is an image"):
        read_caption(path)
    path.write_bytes(b"ok\x00\x00\x00ok\x01")
    with pytest.raises(CaptionFileError, match="looks like"):
        read_caption(path)
    path.unlink()
    with pytest.raises(CaptionFileError, match="No such file"):
        read_caption(path)


@given(data=st.binary(max_size=200))
def any_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        caption = read_caption(path)
    except CaptionFileError as error:
        assert str(error)
        return
    assert "\n" not in caption.text and caption.text == caption.text.strip()
    assert bool(caption.text) == (caption.num_lines > 0)


@pytest.mark.parametrize("num_examples", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_any_bytes_are_read_or_refused(tmp_path: Path, num_examples: int) -> None:
    path = tmp_path / "x.txt"
    settings(max_examples=num_examples, deadline=None, derandomize=num_examples < 1000)(any_bytes)(path)
