"""Masks, regularisation, animation, pixel cap, header scans and what a second scan looks at again."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loragraft.trainer.data import checking
from loragraft.trainer.data.budget import PixelBudget
from loragraft.trainer.data.checking import check_images, in_order
from loragraft.trainer.data.folders import CLUTTER, natural_key
from loragraft.trainer.data.images import load_mask, load_pixels
from loragraft.trainer.data.records import Dataset, merged
from loragraft.trainer.data.scan import complete, scan_folder
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, fill, picture

S = (48, 32)
FILES = Path(__file__).parent / "files"


def said(dataset: Dataset, *texts: str) -> bool:
    return any(all(text in line for text in texts) for line in dataset.lines)


# ---- every format at once ----


def test_a_folder_of_every_format(tmp_path: Path) -> None:
    root = tmp_path / "2_thing"
    root.mkdir()
    image = picture((80, 60), shade=90)
    for suffix, format in [
        *(("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("jfif", "JPEG"), ("webp", "WEBP")),
        *(("avif", "AVIF"), ("bmp", "BMP"), ("tiff", "TIFF"), ("gif", "GIF"), ("image", "WEBP")),
    ]:
        image.save(root / f"a.{suffix}", format)
    (root / "b.heic").write_bytes((FILES / "picture.heic").read_bytes())
    image.save(root / "wrong.png", "JPEG")
    image.save(root / "none", "PNG")
    image.convert("CMYK").save(root / "cmyk.jpg")
    image.quantize(16).save(root / "palette.png")
    Image.fromarray(np.full((60, 80), 40_000, np.uint16)).save(root / "wide.png")
    image.save(root / f"{'x' * 196}.png")
    image.save(root / "\u732b \u00e9 \U0001f408.png")
    dataset = scan_folder(tmp_path)
    assert len(dataset.records) == 18
    for record in dataset.records:
        assert (record.repeats, record.concept) == (2, "thing")
        assert load_pixels(record, (32, 32)).shape == (3, 32, 32)
    header = scan_folder(tmp_path, check="header")
    assert [(r.name, r.size) for r in header.records] == [(r.name, r.size) for r in dataset.records]


# ---- masks ----


def test_masks_in_a_folder_of_the_same_shape(tmp_path: Path) -> None:
    root = fill(tmp_path, {"1_cat/a.png": S, "1_cat/b.jpg": S, "1_dog/c.png": S})
    fill(root, {"masks/1_cat/a.png": S, "masks/1_cat/b.webp": S, "masks/1_dog/gone.png": S})
    dataset = scan_folder(root, masks="folder")
    assert [r.mask and r.mask.relative_to(root).as_posix() for r in dataset.records] == [
        "masks/1_cat/a.png",
        "masks/1_cat/b.webp",
        None,
    ]
    assert [len(r.mask_hash) for r in dataset.records] == [64, 64, 0]
    assert said(dataset, "Masks: 2 from the folder masks")
    assert said(dataset, "Without a mask, learned everywhere (1): 1_dog/c.png")
    assert said(dataset, "Masks that belong to no image (1): 1_dog/gone.png")
    assert load_mask(dataset.records[0], (48, 32)).shape == (32, 48)
    assert len(scan_folder(root).records) == 6, "without the setting they are pictures like any other"


def test_flat_masks_and_masks_elsewhere(tmp_path: Path) -> None:
    root = fill(tmp_path / "set", {"1_cat/a.png": S, "1_dog/b.png": S, "1_cat/x.png": S, "1_dog/x.png": S})
    fill(tmp_path / "flat", {"A.png": S, "b.png": S, "x.png": S})
    dataset = scan_folder(root, masks="folder", mask_folder=str(tmp_path / "flat"))
    found = {r.name: r.mask.name if r.mask else None for r in dataset.records}
    assert found == {"1_cat/a.png": "A.png", "1_dog/b.png": "b.png", "1_cat/x.png": None, "1_dog/x.png": None}


def test_masks_are_refused_where_none_fits_or_one_is_broken(tmp_path: Path) -> None:
    fill(tmp_path, {"1_cat/a.png": S, "masks/b.png": S})
    with Refusal("LG-DATA-025", "none of its masks has the name"):
        scan_folder(tmp_path, masks="folder")
    with Refusal("LG-DATA-025", "holds no images", "gone"):
        scan_folder(tmp_path, masks="folder", mask_folder="gone")
    with Refusal("LG-DATA-001"):
        scan_folder(tmp_path, masks="folder", mask_folder=str(tmp_path / "gone"))
    fill(tmp_path, {"masks/a.png": b"<html>"})
    with Refusal("LG-DATA-026", "1 mask", "a.png (not an image: an HTML page)"):
        scan_folder(tmp_path, masks="folder", on_bad="skip")


def test_the_alpha_channel_as_mask(tmp_path: Path) -> None:
    fill(tmp_path / "1_x", {"solid.png": S})
    cut = picture(S).convert("RGBA")
    cut.putalpha(Image.new("L", S, 128))
    cut.save(tmp_path / "1_x" / "cut.png")
    dataset = scan_folder(tmp_path, masks="alpha", background=(0, 0, 0))
    cut_record, solid = dataset.records
    assert cut_record.mask == cut_record.path and cut_record.mask_hash == cut_record.content_hash
    assert cut_record.background == (0, 0, 0)
    assert load_mask(cut_record, (48, 32)).unique().tolist() == [pytest.approx(128 / 255)]
    assert solid.mask is None
    assert said(dataset, "learned everywhere (1): 1_x/solid.png")
    assert said(dataset, "laid on the colour (0, 0, 0) (1)")


# ---- regularisation, animation, cap ----


def test_regularisation_folders(tmp_path: Path) -> None:
    fill(tmp_path, {"5_sks cat/a.png": S, "reg/1_cat/b.png": S, "regular/c.png": S})
    dataset = scan_folder(tmp_path, reg_folder="Reg")
    assert {r.name: r.is_reg for r in dataset.records} == {
        "5_sks cat/a.png": False,
        "reg/1_cat/b.png": True,
        "regular/c.png": False,
    }
    assert said(dataset, "1 x 1 image", "'cat', regularisation")
    assert all(r.is_reg for r in scan_folder(tmp_path / "reg", is_reg=True).records)
    assert not any(r.is_reg for r in scan_folder(tmp_path).records)
    with Refusal("LG-DATA-027", "reg_folder", "classes"):
        scan_folder(tmp_path, reg_folder="classes")


def test_animated_images(tmp_path: Path) -> None:
    fill(tmp_path / "1_x", {"a.png": S})
    frames = [Image.new("RGB", S, color) for color in ("red", "lime")]
    frames[0].save(tmp_path / "1_x" / "film.gif", save_all=True, append_images=frames[1:])
    assert len(scan_folder(tmp_path).records) == 2
    dataset = scan_folder(tmp_path, animated="leave out")
    assert [r.name for r in dataset.records] == ["1_x/a.png"]
    assert said(dataset, "Left out, animated (1): 1_x/film.gif")
    (tmp_path / "1_x" / "a.png").unlink()
    with Refusal("LG-DATA-002", "1 image in it, all animated", "first frame"):
        scan_folder(tmp_path, animated="leave out")


def test_the_pixel_cap(tmp_path: Path) -> None:
    fill(tmp_path / "1_x", {"a.png": (10, 10), "b.png": (100, 100)})
    for check in ("decode", "header"):
        with Refusal("LG-DATA-003", "b.png (100x100", "the limit is 0.005"):
            scan_folder(tmp_path, max_megapixels=0.005, check=check)
    dataset = scan_folder(tmp_path, max_megapixels=0.005, on_bad="skip")
    assert [r.name for r in dataset.records] == ["1_x/a.png"]


@pytest.mark.parametrize(
    "values",
    [
        {"masks": "rgb"},
        {"background": (0, 0, 256)},
        {"background": (0, 0)},
        {"background": "white"},
        {"animated": True},
        {"max_megapixels": 0},
        {"max_megapixels": 10_000},
        {"check": ""},
        {"recursive": "yes"},
        {"caption_lines": "last"},
        {"captions": ("txt", "txt")},
        {"captions": ("",)},
        {"default_repeats": 1.5},
        {"default_repeats": True},
    ],
)
def test_wrong_options(tmp_path: Path, values: dict[str, Any]) -> None:
    fill(tmp_path, {"a.png": S})
    with Refusal("LG-CFG-003", next(iter(values))):
        scan_folder(tmp_path, class_tokens="x", **values)
    with pytest.raises(TypeError):
        scan_folder(tmp_path, no_such_option=1)


# ---- header scans ----


def test_a_header_scan_proves_nothing_until_it_is_completed(tmp_path: Path) -> None:
    fill(tmp_path / "1_x", {"a.png": S, "b.png": (200, 100), "masks/a.png": S})
    options: dict[str, Any] = {"masks": "folder", "mask_folder": "1_x/masks"}
    quick = scan_folder(tmp_path, check="header", **options)
    full = scan_folder(tmp_path, **options)
    assert [r.content_hash for r in quick.records] == ["", ""]
    assert said(quick, "Only the headers were read")
    calls: list[tuple[int, int]] = []
    completed = complete(quick, progress=lambda done, total: calls.append((done, total)))
    assert completed.records == full.records
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert complete(completed).records == full.records

    data = (tmp_path / "1_x" / "b.png").read_bytes()
    (tmp_path / "1_x" / "b.png").write_bytes(data[: len(data) // 2])
    cut = scan_folder(tmp_path, check="header", **options)
    with Refusal("LG-DATA-003", "1 of 2 images", "b.png (truncated"):
        complete(cut)
    skipped = complete(cut, on_bad="skip")
    assert [r.name for r in skipped.records] == ["1_x/a.png"]
    assert said(skipped, "Skipped, cannot be read (1): 1_x/b.png (truncated")
    fill(tmp_path / "1_x", {"masks/a.png": data[:100]})
    with Refusal("LG-DATA-026", "a.png"):
        complete(cut, on_bad="skip")


# ---- a second look ----


def test_only_what_changed_is_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path / "1_x", {f"{i}.png": S for i in range(6)})
    looked: list[str] = []
    real = checking.inspect

    def inspect(path: Path | str, **options: Any) -> Any:
        looked.append(Path(path).name)
        return real(path, **options)

    monkeypatch.setattr(checking, "inspect", inspect)
    seen: dict[Any, Any] = {}
    first = scan_folder(root, seen=seen)
    assert len(looked) == 6
    assert scan_folder(root, seen=seen).records == first.records and len(looked) == 6
    (root / "2.txt").write_text("words")
    assert scan_folder(root, seen=seen).records[2].caption == "words" and len(looked) == 6
    # Other pixels, same size and same times: only the change time tells, which nobody can set back.
    path = root / "3.png"
    before = path.stat()
    data = bytearray(path.read_bytes())
    picture(S, shade=200).save(path)
    data = bytearray(path.read_bytes()[: len(data)].ljust(before.st_size, b"\0"))
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    changed = scan_folder(root, seen=seen, on_bad="skip")
    assert looked[6:] == ["3.png"]
    assert changed.records[3].content_hash != first.records[3].content_hash


def test_what_is_remembered_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "MAX_SEEN", 3)
    root = fill(tmp_path / "1_x", {f"{i}.png": S for i in range(6)})
    seen: dict[Any, Any] = {}
    scan_folder(root, seen=seen)
    assert len(seen) <= 4


def test_a_larger_cap_of_before_does_not_let_a_picture_pass(tmp_path: Path) -> None:
    root = fill(tmp_path / "1_x", {"a.png": (100, 100)})
    seen: dict[Any, Any] = {}
    scan_folder(root, seen=seen)
    with Refusal("LG-DATA-003", "a.png"):
        scan_folder(root, seen=seen, max_megapixels=0.001)


# ---- many at once ----


def test_cancel_between_images(tmp_path: Path) -> None:
    root = fill(tmp_path / "1_x", {f"{i}.png": S for i in range(40)})

    class Cancelled(BaseException):
        pass

    def cancel(done: int, total: int) -> None:
        assert total == 40
        if done == 5:
            raise Cancelled

    with pytest.raises(Cancelled):
        scan_folder(root, progress=cancel)


def test_order_and_errors_of_parallel_work() -> None:
    assert list(in_order(lambda n: n * n, range(100), workers=7)) == [n * n for n in range(100)]
    done: list[int] = []

    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        done.append(number)
        return number

    with pytest.raises(ValueError, match="three"):
        list(in_order(work, range(1000), workers=2))
    assert len(done) < 100, "what had not begun was cancelled"


def test_never_more_pixels_in_flight_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, highest = PixelBudget(100), 0

    def work(pixels: int) -> None:
        nonlocal highest
        with budget.taken(pixels):
            highest = max(highest, budget._used)
            sum(range(2000))

    sizes = [30, 60, 10, 45, 99, 1, 77] * 20
    list(in_order(work, sizes, workers=8))
    assert 45 <= highest <= 100 and budget._used == 0
    list(in_order(work, [5000], workers=8))  # larger than the limit: alone, not for ever
    with pytest.raises(ZeroDivisionError), budget.taken(10):
        1 / 0  # noqa: B018
    assert budget._used == 0
    monkeypatch.setattr(checking, "PIXELS_IN_FLIGHT", 1)
    root = fill(tmp_path, {f"{i}.png": S for i in range(9)})
    assert all(not isinstance(f, str) for f in check_images(sorted(root.iterdir()), workers=4))


def test_datasets_of_several_roots(tmp_path: Path) -> None:
    one = scan_folder(fill(tmp_path / "one", {"1_x/a.png": S}))
    two = scan_folder(fill(tmp_path / "two", {"1_x/b.png": S}))
    same = scan_folder(fill(tmp_path / "more" / "one", {"1_x/a.png": S}))
    assert [r.name for r in merged([one, two]).records] == ["1_x/a.png", "1_x/b.png"]
    assert [r.name for r in merged([one, two, same]).records] == [
        "one/1_x/a.png",
        "two/1_x/b.png",
        "one 2/1_x/a.png",
    ]
    assert merged([one]) is one
    assert merged([one, two]).lines == (*one.lines, *two.lines)


file_names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0")
    | st.sampled_from("a.. \n\u202e\U0001f408"),
    min_size=1,
    max_size=60,
).filter(lambda n: len(n.encode()) <= 240 and n not in (".", ".."))


@given(st.lists(file_names, min_size=1, max_size=5, unique=True))
@settings(max_examples=cases(400), deadline=None)
def test_files_of_any_name_are_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    root = tmp_path_factory.mktemp("names")
    data = (FILES / "tiny.png").read_bytes()
    for name in names:
        (root / name).write_bytes(data)
    (root / "certain.png").write_bytes(data)
    dataset = scan_folder(root, class_tokens="x", on_bad="skip", captions=("folder",))
    found = {record.name for record in dataset.records}
    wanted = {n for n in [*names, "certain.png"] if not n.startswith(".") and n.casefold() not in CLUTTER}
    odd = {n for n in wanted if any(unicodedata.category(c) in ("Cc", "Cs") for c in n)}
    assert found == wanted - odd
    assert all(len(line.splitlines()) == 1 for line in dataset.lines)
    assert [r.name for r in dataset.records] == sorted(found, key=natural_key)
