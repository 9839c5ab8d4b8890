"""Working copies: right at first, untouched the second time, one item redone for one change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from loragraft.trainer.data import working_copy
from loragraft.trainer.data.convert import convert, numbered
from loragraft.trainer.data.images import load_upright, upright_mask
from loragraft.trainer.data.records import Dataset
from loragraft.trainer.data.scan import scan_folder
from loragraft.trainer.data.working_copy import (
    LOCK,
    MANIFEST,
    Encoding,
    Item,
    own_stems,
    write_copy,
    write_items,
)
from loragraft_tests.trainer.data_folders import Refusal, fill, picture

S = (64, 48)


def source(tmp_path: Path) -> Path:
    return fill(
        tmp_path / "set",
        {
            "2_cat/b.png": S,
            "2_cat/a10.jpg": S,
            "2_cat/a2.bmp": S,
            "2_cat/a2.txt": "a cat, hat",
            "1_dog/x.webp": (48, 64),
        },
    )


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return every file's inode, time and content."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {
        f.relative_to(folder).as_posix(): (f.stat().st_ino, f.stat().st_mtime_ns, f.read_bytes())
        for f in files
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    names = {name for name in before | after if before.get(name) != after.get(name)}
    return names - {MANIFEST, LOCK}


def visible(folder: Path) -> list[str]:
    files = (f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    return sorted(name for name in files if not name.startswith("."))


# ---- the first time ----


def test_pictures_captions_and_records(tmp_path: Path) -> None:
    dataset = scan_folder(source(tmp_path))
    copy = write_copy(dataset, tmp_path / "copy")
    assert (copy.made, copy.kept, copy.removed) == (4, 0, 0)
    stems = ("1_dog/x", "2_cat/a10", "2_cat/a2", "2_cat/b")
    assert visible(tmp_path / "copy") == sorted(f"{s}.{e}" for s in stems for e in ("png", "txt"))
    for old, new in zip(dataset.records, copy.dataset.records, strict=True):
        assert load_upright(new).tobytes() == load_upright(old).tobytes()
        kept = ("caption", "concept", "repeats", "size", "caption_source", "is_reg")
        assert [getattr(new, field) for field in kept] == [getattr(old, field) for field in kept]
        assert new.path == tmp_path / "copy" / new.name and new.crop is None
    again = scan_folder(tmp_path / "copy")
    assert [(r.name, r.caption, r.repeats, r.concept, r.content_hash) for r in again.records] == [
        (r.name, r.caption, r.repeats, r.concept, r.content_hash) for r in copy.dataset.records
    ]


def test_edits_become_pixels(tmp_path: Path) -> None:
    root = fill(tmp_path / "set" / "1_x", {"a.png": (100, 80)}).parent
    exif = Image.Exif()
    exif[0x0112] = 6
    glass = picture((100, 80)).convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize((100, 80)))
    glass.save(root / "1_x" / "b.png", exif=exif)
    fill(root, {"masks/1_x/a.png": (50, 40)})
    dataset = scan_folder(root, masks="folder", background=(10, 200, 30))
    records = [dataclasses.replace(r, crop=(5, 10, 65, 60), size=(50, 60)) for r in dataset.records]
    cropped = dataset.replaced(records)
    copy = write_copy(cropped, tmp_path / "copy").dataset
    for old, new in zip(cropped.records, copy.records, strict=True):
        assert load_upright(new).size == (60, 50)
        assert load_upright(new).tobytes() == load_upright(old).tobytes()
        assert upright_mask(new).tobytes() == upright_mask(old).tobytes()
    assert copy.records[0].mask == tmp_path / "copy" / "masks" / "1_x" / "a.png"
    assert copy.records[1].mask is None
    rescanned = scan_folder(tmp_path / "copy", masks="folder")
    assert [r.mask_hash for r in rescanned.records] == [r.mask_hash for r in copy.records]


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_formats(tmp_path: Path, format: str) -> None:
    dataset = scan_folder(source(tmp_path))
    copy = convert(dataset, tmp_path / "copy", format=format).dataset
    for old, new in zip(dataset.records, copy.records, strict=True):
        with Image.open(new.path) as image:
            assert image.format == format.upper()
        difference = np.asarray(load_upright(new), np.int16) - np.asarray(load_upright(old), np.int16)
        assert np.abs(difference).max() <= (0 if format != "jpeg" else 8)


def test_what_is_in_the_format_already_is_copied_byte_for_byte(tmp_path: Path) -> None:
    dataset = scan_folder(source(tmp_path))
    copy = convert(dataset, tmp_path / "copy", format="jpeg", quality=5).dataset
    assert copy.records[2].path.name == "a10.jpg"
    assert copy.records[2].path.read_bytes() == dataset.records[2].path.read_bytes()
    other = dataclasses.replace(dataset.records[2], crop=(0, 0, 32, 32), size=(32, 32))
    cropped = convert(dataset.replaced([other]), tmp_path / "cropped", format="jpeg").dataset
    assert load_upright(cropped.records[0]).size == (32, 32)


# ---- the second time ----


def test_a_second_run_touches_nothing(tmp_path: Path) -> None:
    root = source(tmp_path)
    first = write_copy(scan_folder(root), tmp_path / "copy")
    before = state(tmp_path / "copy")
    second = write_copy(scan_folder(root), tmp_path / "copy")
    assert (second.made, second.kept, second.removed) == (0, 4, 0)
    assert state(tmp_path / "copy") == before
    assert second.dataset.records == first.dataset.records


def test_one_change_redoes_one_item(tmp_path: Path) -> None:
    root = source(tmp_path)
    write_copy(scan_folder(root), tmp_path / "copy")
    before = state(tmp_path / "copy")

    picture(S, shade=250).save(root / "2_cat" / "b.png")
    copy = write_copy(scan_folder(root), tmp_path / "copy")
    after = state(tmp_path / "copy")
    assert (copy.made, copy.kept) == (1, 3) and changed(before, after) == {"2_cat/b.png"}

    (root / "2_cat" / "a2.txt").write_text("another caption", "utf-8")
    copy = write_copy(scan_folder(root), tmp_path / "copy")
    last = state(tmp_path / "copy")
    assert (copy.made, copy.kept) == (0, 4) and changed(after, last) == {"2_cat/a2.txt"}

    (root / "1_dog" / "x.webp").unlink()
    copy = write_copy(scan_folder(root), tmp_path / "copy")
    assert copy.removed == 2 and not (tmp_path / "copy" / "1_dog").exists()
    assert changed(last, state(tmp_path / "copy")) == {"1_dog/x.png", "1_dog/x.txt"}


def test_a_copy_that_was_tampered_with_is_put_right(tmp_path: Path) -> None:
    root = source(tmp_path)
    write_copy(scan_folder(root), tmp_path / "copy")
    right = {name: data for name, (_, _, data) in state(tmp_path / "copy").items() if name != MANIFEST}
    (tmp_path / "copy" / "2_cat" / "b.png").write_bytes(b"x")
    (tmp_path / "copy" / "2_cat" / "a2.txt").unlink()
    copy = write_copy(scan_folder(root), tmp_path / "copy")
    assert copy.made == 1
    assert {n: data for n, (_, _, data) in state(tmp_path / "copy").items() if n != MANIFEST} == right


@pytest.mark.parametrize("change", ["format", "quality", "crop", "background"])
def test_every_setting_is_in_the_key(tmp_path: Path, change: str) -> None:
    root = fill(tmp_path / "set", {"1_x/a.bmp": S})
    dataset = scan_folder(root)
    write_copy(dataset, tmp_path / "copy", encoding=Encoding("jpeg", 90))
    edits: dict[str, Any] = {
        "crop": {"crop": (0, 0, 8, 8), "size": (8, 8)},
        "background": {"background": (0, 0, 0)},
    }
    record = dataclasses.replace(dataset.records[0], **edits.get(change, {}))
    encoding = {"format": Encoding("webp", 90), "quality": Encoding("jpeg", 91)}.get(
        change, Encoding("jpeg", 90)
    )
    assert write_copy(dataset.replaced([record]), tmp_path / "copy", encoding=encoding).made == 1


# ---- interrupted ----


class CancelledError(BaseException):
    pass


def test_cancel_keeps_what_is_done_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    root = fill(tmp_path / "set", {f"1_x/{i}.bmp": S for i in range(30)})
    dataset = scan_folder(root)

    def cancel(done: int, total: int) -> None:
        if done == 10:
            raise CancelledError

    with pytest.raises(CancelledError):
        write_copy(dataset, tmp_path / "copy", progress=cancel, workers=2)
    assert not list((tmp_path / "copy").rglob("*.tmp"))
    finished = len(list((tmp_path / "copy").rglob("*.png")))
    assert 10 <= finished < 30
    copy = write_copy(dataset, tmp_path / "copy")
    assert (copy.made, copy.kept) == (30 - finished, finished)


def test_a_crash_leaves_a_folder_that_is_still_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = scan_folder(source(tmp_path))
    saves: list[int] = []
    real = working_copy._Manifest.save

    def only_the_first(self: Any) -> None:
        saves.append(1)
        if len(saves) == 1:
            real(self)

    with monkeypatch.context() as patch:
        patch.setattr(working_copy._Manifest, "save", only_the_first)
        write_copy(dataset, tmp_path / "copy")  # its manifest is that of a process that died at the end
    copy = write_copy(dataset, tmp_path / "copy")
    assert (copy.made, copy.kept) == (4, 0)


def test_a_picture_that_fails_to_encode_leaves_no_file(tmp_path: Path) -> None:
    record = scan_folder(fill(tmp_path / "set", {"1_x/a.png": S})).records[0]

    def render(file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_items(tmp_path / "copy", [Item(record, "1_x/a.png", "k", render)])
    assert visible(tmp_path / "copy") == []


# ---- nothing foreign is lost ----


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    dataset = scan_folder(source(tmp_path))
    fill(tmp_path / "mine", {"holiday.png": S, "b.txt": "mine"})
    before = state(tmp_path / "mine")
    with Refusal("LG-DATA-021", "b.txt, holiday.png", "an empty or a new folder"):
        write_copy(dataset, tmp_path / "mine")
    assert state(tmp_path / "mine") == before
    with Refusal("LG-DATA-021"):
        write_copy(dataset, dataset.root)
    write_copy(dataset, tmp_path / "copy")
    added = fill(tmp_path / "copy", {"2_cat/new.png": S, "extra.txt": "mine"})
    with Refusal("LG-DATA-021", "2_cat/new.png"):
        write_copy(dataset, added, names=["2_cat/new", "2_cat/c", "2_cat/d", "2_cat/e"])
    assert write_copy(dataset.replaced(dataset.records[:1]), added).removed == 6
    assert visible(added) == ["1_dog/x.png", "1_dog/x.txt", "2_cat/new.png", "extra.txt"]


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        '{"version": 1, "files": {"../victim.txt": {}}}',
        '{"version": 1, "files": {"/etc/hostname": {}}}',
        '{"version": 1, "files": {"a/../../victim.txt": {}}}',
        '{"version": 1, "files": {"x": 3}}',
        '{"version": 2, "files": {}}',
        '{"version": 1, "files": []}',
        "[" * 100_000,
    ],
)
def test_a_hostile_manifest_removes_nothing(tmp_path: Path, manifest: str) -> None:
    dataset = scan_folder(source(tmp_path))
    fill(tmp_path, {"victim.txt": "keep", f"copy/{MANIFEST}": manifest})
    with Refusal("LG-DATA-021", "cannot be read"):
        write_copy(dataset, tmp_path / "copy")
    assert (tmp_path / "victim.txt").read_text() == "keep"


def test_links_in_a_copy_lead_nowhere(tmp_path: Path) -> None:
    dataset = scan_folder(source(tmp_path))
    write_copy(dataset, tmp_path / "copy")
    outside = fill(tmp_path / "outside", {"x.png": "keep", "x.txt": "keep"})
    for file in (tmp_path / "copy" / "1_dog").iterdir():
        file.unlink()
    (tmp_path / "copy" / "1_dog").rmdir()
    (tmp_path / "copy" / "1_dog").symlink_to(outside)
    with Refusal("LG-DATA-021", "a link to elsewhere"):
        write_copy(dataset, tmp_path / "copy")
    write_copy(dataset.replaced(dataset.records[1:]), tmp_path / "copy")
    assert {f.name: f.read_text() for f in outside.iterdir()} == {"x.png": "keep", "x.txt": "keep"}


def test_two_processes_do_not_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_copy, "LOCK_WAIT_S", 0)
    dataset = scan_folder(source(tmp_path))
    (tmp_path / "copy").mkdir()
    with FileLock(tmp_path / "copy" / LOCK), Refusal("LG-DATA-022", "copy"):
        write_copy(dataset, tmp_path / "copy")
    assert write_copy(dataset, tmp_path / "copy").made == 4


# ---- names ----


def test_names_that_would_collide(tmp_path: Path) -> None:
    root = fill(tmp_path / "set", {"1_x/a.png": S, "1_x/a.jpg": S, "1_x/A.webp": S, "1_x/b": b""})
    picture(S).save(root / "1_x" / "b", format="PNG")
    dataset = scan_folder(root)
    assert own_stems(dataset.records) == ["1_x/a.jpg", "1_x/a.png", "1_x/A.webp", "1_x/b"]
    assert len(write_copy(dataset, tmp_path / "copy").dataset.records) == 4
    with Refusal("LG-DATA-023", "1_x/same.png", "Convert Images"):
        write_copy(dataset, tmp_path / "other", names=["1_x/same", "1_x/SAME", "1_x/c", "1_x/d"])
    for wrong in ("../x", "/x", "a/../../x", "a//b"):
        with Refusal("LG-DATA-023"):
            write_copy(dataset.replaced(dataset.records[:1]), tmp_path / "wrong", names=[wrong])
    assert not (tmp_path / "wrong").exists()


def test_numbers_follow_natural_order_within_each_folder(tmp_path: Path) -> None:
    dataset = scan_folder(source(tmp_path))
    assert numbered(dataset.records) == ["1_dog/0001", "2_cat/0001", "2_cat/0002", "2_cat/0003"]
    copy = convert(dataset, tmp_path / "copy", names="number", prefix="cat_").dataset
    assert [r.name for r in copy.records] == [
        "1_dog/cat_0001.png",
        "2_cat/cat_0001.png",
        "2_cat/cat_0002.png",
        "2_cat/cat_0003.png",
    ]
    assert (tmp_path / "copy" / "2_cat" / "cat_0001.txt").read_text() == "a cat, hat", "a2 comes before a10"
    many = [dataclasses.replace(dataset.records[0], name=f"{i}.png") for i in range(10_000)]
    assert (numbered(many)[0], numbered(many)[-1]) == ("00001", "10000")


@pytest.mark.parametrize(
    "values",
    [
        {"format": "gif"},
        {"quality": 101},
        {"quality": -1},
        {"quality": True},
        {"names": "random"},
        {"prefix": "x"},
        {"prefix": "../x", "names": "number"},
        {"prefix": "a\nb", "names": "number"},
        {"prefix": " x", "names": "number"},
        {"prefix": "x" * 61, "names": "number"},
    ],
)
def test_wrong_settings(tmp_path: Path, values: dict[str, Any]) -> None:
    dataset = scan_folder(source(tmp_path))
    with Refusal("LG-CFG-003", next(iter(values))):
        convert(dataset, tmp_path / "copy", **values)
    assert not (tmp_path / "copy").exists()


def test_an_empty_caption_writes_no_file(tmp_path: Path) -> None:
    dataset = scan_folder(source(tmp_path))
    record = dataclasses.replace(dataset.records[0], caption="")
    write_copy(dataset.replaced([record]), tmp_path / "copy")
    assert visible(tmp_path / "copy") == ["1_dog/x.png"]


def test_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    root = source(tmp_path)
    dataset: Dataset = scan_folder(root)
    picture(S, shade=3).save(root / "2_cat" / "b.png")
    with Refusal("LG-DATA-009", "2_cat/b.png"):
        write_copy(dataset, tmp_path / "copy")
