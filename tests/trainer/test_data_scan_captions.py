"""Where captions come from: text files, one JSON for many, sidecars, class words, in the stated order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.data.caption_files import CaptionFileError, read_caption
from loragraft.trainer.data.records import Dataset
from loragraft.trainer.data.scan import scan_folder
from loragraft.trainer.data.scan_captions import match_entries
from loragraft.trainer.data.sidecars import caption_list, read_json, sidecar_caption, tags_in
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, fill

S = (32, 32)


def captions(dataset: Dataset) -> dict[str, tuple[str, str]]:
    return {r.name: (r.caption, r.caption_source) for r in dataset.records}


def said(dataset: Dataset, *texts: str) -> bool:
    return any(all(text in line for text in texts) for line in dataset.lines)


def everything(root: Path) -> Path:
    """Write images that have one caption of each kind less than the one before."""
    sources = ("a.txt", "a.caption", "list.json", "a.json", "")
    for number in range(len(sources)):
        folder = root / f"{number}"
        fill(folder, {"a.png": S})
        texts = {"a.txt": "by txt", "a.caption": "by caption", "a.json": json.dumps({"tags": ["by sidecar"]})}
        texts["list.json"] = json.dumps({"a": "by list"})
        fill(folder, {name: texts[name] for name in sources[number:] if name})
    return root


# ---- the order ----


def test_each_source_steps_in_where_the_ones_before_are_missing(tmp_path: Path) -> None:
    dataset = scan_folder(everything(tmp_path))
    assert captions(dataset) == {
        "0/a.png": ("by txt", "txt"),
        "1/a.png": ("by caption", "caption"),
        "2/a.png": ("by list", "json"),
        "3/a.png": ("by sidecar", "sidecar"),
        "4/a.png": ("4", "folder"),
    }
    assert said(
        dataset, "1 from .txt files, 1 from .caption files, 1 from a JSON of many, 1 from sidecars, 1"
    )
    assert said(dataset, "looked for in this order: txt, caption, json, sidecar, folder")


def test_the_order_is_a_setting(tmp_path: Path) -> None:
    root = everything(tmp_path)
    for order, expected in [
        (("folder", "txt"), ["0", "1", "2", "3", "4"]),
        (("sidecar", "json", "folder"), [*["by sidecar"] * 4, "4"]),
        (("json", "txt", "folder"), [*["by list"] * 3, "3", "4"]),
        (("caption", "txt", "folder"), ["by caption", "by caption", "2", "3", "4"]),
    ]:
        found = captions(scan_folder(root, captions=order))
        assert [caption for caption, _ in found.values()] == expected
    with Refusal("LG-CFG-003", "captions"):
        scan_folder(root, captions=("png",))
    found = captions(scan_folder(root, captions=("txt", "caption", "json", "sidecar")))
    assert found["4/a.png"] == ("", "")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("first", "long_hair, hat"),
        ("all", "long_hair, hat\nred eyes"),
        ("tags", "long_hair, hat, red eyes"),
        ("words", "long_hair,, hat, red, eyes"),
    ],
)
def test_what_lines_mean(tmp_path: Path, kind: str, expected: str) -> None:
    fill(tmp_path, {"a.png": S, "a.png.txt": "long_hair, hat\n\nred eyes\r\n"})
    dataset = scan_folder(tmp_path, caption_lines=kind)
    assert dataset.records[0].caption == expected
    assert said(dataset, "only the first is used") == (kind == "first")
    assert said(dataset, "caption_lines 'all'") == (kind == "first")


def test_gallery_dl_and_grabber_text_files(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": S, "a.png.txt": "1girl\nlong_hair\n:3\n"})
    assert scan_folder(tmp_path, caption_lines="tags").records[0].caption == "1girl, long_hair, :3"
    (tmp_path / "a.png.txt").write_text("1girl long_hair :3", "utf-8")
    assert scan_folder(tmp_path, caption_lines="words").records[0].caption == "1girl, long_hair, :3"


# ---- one JSON for many ----


def test_hcp_and_kohya_lists(tmp_path: Path) -> None:
    fill(tmp_path, {"1.png": S, "2.jpg": S, "sub/3.png": S, "sub/4.png": S, "5.png": S, "6.png": S})
    metadata = {
        "1": {"caption": "one", "tags": "a, b"},
        "2.jpg": {"tags": "only tags", "train_resolution": [64, 64]},
        "sub/3": {"caption": "three"},
        "4": {"caption": "four"},
        "D:\\train\\old place\\5.png": {"caption": "five"},
        "/home/me/6.png": {"caption": "six"},
        "7": {"caption": "nobody"},
    }
    fill(tmp_path, {"meta_cap.json": json.dumps(metadata)})
    dataset = scan_folder(tmp_path)
    texts = {name: caption for name, (caption, _) in captions(dataset).items()}
    assert texts == {
        "1.png": "one, a, b",
        "2.jpg": "only tags",
        "5.png": "five",
        "6.png": "six",
        "sub/3.png": "three",
        "sub/4.png": "four",
    }
    assert said(dataset, "images that are not there (1)", "meta_cap.json: 7")


def test_the_list_nearest_to_an_image_counts_and_never_one_beside(tmp_path: Path) -> None:
    fill(tmp_path, {"a/1.png": S, "b/1.png": S, "c/1.png": S})
    fill(tmp_path, {"a/x.json": '{"1": "near"}', "z.json": '{"b/1": "far", "a/1": "far"}'})
    assert captions(scan_folder(tmp_path)) == {
        "a/1.png": ("near", "json"),
        "b/1.png": ("far", "json"),
        "c/1.png": ("c", "folder"),
    }
    fill(tmp_path, {"z.json": '{"../c/1": "outside", "1": "which?"}'})
    assert captions(scan_folder(tmp_path))["c/1.png"] == ("c", "folder"), "the name alone is ambiguous"
    assert match_entries(["../b/9"], ["a/9.png"], "a") == {"a/9.png": "../b/9"}, "only the name counts"
    assert match_entries(["a/9"], ["a/9.png", "b/9.png"], "b") == {"b/9.png": "a/9"}


def test_a_chosen_list(tmp_path: Path) -> None:
    fill(tmp_path / "set", {"1.png": S, "own.json": '{"1": "own"}'})
    fill(tmp_path, {"captions.json": '{"1": "chosen"}', "other.json": "[1]"})
    chosen = scan_folder(tmp_path / "set", caption_json=str(tmp_path / "captions.json"))
    assert captions(chosen) == {"1.png": ("chosen", "json")}
    with Refusal("LG-DATA-024", "other.json", "not of the form"):
        scan_folder(tmp_path / "set", class_tokens="x", caption_json=str(tmp_path / "other.json"))
    with Refusal("LG-DATA-024", "gone.json", "No such file"):
        scan_folder(tmp_path / "set", class_tokens="x", caption_json=str(tmp_path / "gone.json"))
    (tmp_path / "captions.json").write_text('{"2": "nobody"}')
    with Refusal("LG-DATA-024", "none of its entries"):
        scan_folder(tmp_path / "set", class_tokens="x", caption_json=str(tmp_path / "captions.json"))


def test_json_about_something_else_is_no_caption(tmp_path: Path) -> None:
    fill(tmp_path / "3_x", {"a.png": S, "info.json": '{"category": "x", "count": 3}', "list.json": "[]"})
    dataset = scan_folder(tmp_path)
    assert captions(dataset) == {"3_x/a.png": ("x", "folder")}
    assert said(dataset, "not images (2)", "info.json", "list.json")


def test_all_wrong_json_is_named_at_once(tmp_path: Path) -> None:
    fill(tmp_path / "3_x", {"a.png": S, "b.png": S, "c.png": S})
    fill(
        tmp_path / "3_x",
        {
            "a.json": "{",
            "b.json": "[" * 100_000,
            "cap.json": '{"c": "x", "c": "y"}',
            "more.json": '{"c": ""}',
            "odd.json": b"\xff\xfe{",
        },
    )
    with Refusal(
        "LG-DATA-024",
        "5 JSON",
        "a.json (no JSON at line 1",
        "b.json (nested too deeply",
        "cap.json (it has 'c' twice)",
        "more.json: c (an empty caption)",
        "odd.json (looks like UTF-16)",
    ):
        scan_folder(tmp_path)
    assert captions(scan_folder(tmp_path, captions=("txt", "folder")))["3_x/a.png"] == ("x", "folder")


def test_a_caption_is_never_followed_into_another_folder(tmp_path: Path) -> None:
    fill(
        tmp_path / "outside", {"secret.txt": "secret", "secret.json": '{"a": "secret", "caption": "secret"}'}
    )
    root = fill(tmp_path / "set" / "3_x", {"a.png": S}).parent
    (root / "3_x" / "a.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    (root / "3_x" / "a.json").symlink_to(tmp_path / "outside" / "secret.json")
    (root / "list.json").symlink_to(tmp_path / "outside" / "secret.json")
    dataset = scan_folder(root)
    assert captions(dataset) == {"3_x/a.png": ("x", "folder")}
    assert said(dataset, "lead out of the folder", "(3)")


# ---- sidecars ----


@pytest.mark.parametrize("name", ["a.png.json", "a.json", "a.info.json", "a.png.info.json", "A.JSON"])
def test_sidecar_names(tmp_path: Path, name: str) -> None:
    fill(tmp_path, {"a.png": S, name: '{"title": "a  picture"}'})
    assert captions(scan_folder(tmp_path)) == {"a.png": ("a picture", "sidecar")}


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        # gallery-dl: danbooru, e621, pixiv, instagram, twitter; yt-dlp; Grabber's JSON
        ({"tag_string": "1girl long_hair", "rating": "s"}, "1girl, long_hair"),
        ({"tags": ["1girl", "long_hair", "1girl"]}, "1girl, long_hair"),
        ({"tags": "1girl long_hair"}, "1girl, long_hair"),
        ({"tags": "a cat, a dog"}, "a cat, a dog"),
        ({"tags": {"general": ["solo"], "species": ["cat"]}}, "solo, cat"),
        ({"tags": [{"name": "cat", "translated": "Katze"}, {"tag": "dog"}]}, "cat, dog"),
        ({"tags_general": "solo hat", "tags_character": ["miku"]}, "miku, solo, hat"),
        ({"tag_string_general": "solo", "tag_string_artist": "me"}, "me, solo"),
        (
            {"tags": [], "description": "On the beach\n\nwith friends", "title": "x"},
            "On the beach with friends",
        ),
        ({"content": "a tweet"}, "a tweet"),
        ({"title": "Video", "tags": None}, "Video"),
        ({"caption": "written", "tags": ["x"]}, "written"),
        ({"id": 3}, ""),
        ([1], ""),
        ({"tags": [1, None, {"x": 1}], "title": 5}, ""),
    ],
)
def test_what_a_sidecar_says(content: object, caption: str) -> None:
    assert sidecar_caption(content) == caption


def test_a_sidecar_that_says_nothing_is_mentioned(tmp_path: Path) -> None:
    fill(tmp_path / "3_x", {"a.png": S, "a.json": '{"id": 3}'})
    dataset = scan_folder(tmp_path)
    assert captions(dataset) == {"3_x/a.png": ("x", "folder")}
    assert said(dataset, "neither tags nor text (1)", "a.json")


# ---- anything ----

values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)
fields = st.sampled_from(
    ["tags", "caption", "tag_string", "title", "description", "tags_general", "a", "b/c"]
)


@given(st.one_of(values, st.dictionaries(fields, values, max_size=5)))
@settings(max_examples=cases(1000), deadline=None)
def test_any_json_is_read_or_left(content: object) -> None:
    text = sidecar_caption(content)
    assert isinstance(text, str) and "\n" not in text and text == text.strip()
    entries = caption_list(content)
    assert entries is None or all(isinstance(v, str) and "\n" not in v for v in entries.values())
    assert all(tag and tag == tag.strip() for tag in tags_in(content))


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda t: t.encode("utf-16")))
@settings(max_examples=cases(1000), deadline=None)
def test_any_bytes_are_json_or_refused_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    try:
        read_json(path)
    except CaptionFileError as error:
        assert str(error) and "\n" not in str(error)


@given(
    st.binary(max_size=300)
    | st.text(max_size=100).flatmap(
        lambda t: st.sampled_from(["utf-8", "utf-16", "utf-8-sig", "gb18030", "utf-32-le"]).map(
            lambda e: t.encode(e, "replace")
        )
    ),
    st.sampled_from(["first", "all", "tags", "words"]),
)
@settings(max_examples=cases(1000), deadline=None)
def test_any_bytes_are_a_caption_or_refused_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    try:
        caption = read_caption(path)
    except CaptionFileError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert caption.text == caption.read_as("first") and "\n" not in caption.text
    assert bool(caption.read_as(kind)) == bool(caption.num_lines)


names = st.lists(
    st.text("ab1./ \\", min_size=1, max_size=8).filter(
        lambda n: n.strip("/") == n and "//" not in n and not {".", ".."} & set(n.split("/"))
    ),
    unique=True,
    max_size=8,
)


@given(names, names, st.sampled_from(["", "a", "a/b"]))
@settings(max_examples=cases(1000), deadline=None)
def test_entries_only_ever_name_images_at_or_below_their_file(
    keys: list[str], images: list[str], folder: str
) -> None:
    matches = match_entries(keys, images, folder)
    for image, key in matches.items():
        assert image in images and key in keys
        assert not folder or image.startswith(f"{folder}/")


def test_ten_thousand_digits_are_no_crash(tmp_path: Path) -> None:
    fill(tmp_path / "3_x", {"a.png": S, "a.json": '{"id": ' + "9" * 10_000 + "}"})
    with Refusal("LG-DATA-024", "a.json"):
        scan_folder(tmp_path)
