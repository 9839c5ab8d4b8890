"""Captions: what training makes of them, which file belongs to which image, and in which encoding."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.checks import make
from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.caption_files import (
    MAX_CAPTION_BYTES,
    CaptionFileError,
    likely_encoding,
    pair_captions,
    read_caption,
)
from loragraft.trainer.data.captions import fixed_captions, is_varied, vary_caption
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import golden, picture

CASES = golden("captions")
EXTENSIONS = (".txt", ".caption")


# ---- what training makes of a caption ----


@pytest.mark.parametrize("case", CASES, ids=[str(case["options"]) for case in CASES])
def test_outcomes_equal_the_reference(case: dict[str, Any]) -> None:
    config = make(DatasetConfig, case["options"])
    at = {"epoch": case["epoch"] - 1, "step": case["step"]}  # the reference counts epochs from 1
    seen = {vary_caption(case["caption"], config, random.Random(f"draw {i}"), **at) for i in range(400)}
    assert seen == set(case["outcomes"])
    assert len(seen) == case["num_outcomes"]


def test_the_golden_file_is_whole() -> None:
    assert len(CASES) == 11


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


def varied(caption: str, config: DatasetConfig, **at: int) -> set[str]:
    return {vary_caption(caption, config, random.Random(i), **at) for i in range(60)}


def test_prefix_and_suffix_stand_at_the_line_that_is_used() -> None:
    config = DatasetConfig(caption_prefix="art,", caption_suffix=", end")
    assert varied("one\ntwo", config) == {"art, one , end"}, "the reference loses the suffix here"
    lines = dataclasses.replace(config, enable_wildcard=True)
    assert varied("one\ntwo", lines) == {"art, one , end", "art, two , end"}


def test_the_mark_of_kept_tags_never_stays() -> None:
    config = DatasetConfig(keep_tokens_separator="|||")
    assert varied("name ||| x, y", config) == {"name, x, y"}, "the reference trains it as text here"
    assert varied("no mark, x", config) == {"no mark, x"}
    dropped = dataclasses.replace(config, caption_tag_dropout_rate=1.0, keep_tokens=1)
    assert varied("a, b ||| x, y ||| z", dropped) == {"a, b, z"}
    assert varied("a, b, c", dropped) == {"a"}, "without a mark keep_tokens counts"


def test_captions_are_dropped_in_every_nth_epoch() -> None:
    config = DatasetConfig(caption_dropout_every_n_epochs=3)
    kept = [vary_caption("a", config, random.Random(0), epoch=epoch) for epoch in range(7)]
    assert kept == ["a", "a", "", "a", "a", "", "a"], "epochs 3 and 6 as the reference counts"


def test_token_warmup_lets_more_and_more_tags_through() -> None:
    config = DatasetConfig(token_warmup_step=10, token_warmup_min=2, keep_tokens=1)
    tags = "t, a, b, c, d, e"
    counts = [len(vary_caption(tags, config, random.Random(0), step=step).split(", ")) for step in range(12)]
    assert counts == [3, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6]
    share = DatasetConfig(token_warmup_step=0.5, token_warmup_min=2, keep_tokens=1)
    assert [
        len(vary_caption(tags, share, random.Random(0), step=step, total_steps=20).split(", "))
        for step in range(12)
    ] == counts
    few = DatasetConfig(token_warmup_step=10, token_warmup_min=9)
    assert varied("a, b", few) == {"a, b"}


def test_a_template_stands_around_the_tags() -> None:
    config = DatasetConfig(caption_template="photo of sks, {caption}", shuffle_caption=True)
    assert varied("a, b", config) == {"photo of sks, a, b", "photo of sks, b, a"}
    several = DatasetConfig(caption_template="x {caption}\n\ny {caption}")
    assert varied("{caption}", several) == {"x {caption}", "y {caption}"}, "its place is filled once"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ("a, b",)),
        ({"caption_dropout_rate": 0.1}, ("a, b", "")),
        ({"caption_dropout_every_n_epochs": 2}, ("a, b", "")),
        ({"caption_prefix": "x"}, ("x a, b",)),
        ({"caption_template": "an {caption}"}, ("an a, b",)),
        ({"secondary_separator": " "}, ("a,,b",)),
        ({"shuffle_caption": True}, None),
        ({"caption_tag_dropout_rate": 0.1}, None),
        ({"token_warmup_step": 5}, None),
        ({"enable_wildcard": True}, None),
        ({"caption_template": "{caption}\nx {caption}"}, None),
    ],
)
def test_what_can_be_encoded_once(change: dict[str, Any], expected: tuple[str, ...] | None) -> None:
    config = DatasetConfig(**change)
    found = fixed_captions("a, b", config)
    assert found == expected
    assert is_varied(config) is (found is None or len(found) > 1)
    if found is not None:
        drawn = {vary_caption("a, b", config, random.Random(i), epoch=i % 4) for i in range(200)}
        assert drawn == set(found)


def test_a_setting_does_not_move_what_is_drawn_before_it() -> None:
    plain = DatasetConfig(caption_dropout_rate=0.5)
    more = dataclasses.replace(plain, enable_wildcard=True, shuffle_caption=True)
    for seed in range(100):
        empty = vary_caption("a, {b|c}", plain, random.Random(seed)) == ""
        assert (vary_caption("a, {b|c}", more, random.Random(seed)) == "") is empty


ANY_CONFIG = st.fixed_dictionaries(
    {
        "shuffle_caption": st.booleans(),
        "keep_tokens": st.integers(0, 3),
        "caption_tag_dropout_rate": st.sampled_from([0.0, 0.5, 1.0]),
        "enable_wildcard": st.booleans(),
        "keep_tokens_separator": st.sampled_from(["", "|||"]),
        "secondary_separator": st.sampled_from(["", ";;;"]),
        "token_warmup_step": st.sampled_from([0, 0.5, 10]),
        "caption_template": st.sampled_from(["", "x {caption}", "a\n{caption}"]),
        "caption_prefix": st.sampled_from(["", "p,"]),
    }
)


@given(
    caption=st.text(alphabet="ab{}|,;\n \ue000", max_size=30),
    values=ANY_CONFIG,
    seed=st.integers(0, 9),
    step=st.integers(0, 20),
)
@settings(max_examples=cases(5000), deadline=None)
def test_any_caption_gives_one_line_and_the_same_again(
    caption: str, values: dict[str, Any], seed: int, step: int
) -> None:
    config = make(DatasetConfig, values)
    at = {"step": step, "total_steps": 20}
    result = vary_caption(caption, config, random.Random(seed), **at)
    assert result == vary_caption(caption, config, random.Random(seed), **at)
    assert "\n" not in result


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
    with pytest.raises(CaptionFileError, match="more than 1 MiB"):
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
