"""Caption operations: each one, their order, the guides' strategies, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loragraft.trainer.data.caption_groups import GROUPS, UNIONS
from loragraft.trainer.data.caption_ops import (
    PRESETS,
    Edited,
    edit_captions,
    escape_brackets,
    read_operations,
    unescape_brackets,
)
from loragraft.trainer.data.caption_steps import OPERATIONS
from loragraft.trainer.data.records import Dataset, Record
from loragraft.trainer.data.tag_lists import (
    KAOMOJIS,
    groups_of,
    is_protected,
    matches,
    plain,
    read_tag_list,
    spaced,
    underscored,
)
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal

# A tagged anime picture with tags of every kind that the guides speak of.
FULL = (
    "1girl, solo, blonde_hair, twintails, blue eyes, medium breasts, school uniform, miniskirt, hat, "
    "sitting, looking at viewer, smile, tsurime, closed eyes, indoors, white background, upper body, "
    "watermark, chair"
)


def dataset(*captions: str, concept: str = "ohwx girl") -> Dataset:
    """Return a dataset of these captions, without files."""
    records = tuple(
        Record(Path(f"{i}.png"), f"{i}.png", (64, 64), text, concept, 1, f"{i:064d}")
        for i, text in enumerate(captions)
    )
    return Dataset(Path(), records, ("found",))


def run(caption: str, *lines: str, **settings: str) -> str:
    return edit_captions(dataset(caption), "\n".join(lines), **settings).dataset.records[0].caption


def texts(edited: Edited) -> list[str]:
    return [record.caption for record in edited.dataset.records]


# ---- each operation ----


@pytest.mark.parametrize(
    ("caption", "line", "expected"),
    [
        ("a cat, red", "trigger: ohwx", "ohwx, a cat, red"),
        ("a cat, Ohwx, red", "trigger: ohwx, b", "ohwx, b, a cat, red"),
        ("a, b", "trigger: {class}", "ohwx girl, a, b"),
        ("ohwx, a, OHWX", "remove trigger: ohwx", "a"),
        ("a", "prefix: best quality, photo", "best quality, photo, a"),
        ("a", "suffix: photo", "a, photo"),
        ("a, B_c, d", "delete: A, b c", "d"),
        ("a, red hat, hat, hats", "delete: *hat", "a, hats"),
        ("a, b\\(c\\), d", "delete: b(c)", "a, d"),
        ("smile, a", "delete: smile", "a"),
        ("smile, a", "delete: smi*", "smile, a"),
        ("closed_eyes, red eyes", "delete: [eyes]", "closed_eyes"),
        ("1girl, red hair, tree, b", "keep only: [people], [background], b*", "1girl, tree, b"),
        ("a, b, c", "replace: a, b -> x, y", "x, y, c"),
        ("red hair, blue hair, c", "replace: * hair -> hair", "hair, c"),
        ("a, b", "replace: a ->", "b"),
        ("The image shows a cat.", "replace text: The image shows ->", "a cat."),
        ("white shirt, a, collared_shirt, shirt", "merge: shirt", "white collared shirt, a"),
        ("long hair, blonde hair, white shirt", "merge: hair, shirt", "long blonde hair, white shirt"),
        ("shirt, a", "merge: shirt", "shirt, a"),
        (
            "b, white shirt, a, collared shirt",
            "merge: collared shirt, white shirt -> shirt X",
            "b, shirt X, a",
        ),
        ("b, white shirt, a", "merge: collared shirt, white shirt -> shirt X", "b, white shirt, a"),
        ("shirt, white shirt, t-shirt, dress shirt", "drop subtags", "white shirt, t-shirt, dress shirt"),
        ("a, A, b_c, b c", "deduplicate", "a, b_c"),
        ("c, B, a", "sort: name", "a, B, c"),
        ("a_b, o_o, >_<", "underscores: off", "a b, o_o, >_<"),
        ("a b, c", "underscores: on", "a_b, c"),
        ("miku \\(vocaloid\\)", "unescape brackets", "miku (vocaloid)"),
        ("a, b", "template: a photo of {class}, {caption}", "a photo of ohwx girl, a, b"),
        ("a, b", "template: {{x}} {tags}", "{x} a, b"),
    ],
)
def test_an_operation(caption: str, line: str, expected: str) -> None:
    assert run(caption, line) == expected


def test_every_operation_is_tried_above() -> None:
    parameters = test_an_operation.pytestmark[0].args[1]  # type: ignore[attr-defined]
    tried = {line.partition(":")[0] for _, line, _ in parameters} | {"word", "default", "protect"}
    assert tried == set(OPERATIONS)


def test_the_order_of_the_lines_is_the_order_of_the_edits() -> None:
    assert run("a, b", "replace: a -> b", "deduplicate") == "b"
    assert run("a, b", "deduplicate", "replace: a -> b") == "b, b"
    assert run("c, b", "trigger: z", "sort: name") == "z, b, c", "trigger words stay in front"


def test_hcp_templates() -> None:
    lines = ("word: pt1 = ohwx-cat", "word: pt2 =", "template: {pt1} {class}, {pt2}, {caption}, {trigger}")
    assert run("red, sitting", *lines, trigger="zz") == "ohwx-cat ohwx girl, red, sitting, zz"


def test_what_stands_for_a_name_is_not_read_again() -> None:
    assert run("{class} {x", "template: {caption}, {class}") == "{class} {x, ohwx girl"


def test_sorting_by_frequency_counts_over_all_captions() -> None:
    edited = edit_captions(dataset("a, b, c", "c, b", "c"), "sort: frequency")
    assert texts(edited) == ["c, b, a", "c, b", "c"]


def test_a_default_fills_only_empty_captions() -> None:
    edited = edit_captions(dataset("a", "b"), "delete: a\ndefault: {class}")
    assert texts(edited) == ["ohwx girl", "b"]


def test_protect_holds_for_later_wildcards_and_groups_only() -> None:
    assert run("red hat, hat, b", "protect: red hat", "delete: *hat") == "red hat, b"
    assert run("red hat, hat, b", "delete: *hat", "protect: red hat") == "b"
    assert run("red hat, b", "protect: red hat", "delete: red hat") == "b"
    edited = edit_captions(dataset("red hat, closed eyes, b"), "protect: red hat\ndelete: *hat, * eyes")
    assert "  Protected, only its full name deletes it: red hat (1), closed eyes (1)." in edited.lines


def test_prose_survives_and_untouched_captions_stay_as_they_are() -> None:
    assert run("A cat,sitting , on a mat.") == "A cat,sitting , on a mat."
    assert run("A cat,sitting , on a mat.", "delete: dog") == "A cat,sitting , on a mat."
    assert run("A cat,sitting , on a mat.", "delete: sitting") == "A cat, on a mat."
    assert run("a; b, c; d", "delete: a", separator=";") == "b, c; d"


def test_brackets_are_escaped_for_prompts_only() -> None:
    assert escape_brackets("miku (vocaloid), a\\(b\\)") == "miku \\(vocaloid\\), a\\(b\\)"
    assert unescape_brackets(escape_brackets("x (y)")) == "x (y)"
    with Refusal("LG-DATA-072", "escape brackets", "prompts output"):
        run("a", "escape brackets")


# ---- the guides' four strategies ----


def test_strategy_all_tags() -> None:
    assert run(FULL, preset="all tags", trigger="ohwx") == f"ohwx, {FULL}"


def test_strategy_prune_features() -> None:
    """Hair, eyes and breasts go into the trigger; clothes and everything that varies stay."""
    assert run(FULL, preset="prune features", trigger="ohwx") == (
        "ohwx, 1girl, solo, school uniform, miniskirt, hat, sitting, looking at viewer, smile, tsurime, "
        "closed eyes, indoors, white background, upper body, watermark, chair"
    )


def test_strategy_keep_list() -> None:
    assert run(FULL, preset="keep list", trigger="ohwx") == (
        "ohwx, 1girl, solo, sitting, looking at viewer, smile, tsurime, closed eyes, indoors, "
        "white background, upper body, chair"
    )


def test_strategy_trigger_only() -> None:
    assert run(FULL, preset="trigger only", trigger="ohwx") == "ohwx"
    assert run(FULL, preset="trigger only") == "ohwx girl", "without a trigger, the folder's class words"


def test_a_presets_operations_come_before_ones_own() -> None:
    assert run(FULL, "suffix: photo", "delete: [clothes]", preset="keep list", trigger="x").endswith(
        "chair, photo"
    )


def test_a_trigger_is_needed_where_a_preset_uses_one() -> None:
    data = dataset("a", "b", concept="")
    for preset in ("all tags", "prune features", "keep list", "trigger only"):
        with Refusal("LG-DATA-074", "0.png", "1.png", "trigger"):
            edit_captions(data, "", preset=preset)


# ---- groups ----


@pytest.mark.parametrize(
    ("group", "tags"),
    [
        ("hair", "blonde hair, very_long_hair, twintails, ponytail, ahoge, blunt bangs, hair over one eye"),
        ("eyes", "blue eyes, heterochromia, slit pupils, long eyelashes"),
        (
            "body",
            "breasts, large breasts, animal ears, cat tail, dark skin, fang, pointy ears, horns, freckles",
        ),
        (
            "clothes",
            "uniform, miniskirt, swimsuit, hat, pantyhose, torn clothes, hair ribbon, school_uniform",
        ),
        ("people", "1girl, solo, 2girls, multiple girls, 6+boys, no humans"),
        ("action", "standing, sitting, lying, holding sword, arms up, hand on own hip, hands in pockets"),
        ("view", "looking at viewer, looking_back, from above, pov"),
        ("expression", "smile, tsurime, open mouth, closed eyes, light blush, >_<, :d"),
        ("background", "indoors, night, snow, chair, simple background, white background, blue sky, on bed"),
        ("framing", "full body, upper body, close-up, cowboy shot"),
        ("text", "watermark, artist name, twitter username, signature, english text"),
    ],
)
def test_the_guides_examples_are_in_their_groups(group: str, tags: str) -> None:
    for tag in tags.split(", "):
        assert group in groups_of(tag), tag
        if group in (*UNIONS["kept"], "text"):
            assert is_protected(tag), tag
        if group in (*UNIONS["features"], "clothes"):
            assert not is_protected(tag), tag


@pytest.mark.parametrize(
    "tag",
    ["hair ribbon", "hairband", "cat", "rainbow", "elbow", "spring onion", "bookcase", "guacamole", "oscar",
     "necktie", "self-portrait", "eyeball", "tailor", "hornet", "skinhead", "wingspan"],
)  # fmt: skip
def test_what_only_looks_like_a_feature_is_none(tag: str) -> None:
    assert not set(groups_of(tag)) & set(UNIONS["features"]), groups_of(tag)


def test_a_feature_word_in_an_action_or_expression_is_protected() -> None:
    tags = "hand in own hair, holding own tail, adjusting hair, closed eyes, covering own eyes, wet hair"
    for tag in f"{tags}, playing with own hair, half-closed_eyes, one eye closed".split(", "):
        assert is_protected(tag), tag


def test_groups_are_written_as_tags_are_compared() -> None:
    for name, items in GROUPS.items():
        assert len(set(items)) == len(items), name
        for item in items:
            assert plain(item) == item, (name, item)
            assert item.strip("* "), (name, item)
    assert all(group in GROUPS for groups in UNIONS.values() for group in groups)


# ---- wildcards ----


@settings(max_examples=cases(3000), deadline=None)
@given(st.text("ab*", max_size=12), st.text("ab", max_size=12))
@example("*a*b", "aab")
@example("a*", "")
def test_wildcards_match_like_a_plain_search(pattern: str, text: str) -> None:
    """Against a second way to decide: the set of positions that a prefix of the pattern can reach."""
    reach = {0}
    for char in pattern:
        if char == "*":
            reach = set(range(min(reach, default=len(text) + 1), len(text) + 1))
        else:
            reach = {at + 1 for at in reach if text[at : at + 1] == char}
    assert matches(pattern, text) == (len(text) in reach)


def test_a_hostile_wildcard_is_quick() -> None:
    begun = time.perf_counter()
    assert not matches("*a" * 100 + "b", "a" * 5000)
    assert time.perf_counter() - begun < 2


def test_only_the_star_is_special() -> None:
    assert matches("a.b", "a.b") and not matches("a.b", "axb")
    assert matches("[x]?", "[x]?") and not matches("[x]", "x")


# ---- spelling ----


def test_kaomojis_keep_their_underscores() -> None:
    assert len(KAOMOJIS) == 19
    for face in KAOMOJIS:
        assert spaced(face) == face
    assert spaced("long_hair") == "long hair" and underscored("long hair") == "long_hair"
    assert plain(" Long__Hair \\(A\\) ") == "long hair (a)"


@settings(max_examples=cases(1000), deadline=None)
@given(st.text(max_size=30))
def test_the_compared_form_is_stable(tag: str) -> None:
    assert plain(plain(tag)) == plain(tag)


# ---- refusals ----


def test_all_faulty_lines_are_named_at_once() -> None:
    lines = [
        "delet: a", "# a comment", "sort: size", "deduplicate: x", "trigger:", "replace: a",
        "replace: -> b", "merge: a ->", "word: a b = c", "word: x", "underscores: maybe", "",
    ]  # fmt: skip
    with Refusal("LG-DATA-072", "10 lines", "did you mean 'delete'", "line 1:", "line 11:") as info:
        run("a", *lines)
    assert "line 2:" not in info.value.where and "line 12:" not in info.value.where
    assert all(name in info.value.fix for name in OPERATIONS)


def test_an_unknown_group_is_refused_with_the_nearest() -> None:
    with Refusal("LG-DATA-070", "'hiar'", "[hair]"):
        run("a", "delete: [hiar]")
    with Refusal("LG-DATA-070"):
        read_tag_list("[nothing like it], [x]")


@pytest.mark.parametrize(
    "template", ["{captoin}", "{caption", "caption}", "{a{b}}", "{}", "{{caption}", "x" * 20_000]
)
def test_broken_templates_are_refused(template: str) -> None:
    with Refusal("LG-DATA-071"):
        run("a", f"template: {template}")


def test_empty_captions_are_refused_together() -> None:
    with Refusal("LG-DATA-073", "2 captions", "0.png", "2.png") as info:
        edit_captions(dataset("red hair", "red hair, b", "blue hair"), "delete: [hair]")
    assert "1.png" not in info.value.where


def test_impossible_settings_are_refused() -> None:
    with Refusal("LG-CFG-003", "preset", "prune features"):
        run("a", preset="prune")
    with Refusal("LG-CFG-003", "separator"):
        run("a", separator="")
    with Refusal("LG-DATA-072", "500 lines"):
        run("a", *["deduplicate"] * 600)


@pytest.mark.parametrize(
    "lines",
    [
        ["replace text: a -> aa"] * 400,
        ["template: {caption}, {caption}"] * 400,
        ["suffix: " + "x" * 60_000],
        ["prefix: " + "x, " * 400] * 100,
        ["replace text: a -> " + "b" * 60_000],
    ],
)
def test_captions_cannot_grow_without_end(lines: list[str]) -> None:
    begun = time.perf_counter()
    with pytest.raises(LoraGraftError) as info:
        edit_captions(dataset(*["a, b"] * 50), "\n".join(lines))
    assert info.value.code in ("LG-DATA-071", "LG-DATA-078")
    assert time.perf_counter() - begun < 20
    with Refusal("LG-DATA-078", "operations, line 1", "0.png"):
        edit_captions(dataset("a"), "suffix: " + "x" * 60_000)


def test_huge_lists_are_refused_or_quick() -> None:
    for text in ("*a, " * 600, "*" + "a" * 300, "x, " * 11_000):
        with Refusal("LG-DATA-070", "too long"):
            read_tag_list(text)
    with Refusal("LG-DATA-072", "at most 200 tags"):
        run("a", "merge: " + "x, " * 300)
    patterns = "delete: " + ", ".join(f"*a{i}*b*" for i in range(500))
    names = "delete: " + ", ".join(f"n{i}" for i in range(9000))
    begun = time.perf_counter()
    edit_captions(dataset(*[f"aaaa {i}, cccc" for i in range(300)]), f"{patterns}\n{names}")
    assert time.perf_counter() - begun < 20


# ---- what is said, and what is left alone ----


def test_the_report_tells_each_lines_effect_and_the_frequencies() -> None:
    edited = edit_captions(
        dataset("red hair, a, a", "a"), "delete: [hair]\ndelete: zebra\ndeduplicate\ntrigger: t, u"
    )
    assert edited.lines == (
        "delete: [hair]: 1 caption changed.",
        "delete: zebra: changed nothing.",
        "deduplicate: 1 caption changed.",
        "trigger: t, u: 2 captions changed.",
        "Captions edited: 2 of 2 images.",
        "Tag frequencies, before -> after: 3 changed, 1 gone, 2 new.",
        "       0 -> 2      t",
        "       0 -> 2      u",
        "       1 -> 0      red hair",
        "Trigger words: 2 tags in front; shuffle with keep_tokens 2.",
    )
    assert edited.dataset.lines == ("found", *edited.lines)


def test_only_the_caption_of_a_record_changes() -> None:
    data = dataset("a, b", "c")
    edited = edit_captions(data, "delete: b").dataset
    assert edited.records[1] is data.records[1]
    assert edited.records[0].caption == "a" and edited.records[0].caption_source == "edited"
    assert data.records[0].caption == "a, b"


@settings(max_examples=cases(2000), deadline=None)
@given(
    st.lists(st.text(max_size=30), min_size=1, max_size=4),
    st.lists(
        st.sampled_from(sorted(OPERATIONS)).flatmap(
            lambda name: st.text(max_size=20).map(lambda argument: f"{name}: {argument}")
        )
        | st.sampled_from(["delete: *", "keep only: [kept]", "deduplicate", "merge: a", "sort: name"])
        | st.text(max_size=30),
        max_size=5,
    ),
    st.sampled_from(sorted(PRESETS)),
)
def test_any_text_is_an_edit_or_a_refusal(captions: list[str], lines: list[str], preset: str) -> None:
    data = dataset(*captions)
    try:
        edited = edit_captions(data, "\n".join(lines), preset=preset, trigger="ohwx")
    except LoraGraftError as error:
        assert error.code in {f"LG-DATA-0{number}" for number in (70, 71, 72, 73, 74, 78)}
        assert str(error).count("\n") == 3
    else:
        assert len(edited.dataset.records) == len(captions)
        assert all(record.caption.strip() for record in edited.dataset.records)
        assert all("\n" not in line for line in edited.lines)


def test_reading_operations_changes_nothing_of_them() -> None:
    (operation,) = read_operations("  Keep   Only :  a, b ")
    assert (operation.name, operation.argument, operation.where) == (
        "keep only",
        "a, b",
        "operations, line 1",
    )
