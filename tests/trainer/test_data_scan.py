"""Scanning a folder: what counts as what, what is said about it, and what is refused."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.folders import folder_rule, natural_key, parse_folder
from loragraft.trainer.data.records import Dataset, Record
from loragraft.trainer.data.scan import scan_folder
from loragraft.trainer.data.train_set import build_train_set
from loragraft_tests.trainer.data_folders import Refusal, fill, picture

S = (48, 32)


def said(dataset: Dataset, *texts: str) -> bool:
    """Say whether one report line holds all the texts."""
    return any(all(text in line for text in texts) for line in dataset.lines)


def facts_of(dataset: Dataset) -> dict[str, tuple[int, str, str]]:
    return {r.name: (r.repeats, r.concept, r.caption) for r in dataset.records}


# ---- the folder rule ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("10_alice", (10, "alice")),
        ("5_A_B C", (5, "A_B C")),
        ("6_photo", (6, "photo")),
        ("1_", (1, "")),
        ("0_x", (0, "x")),
        ("-3_x", (-3, "x")),
        ("alice", None),
        ("alice_10", None),
        ("10 alice", None),
        ("1.5_x", None),
        ("_x", None),
        ("", None),
    ],
)
def test_parse_folder(name: str, expected: tuple[int, str] | None) -> None:
    assert parse_folder(name) == expected


def test_the_nearest_numbered_folder_decides_the_root_included() -> None:
    assert folder_rule("10_alice/x.png", "set") == (10, "alice")
    assert folder_rule("10_alice/close/x.png", "set") == (10, "alice")
    assert folder_rule("10_alice/2_bob/x.png", "set") == (2, "bob")
    assert folder_rule("x.png", "10_alice") == (10, "alice")
    assert folder_rule("close/x.png", "10_alice") == (10, "alice")
    assert folder_rule("dogs/x.png", "set") == (None, "dogs")
    assert folder_rule("x.png", "set") == (None, "")


def test_natural_order() -> None:
    names = ["b/1.png", "a/img10.png", "a/img2.png", "A/img3.png", "a b/1.png", "img1.png"]
    expected = ["a/img2.png", "A/img3.png", "a/img10.png", "a b/1.png", "b/1.png", "img1.png"]
    assert sorted(names, key=natural_key) == expected
    names.reverse()
    assert sorted(names, key=natural_key) == expected


# ---- scanning ----


def test_a_kohya_folder(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            "10_alice wonder/2.png": S,
            "10_alice wonder/2.txt": "alice, hat",
            "10_alice wonder/10.jpg": S,
            "dogs/a.webp": (32, 48),
            "0_old/b.png": S,
            "notes.md": "hello",
        },
    )
    dataset = scan_folder(tmp_path)
    assert dataset.root == tmp_path.resolve()
    assert facts_of(dataset) == {
        "10_alice wonder/2.png": (10, "alice wonder", "alice, hat"),
        "10_alice wonder/10.jpg": (10, "alice wonder", "alice wonder"),
        "dogs/a.webp": (1, "dogs", "dogs"),
    }
    assert [r.size for r in dataset.records] == [(32, 48), (32, 48), (48, 32)]
    assert all(r.path.is_absolute() and r.path == tmp_path.resolve() / r.name for r in dataset.records)
    assert said(dataset, "3 images", "21 with repeats")
    assert said(dataset, "10 x 2 images", "'alice wonder'")
    assert said(dataset, "Captions: 1 from .txt files, 2 from class words")
    assert said(dataset, "0 repeats (1)", "0_old/b.png")
    assert said(dataset, "not images (1)", "notes.md")
    assert not any(str(tmp_path.parent) in line for line in dataset.lines)


def test_parent_and_leaf_mean_the_same(tmp_path: Path) -> None:
    leaf = tmp_path / "7_cat"
    fill(leaf, {"1.png": S, "deep/2.png": S})
    inner = {Path(name).name: facts for name, facts in facts_of(scan_folder(leaf)).items()}
    outer = {Path(name).name: facts for name, facts in facts_of(scan_folder(tmp_path)).items()}
    assert inner == outer == {"1.png": (7, "cat", "cat"), "2.png": (7, "cat", "cat")}


def test_class_tokens_and_default_repeats_serve_where_no_folder_says_so(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": S, "3_x/b.png": S, "4_/c.png": S})
    dataset = scan_folder(tmp_path, class_tokens="sks cat ", default_repeats=5)
    assert facts_of(dataset) == {
        "3_x/b.png": (3, "x", "x"),
        "4_/c.png": (4, "sks cat", "sks cat"),
        "a.png": (5, "sks cat", "sks cat"),
    }


def test_recursive_off_reads_this_folder_alone_and_says_so(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": S, "a.txt": "a", "3_x/b.png": S})
    dataset = scan_folder(tmp_path, recursive=False)
    assert [r.name for r in dataset.records] == ["a.png"]
    assert said(dataset, "'recursive' is off (1)", "3_x")


def test_images_are_told_by_content(tmp_path: Path) -> None:
    fill(tmp_path, {"plain": b"", "b.data": b"", "c.png": b""})
    for name, format in [("plain", "PNG"), ("b.data", "JPEG"), ("c.png", "WEBP")]:
        picture(S).save(tmp_path / name, format=format)
    dataset = scan_folder(tmp_path, class_tokens="x")
    assert [r.name for r in dataset.records] == ["b.data", "c.png", "plain"]


def test_one_caption_for_two_formats_of_one_picture(tmp_path: Path) -> None:
    fill(
        tmp_path, {"a.png": S, "a.jpg": S, "a.txt": "both", "b.png": S, "b.png.txt": "full", "b.txt": "stem"}
    )
    dataset = scan_folder(tmp_path)
    assert {r.name: r.caption for r in dataset.records} == {"a.png": "both", "a.jpg": "both", "b.png": "full"}
    assert said(dataset, "several images share (1)", "a.txt")
    assert said(dataset, "differ, the first is used (1)", "b.png (b.png.txt, b.txt)")


def test_oddities_are_said(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            "a.png": S,
            "a.txt": "one\ntwo\n",
            "orphan.txt": "nobody",
            ".hidden.png": S,
            ".ipynb_checkpoints/a-checkpoint.png": S,
            "Thumbs.db": b"x",
        },
    )
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    Image.new("RGBA", S).save(tmp_path / "glass.png")
    Image.new("P", S).save(tmp_path / "film.gif", save_all=True, append_images=[picture(S).quantize(8)])
    dataset = scan_folder(tmp_path, class_tokens="x")
    assert said(dataset, "only the first is used (1)", "a.txt")
    assert said(dataset, "belong to no image (1)", "orphan.txt")
    assert said(dataset, "hidden (3)", ".hidden.png", ".ipynb_checkpoints", "Thumbs.db")
    assert said(dataset, "more than once (1)", "a.png = copy.png")
    assert said(dataset, "on white (1)", "glass.png")
    assert said(dataset, "first frame or page is used (1)", "film.gif")
    assert said(dataset, "1 from .txt files, 3 from class words")


def test_truncated_images_let_pass_by_another_part_are_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, {"a.png": S})
    assert not said(scan_folder(tmp_path, class_tokens="x"), "accept truncated images")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert said(scan_folder(tmp_path, class_tokens="x"), "accept truncated images")


def test_caption_extensions(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": S, "a.txt": "text", "a.caption": "caption", "a.tags": "tags"})
    assert scan_folder(tmp_path).records[0].caption == "text"
    assert scan_folder(tmp_path, caption_extensions=[".caption", ".txt"]).records[0].caption == "caption"
    dataset = scan_folder(tmp_path, caption_extensions=[".tags"])
    assert dataset.records[0].caption == "tags"
    assert said(dataset, "not images (2)", "a.txt")


# ---- links and special files ----


def test_links_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    outside = fill(tmp_path / "outside", {"secret.png": S, "secret.txt": "secret"})
    root = fill(tmp_path / "root", {"a.png": S, "a.txt": "a", "pool/b.png": S})
    (root / "c.png").symlink_to(outside / "secret.png")
    (root / "b2.txt").symlink_to(outside / "secret.txt")
    (root / "folder").symlink_to(outside)
    (root / "gone.png").symlink_to(outside / "nothing.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "again").symlink_to(root / "pool")
    (root / "up").symlink_to(root)
    (root / "d.png").symlink_to(root / "pool" / "b.png")
    (root / "d.txt").symlink_to(root / "a.txt")
    dataset = scan_folder(root)
    assert {r.name: r.caption for r in dataset.records} == {"a.png": "a", "d.png": "a", "pool/b.png": "pool"}
    assert said(dataset, "lead out", "(5)", "b2.txt", "c.png", "folder", "gone.png", "loop.png")
    assert said(dataset, "links to folders (2)", "again", "up")


def test_a_root_that_is_a_link_is_the_users_choice(tmp_path: Path) -> None:
    fill(tmp_path / "pool", {"a.png": S})
    (tmp_path / "3_cat").symlink_to(tmp_path / "pool")
    dataset = scan_folder(tmp_path / "3_cat")
    assert facts_of(dataset) == {"a.png": (3, "cat", "cat")}
    assert dataset.root == (tmp_path / "pool").resolve()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_hang_the_scan(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": S})
    os.mkfifo(tmp_path / "b.png")
    done: list[Dataset] = []
    thread = threading.Thread(
        target=lambda: done.append(scan_folder(tmp_path, class_tokens="x")), daemon=True
    )
    thread.start()
    thread.join(10)
    assert done and said(done[0], "neither files nor folders (1)", "b.png")


def test_deep_folders(tmp_path: Path) -> None:
    folder = tmp_path / "/".join(["d"] * 300)
    folder.mkdir(parents=True)
    fill(folder, {"a.png": S})
    assert [r.path for r in scan_folder(tmp_path).records] == [(folder / "a.png").resolve()]


# ---- refusals ----


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    fill(tmp_path, {"images/a.png": S})
    with Refusal("LG-DATA-001", "imagse", "did you mean", "images"):
        scan_folder(tmp_path / "imagse")
    with Refusal("LG-DATA-001", "a file, not a folder"):
        scan_folder(tmp_path / "images" / "a.png")
    for text in (f'"{tmp_path}"', f"'{tmp_path}'", f" {tmp_path}", f'{tmp_path}" '):
        with Refusal("LG-DATA-001", "without them", str(tmp_path)):
            scan_folder(text)
    for text in ("", "  ", '""'):
        with Refusal("LG-DATA-001", "the path is empty"):
            scan_folder(text)
    with Refusal("LG-DATA-001", "cannot be used"):
        scan_folder("a\0b")
    with Refusal("LG-DATA-001"):
        scan_folder("x" * 100_000)
    with Refusal("LG-DATA-001", "check the path"):
        scan_folder("/no/such/place/at/all")
    odd = tmp_path / "5_a\nb"
    fill(odd, {"a.png": S})
    with Refusal("LG-DATA-001", "rename the folder"):
        scan_folder(odd)


def test_no_images(tmp_path: Path) -> None:
    with Refusal("LG-DATA-002", "no file in it"):
        scan_folder(tmp_path)
    fill(tmp_path, {"a.txt": "a"})
    with Refusal("LG-DATA-002", "1 caption file, but no image"):
        scan_folder(tmp_path)
    (tmp_path / "b.png").symlink_to(tmp_path.parent / "elsewhere.png")
    with Refusal("LG-DATA-002", "links"):
        scan_folder(tmp_path)
    fill(tmp_path, {"sub/deep/a.png": S})
    with Refusal("LG-DATA-002", "'recursive' is off", "sub"):
        scan_folder(tmp_path, recursive=False)
    fill(tmp_path / "0_zero", {"a.png": S})
    with Refusal("LG-DATA-002", "0 repeats"):
        scan_folder(tmp_path / "0_zero")


def test_all_unreadable_images_are_listed_at_once(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {"good.png": S, "cut.png": S, "page.jpg": b"<!doctype html>", "zero.png": b"", "x.heic": b"?"},
    )
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) * 2 // 3])
    with Refusal(
        "LG-DATA-003", "4 of 5 images", "cut.png (truncated", "page.jpg (not an image: an HTML page)"
    ):
        scan_folder(tmp_path, class_tokens="x")
    dataset = scan_folder(tmp_path, class_tokens="x", on_bad="skip")
    assert [r.name for r in dataset.records] == ["good.png"]
    assert said(dataset, "Skipped, cannot be read (4)", "zero.png (0 bytes)", "x.heic")
    (tmp_path / "good.png").unlink()
    with Refusal("LG-DATA-003", "4 of 4 images"):
        scan_folder(tmp_path, class_tokens="x", on_bad="skip")


def test_twenty_files_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    fill(tmp_path, {f"{i}.png": b"?" for i in range(30)})
    with Refusal("LG-DATA-003", "30 of 30 images", "and 10 more"):
        scan_folder(tmp_path)


def test_a_skipped_images_caption_is_no_orphan(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": S, "a.txt": "a", "b.png": b"?", "b.txt": "b", "c.data": b"", "c.txt": "c"})
    Image.new("1", (8001, 8000)).save(tmp_path / "c.data", format="PNG")
    dataset = scan_folder(tmp_path, on_bad="skip")
    assert said(dataset, "Skipped, cannot be read (2)", "b.png", "c.data (8001x8000")
    assert not said(dataset, "belong to no image")


def test_names_that_cannot_be_written_down(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": S, "b\nc.png": S})
    with Refusal("LG-DATA-003", "b\\nc.png", "rename"):
        scan_folder(tmp_path, class_tokens="x")
    (tmp_path / "b\nc.png").unlink()
    try:
        (tmp_path / os.fsdecode(b"\xff.png")).write_bytes((tmp_path / "a.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes no such name")
    with Refusal("LG-DATA-003", "\\udcff.png", "rename"):
        scan_folder(tmp_path, class_tokens="x")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": S, "b.png": S, "shut/c.png": S})
    (tmp_path / "b.png").chmod(0)
    (tmp_path / "shut").chmod(0)
    try:
        with Refusal("LG-DATA-003", "b.png (Permission denied)", "shut (folder: Permission denied)"):
            scan_folder(tmp_path, class_tokens="x")
        with Refusal("LG-DATA-001", "cannot be read (Permission denied)"):
            scan_folder(tmp_path / "shut")
    finally:
        (tmp_path / "shut").chmod(0o755)


def test_captions_in_another_encoding(tmp_path: Path) -> None:
    fill(tmp_path, {f"{i}.png": S for i in range(3)})
    (tmp_path / "0.txt").write_text("plain", "utf-8-sig")
    (tmp_path / "1.txt").write_text("caf\u00e9", "cp1252")
    (tmp_path / "2.txt").write_text("caf\u00e9", "utf-16")
    with Refusal(
        "LG-DATA-004",
        "2 caption files",
        "1.txt (looks like Windows-1252), 2.txt (looks like UTF-16)",
        "UTF-8",
    ):
        scan_folder(tmp_path)


def test_empty_captions(tmp_path: Path) -> None:
    fill(tmp_path / "3_x", {"a.png": S, "a.txt": "", "b.png": S, "b.txt": " \n", "c.png": S, "c.txt": "c"})
    with Refusal("LG-DATA-005", "2 empty caption files", "3_x/a.txt, 3_x/b.txt"):
        scan_folder(tmp_path)


def test_neither_caption_nor_class_words(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": S, "b.png": S, "b.txt": "b"})
    found = scan_folder(tmp_path)
    assert [(r.caption, r.caption_source) for r in found.records] == [("", ""), ("b", "txt")]
    assert any("1 missing" in line for line in found.lines)
    assert any("No caption yet" in line and "a.png" in line for line in found.lines)
    with Refusal("LG-DATA-006", "1 image", "a.png", "class_tokens", "WD14 Tag"):
        build_train_set(found, DatasetConfig())


def test_caption_files_that_all_miss(tmp_path: Path) -> None:
    fill(tmp_path / "3_x", {"a.png": S, "b.png": S, "a_caption.txt": "a", "b_caption.txt": "b"})
    with Refusal("LG-DATA-007", "None of 2 caption files", "a_caption.txt"):
        scan_folder(tmp_path)


def test_a_date_is_no_number_of_repeats(tmp_path: Path) -> None:
    fill(tmp_path, {"20240105_trip/a.png": S})
    with Refusal("LG-DATA-008", "20240105 repeats", "20240105_trip"):
        scan_folder(tmp_path)


def test_arguments(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": S})
    with Refusal("LG-CFG-003", "on_bad", "'stop' or 'skip'"):
        scan_folder(tmp_path, on_bad="ignore")
    with Refusal("LG-CFG-003", "default_repeats"):
        scan_folder(tmp_path, default_repeats=0)
    with Refusal("LG-CFG-003", "caption_extensions"):
        scan_folder(tmp_path, caption_extensions=["txt"])
    with Refusal("LG-CFG-003", "caption_extensions"):
        scan_folder(tmp_path, caption_extensions=".txt")


# ---- memory ----


def num_pictures_alive() -> int:
    gc.collect()
    return sum(issubclass(type(o), Image.Image) for o in gc.get_objects())


@pytest.mark.parametrize("num_images", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_scan_holds_no_pixels(tmp_path: Path, num_images: int) -> None:
    fill(tmp_path, {f"{i}.bmp": (128, 128) for i in range(num_images)})
    before = num_pictures_alive()
    dataset = scan_folder(tmp_path, class_tokens="x")
    assert num_pictures_alive() == before
    assert len(dataset.records) == num_images
    assert all(isinstance(r, Record) for r in dataset.records)
