"""Subjects from detectors, pictures out of records and back, upscaling, and the crop's preview."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from loragraft.trainer.data import upscale as upscale_module
from loragraft.trainer.data.bridge import check_memory, chosen_records, from_pictures, shrunk, to_picture
from loragraft.trainer.data.crop import CropSettings, crop_dataset
from loragraft.trainer.data.crop_preview import crop_preview, crop_thumbnail
from loragraft.trainer.data.images import inspect
from loragraft.trainer.data.lettering import fitted, font_for
from loragraft.trainer.data.records import Dataset
from loragraft.trainer.data.scan import scan_folder
from loragraft.trainer.data.subjects import subject_from_mask, subjects_from_boxes
from loragraft.trainer.data.upscale import (
    Upscaler,
    enlarged_in_tiles,
    enlarged_size,
    open_upscaler,
    upscale_small,
    weights_key,
)
from loragraft.trainer.data.working_copy import Encoding
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, fill, picture
from loragraft_tests.trainer.test_crop import record

BOX = {"x": 10, "y": 20.5, "width": 30, "height": 40, "label": "face", "score": 0.9}
OTHER = {"x": 0, "y": 0, "width": 5, "height": 5}
SIZES = [(100, 200), (100, 200)]  # (height, width)


def contents(root: Path) -> dict[str, int]:
    return {p.relative_to(root).as_posix(): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Dataset:
    """Return a dataset of three pictures in two folders, one of them turned by EXIF."""
    root = fill(
        tmp_path / "raw",
        {
            "4_zogi/a.png": (60, 40),
            "4_zogi/b.png": (64, 64),
            "4_zogi/b.txt": "words",
            "2_miri/c.png": (30, 90),
        },
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    picture((40, 20)).save(root / "4_zogi/turned.jpg", exif=exif, quality=100)
    return scan_folder(root)


# ---- subjects ----


@pytest.mark.parametrize(
    "values",
    [
        [[[BOX], [BOX]]],  # one batch of two pictures
        [[[BOX]], [[BOX]]],  # a list of pictures, each a batch of one
        [[BOX], [BOX]],  # flat lists, one for each picture
        [BOX, BOX],
        [BOX],  # one box for all
        [[BOX]],
    ],
)
def test_every_form_of_boxes(values: list[Any]) -> None:
    assert subjects_from_boxes(values, SIZES) == [(10, 20.5, 40, 60.5)] * 2


def test_no_detection_several_and_the_largest() -> None:
    assert subjects_from_boxes([[[], [OTHER, BOX]]], SIZES) == [None, (0, 0, 40, 60.5)]
    assert subjects_from_boxes([[[], [OTHER, BOX]]], SIZES, several="largest") == [None, (10, 20.5, 40, 60.5)]
    assert subjects_from_boxes([[]], SIZES[:1]) == [None]
    with Refusal("LG-CFG-003", "'several'"):
        subjects_from_boxes([BOX], SIZES, several="best")


def test_boxes_of_shrunk_pictures_are_scaled_back() -> None:
    (found,) = subjects_from_boxes([BOX], [(1000, 2000)], longest_side=200)
    assert found == (100, 205, 400, 605)
    assert shrunk((2000, 1000), 200) == (200, 100) and shrunk((50, 20), 200) == (50, 20)
    assert shrunk((50, 20), 0) == (50, 20) and shrunk((5000, 1), 100) == (100, 1)


def test_boxes_that_do_not_match_or_cannot_be_read() -> None:
    with Refusal("LG-DATA-048", "Boxes for 3 pictures, but there are 2"):
        subjects_from_boxes([[[BOX], [BOX], []]], SIZES)
    with Refusal("LG-DATA-048", "Boxes for 1 picture, but there are 2"):
        subjects_from_boxes([[[BOX]]], SIZES)
    bad = [{"x": 1}, {**BOX, "width": 0}, {**BOX, "x": float("nan")}, 7, {**BOX, "y": "top"}]
    with Refusal("LG-DATA-051", "boxes: 5"):
        subjects_from_boxes([[[b] for b in bad]], SIZES)
    with Refusal("LG-DATA-051", "boxes: 1"):
        subjects_from_boxes([torch.zeros(4)], SIZES)


@settings(max_examples=cases(500), deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_masks_box_is_the_tightest(height: int, width: int, data: st.DataObject) -> None:
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    mask = np.zeros((height, width), np.float32)
    mask[top, left:right] = 1
    mask[top:bottom, left] = 1
    found = subject_from_mask(mask, (height * 3, width * 2))
    assert found == pytest.approx((left * 2, top * 3, right * 2, bottom * 3))
    assert subject_from_mask(mask * 0.4, (height, width)) is None


# ---- the preview ----


def test_what_is_cut_off_is_hatched_and_what_stays_is_not(folder: Dataset) -> None:
    (edit,) = [
        e for e in crop_dataset(folder, CropSettings(mode="square")).edits if e.before.name.endswith("a.png")
    ]
    drawn = np.asarray(crop_thumbnail(edit, 60)).astype(int)
    plain = np.asarray(picture((60, 40), shade=0)).astype(int)
    assert edit.box == (10, 0, 50, 40) and drawn.shape == plain.shape
    assert (drawn[4:36, 14:46] == plain[4:36, 14:46]).all()
    outside = np.r_[0:10, 50:60]
    assert (drawn[:, outside] != plain[:, outside]).any(axis=2).mean() > 0.95
    hatched = (drawn[:, outside] == (0xD8, 0xDC, 0xE2)).all(axis=2).mean()
    assert 0.05 < hatched < 0.3
    assert (np.asarray(crop_thumbnail(dataclasses.replace(edit, box=(0, 0, 60, 40)), 60)) == plain).all()


def test_the_sheet_shows_flagged_pictures_first(folder: Dataset) -> None:
    subjects = [None, (0.0, 0, 10, 10), None, None]
    edits = crop_dataset(folder, CropSettings(mode="square"), subjects).edits
    seen: list[tuple[int, int]] = []
    sheet = crop_preview(edits, max_pictures=1, cell_px=100, progress=lambda *step: seen.append(step))
    red = (np.asarray(sheet) == (0xC8, 0x37, 0x2D)).all(axis=2)
    assert red.any() and seen == [(1, 1)]
    whole = crop_preview(edits, cell_px=100)
    assert whole.width > sheet.width
    assert crop_preview(()).size[0] > 0


def test_labels_fit_and_hold_nothing_that_cannot_be_drawn() -> None:
    font = font_for(12, ["\u7d75"])
    assert font.getlength(fitted("n" * 300, font, 100)) <= 100
    assert fitted("a\nb\u202e", font, 1000) == "a b "


# ---- records to pictures and back ----


def test_there_and_back_changes_no_pixel_and_no_word(folder: Dataset, tmp_path: Path) -> None:
    cropped = crop_dataset(folder, CropSettings(mode="square")).dataset
    pictures = [np.asarray(to_picture(r)[0], np.float32) / 255 for r in cropped.records]
    back = from_pictures(pictures, tmp_path / "copy", like=cropped)
    for before, after in zip(cropped.records, back.records, strict=True):
        assert Path(after.name).with_suffix("") == Path(before.name).with_suffix("")
        for same in ("caption", "concept", "repeats", "size", "is_reg", "caption_source"):
            assert getattr(after, same) == getattr(before, same)
        assert after.crop is None and after.path.is_relative_to(tmp_path / "copy")
        assert to_picture(after)[0].tobytes() == to_picture(before)[0].tobytes()
        assert inspect(after.path).content_hash == after.content_hash
    again = scan_folder(tmp_path / "copy")
    assert [(r.name, r.caption, r.repeats) for r in again.records] == [
        (r.name, r.caption, r.repeats) for r in back.records
    ]


def test_a_second_run_touches_nothing_and_one_pixel_one_file(folder: Dataset, tmp_path: Path) -> None:
    pictures = [np.asarray(to_picture(r)[0], np.float32) / 255 for r in folder.records]
    copy = tmp_path / "copy"
    first = from_pictures(pictures, copy, like=folder)
    before = contents(copy)
    assert from_pictures(pictures, copy, like=folder).records == first.records
    assert contents(copy) == before
    pictures[1] = pictures[1].copy()
    pictures[1][0, 0, 0] = 1 - pictures[1][0, 0, 0]
    from_pictures(pictures, copy, like=folder)
    after = contents(copy)
    changed = {name for name in after if after[name] != before.get(name) and not name.startswith(".")}
    assert changed == {Path(folder.records[1].name).with_suffix(".png").as_posix()}


def test_new_pictures_captions_and_masks(tmp_path: Path) -> None:
    pictures = [np.full((8, 6, 3), 0.25, np.float32), np.full((4, 6, 4), 0.5, np.float32)]
    masks = [np.ones((8, 6), np.float32), np.eye(6, dtype=np.float32)[:4]]
    made = from_pictures(
        pictures, tmp_path / "copy", captions=["one", " two "], masks=masks, class_tokens="zog"
    )
    assert [(r.name, r.caption, r.concept, r.caption_source) for r in made.records] == [
        ("00001.png", "one", "zog", "list"),
        ("00002.png", "two", "zog", "list"),
    ]
    assert made.records[0].mask is None, "white all over is no mask"
    assert made.records[1].mask is not None
    image, mask = to_picture(made.records[1])
    assert image.getpixel((0, 0)) == (191, 191, 191), "half opaque grey on white"
    assert (np.asarray(mask) == np.eye(6)[:4] * 255).all()
    bare = from_pictures(pictures[:1], tmp_path / "bare")
    assert bare.records[0].caption == "" and not list((tmp_path / "bare").glob("*.txt"))


def test_masks_go_along_where_the_shape_is_kept(tmp_path: Path) -> None:
    fill(tmp_path / "raw", {"a.png": (60, 40), "b.png": (60, 40), "a.txt": "x", "b.txt": "y"})
    (tmp_path / "raw/masks").mkdir()
    for name in "ab":
        Image.linear_gradient("L").resize((60, 40)).save(tmp_path / f"raw/masks/{name}.png")
    masked = scan_folder(tmp_path / "raw", masks="folder", mask_folder="masks")
    assert all(r.mask for r in masked.records)
    pictures = [np.zeros((80, 120, 3), np.float32), np.zeros((40, 40, 3), np.float32)]
    back = from_pictures(pictures, tmp_path / "copy", like=masked)
    assert back.records[0].mask is not None and back.records[1].mask is None
    assert "Masks dropped, for the images have other shapes now: b.png" in back.lines


def test_lists_that_do_not_match_are_refused(folder: Dataset, tmp_path: Path) -> None:
    one = [np.zeros((4, 4, 3), np.float32)]
    with Refusal("LG-DATA-052", "1 image, but 4 records in dataset and 2 captions and 3 masks"):
        from_pictures(one, tmp_path / "c", like=folder, captions=["a", "b"], masks=[one[0][..., 0]] * 3)
    with Refusal("LG-DATA-052", "0 images"):
        from_pictures([], tmp_path / "c")
    bad = [np.full((4, 4, 3), np.nan, np.float32), np.zeros((4, 4), np.float32), *one, np.zeros((0, 4, 3))]
    with Refusal("LG-DATA-054", "3 of 4", "00001.png (values", "00002.png (shape 4x4)", "00004.png"):
        from_pictures(bad, tmp_path / "c")
    with Refusal("LG-DATA-054", "its mask"):
        from_pictures(one, tmp_path / "c", masks=[np.zeros((1, 4, 4))])
    assert not (tmp_path / "c").exists()


def test_a_part_and_a_limit(folder: Dataset) -> None:
    assert [r.name for r in chosen_records(folder, 1, 2).records] == [r.name for r in folder.records[1:3]]
    assert chosen_records(folder) is folder
    assert chosen_records(folder, 2).records == folder.records[2:]
    for first, count in ((4, 0), (-1, 0), (0, -1)):
        with Refusal("LG-CFG-003"):
            chosen_records(folder, first, count)
    check_memory(folder.records, 0, 10**9)
    with Refusal("LG-DATA-053", "4 pictures would take", "longest_side"):
        check_memory(folder.records, 0, 10_000)
    check_memory(folder.records, 8, 10_000)


# ---- upscaling ----


def twice(pixels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(pixels, scale_factor=4, mode="nearest")


FOUR = Upscaler(twice, 4, "weights")


@settings(max_examples=cases(300), deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 2048))
def test_nothing_grows_more_than_twice_or_beyond_the_target(width: int, height: int, target: int) -> None:
    size = enlarged_size(record((width, height)), target, 4)
    if size is None:
        factor = target / (width * height) ** 0.5
        assert round(width * factor) <= width or round(height * factor) <= height
    else:
        assert width <= size[0] <= 2 * width and height <= size[1] <= 2 * height
        assert (size[0] - 0.5) * (size[1] - 0.5) <= target**2 + 1


def test_small_pictures_are_enlarged_and_others_left(folder: Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    seen: list[tuple[int, int]] = []
    large = upscale_small(folder, copy, FOUR, target=60, progress=lambda *step: seen.append(step))
    sizes = {Path(r.name).stem: r.size for r in large.records}
    assert sizes == {"a": (49, 73), "b": (64, 64), "c": (104, 35), "turned": (80, 40)}
    for before, after in zip(folder.records, large.records, strict=True):
        if before.name.endswith("b.png"):
            assert after is before
        else:
            assert after.path.is_relative_to(copy) and inspect(after.path).size == after.size
            assert (after.caption, after.repeats, after.concept) == (
                before.caption,
                before.repeats,
                before.concept,
            )
    assert seen[-1] == (3, 3)
    assert "Enlarged, 1.16 to 2.00 times: 3 pictures." in large.lines
    assert any("Still smaller than 60x60" in line and "turned.jpg (40x80)" in line for line in large.lines)
    before_files = contents(copy)
    broken = Upscaler(lambda pixels: 1 / 0, 4, "weights")
    assert upscale_small(folder, copy, broken, target=60).records == large.records
    assert contents(copy) == before_files, "a second run asks the model nothing and touches nothing"
    with pytest.raises(ZeroDivisionError):
        upscale_small(folder, copy, dataclasses.replace(broken, key="other weights"), target=60)


def test_the_crop_is_applied_before(folder: Dataset, tmp_path: Path) -> None:
    cropped = crop_dataset(folder, CropSettings(mode="square")).dataset
    large = upscale_small(cropped, tmp_path / "copy", FOUR, target=80)
    after = next(r for r in large.records if r.name.endswith("a.png"))
    assert after.size == (80, 80) and after.crop is None
    middle = np.asarray(to_picture(after)[0])[8:72:2, 8:72:2].astype(int)
    assert abs(middle - np.asarray(picture((60, 40)).crop((10, 0, 50, 40)))[4:36, 4:36]).mean() < 6


def test_masks_grow_with_their_pictures(tmp_path: Path) -> None:
    fill(tmp_path / "raw", {"a.png": (60, 40), "a.txt": "x"})
    (tmp_path / "raw/masks").mkdir()
    Image.linear_gradient("L").resize((60, 40)).save(tmp_path / "raw/masks/a.png")
    masked = scan_folder(tmp_path / "raw", masks="folder", mask_folder="masks")
    (after,) = upscale_small(masked, tmp_path / "copy", FOUR, target=500).records
    image, mask = to_picture(after)
    assert image.size == mask.size == (120, 80)
    assert (
        abs(np.asarray(mask)[::2, ::2].astype(int) - np.asarray(to_picture(masked.records[0])[1])).max() < 9
    )


@pytest.mark.parametrize("size", [(1, 1), (511, 513), (600, 1100), (1025, 20)])
def test_tiles_leave_no_seam(size: tuple[int, int]) -> None:
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    kernel = torch.ones(3, 1, 9, 9) / 81

    def run(part: torch.Tensor) -> torch.Tensor:
        assert max(part.shape[2:]) <= 512 + 64
        return twice(torch.nn.functional.conv2d(part, kernel, padding=4, groups=3))[:, :, ::2, ::2]

    whole = torch.nn.functional.conv2d(pixels, kernel, padding=4, groups=3)
    whole = twice(whole)[:, :, ::2, ::2]
    assert torch.allclose(enlarged_in_tiles(pixels, Upscaler(run, 2, "")), whole, atol=1e-6)


def test_smaller_tiles_where_memory_is_short() -> None:
    sizes: list[int] = []

    def run(part: torch.Tensor) -> torch.Tensor:
        sizes.append(max(part.shape[2:]))
        if sizes[-1] > 260:
            raise torch.cuda.OutOfMemoryError("no memory")
        return twice(part)

    assert enlarged_in_tiles(torch.rand(1, 3, 300, 300), FOUR).shape == (1, 3, 1200, 1200)
    result = enlarged_in_tiles(torch.ones(1, 3, 300, 300), Upscaler(run, 4, ""))
    assert result.min() == 1 and max(sizes[2:]) <= 192
    with pytest.raises(torch.cuda.OutOfMemoryError):
        enlarged_in_tiles(
            torch.ones(1, 3, 9, 9),
            Upscaler(lambda p: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError()), 4, ""),
        )


def test_models_that_do_not_fit_are_refused(folder: Dataset, tmp_path: Path) -> None:
    with Refusal("LG-DATA-055", "1 times as large"):
        upscale_small(folder, tmp_path / "c", dataclasses.replace(FOUR, scale=1), target=60)
    with Refusal("LG-DATA-055", "expected x2"):
        upscale_small(folder, tmp_path / "c", dataclasses.replace(FOUR, scale=2), target=60)
    with Refusal("LG-CFG-003", "upscale_to"):
        upscale_small(folder, tmp_path / "c", FOUR, target=0)
    large = upscale_small(folder, tmp_path / "d", FOUR, target=2)
    assert large.records == folder.records and not (tmp_path / "d").exists()


def test_a_model_file_is_opened_with_spandrel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Descriptor:
        scale = 4

        def __init__(self) -> None:
            self.model = torch.nn.Identity()

        def to(self, device: str) -> Descriptor:
            return self

        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            return twice(pixels)

    class Loader:
        def __init__(self, device: str) -> None:
            assert device == "cpu"

        def load_from_state_dict(self, weights: dict[str, torch.Tensor]) -> Any:
            if "odd" in weights:
                raise fake.UnsupportedModelError("odd")
            return Descriptor() if "w" in weights else object()

    fake = types.SimpleNamespace(
        ModelLoader=Loader,
        ImageModelDescriptor=Descriptor,
        UnsupportedModelError=type("UnsupportedModelError", (Exception,), {}),
    )
    monkeypatch.setitem(sys.modules, "spandrel", fake)
    for name in ("w", "odd", "other"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    opened = open_upscaler(tmp_path / "w.safetensors")
    assert opened.scale == 4 and opened.run(torch.ones(1, 3, 2, 2)).shape == (1, 3, 8, 8)
    assert opened.key == weights_key({"w": torch.ones(2)}) != weights_key({"w": torch.zeros(2)})
    for name, words in (
        ("odd", "cannot be read: odd"),
        ("other", "no model that"),
        ("gone", "cannot be read"),
    ):
        with Refusal("LG-DATA-055", words):
            open_upscaler(tmp_path / f"{name}.safetensors")
    with Refusal("LG-DATA-055", "other formats can run code"):
        open_upscaler(tmp_path / "w.pth")
    monkeypatch.setattr(
        upscale_module.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name))
    )
    with Refusal("LG-DATA-055", "pip install spandrel"):
        open_upscaler(tmp_path / "w.safetensors")


def test_the_copy_can_be_jpeg(folder: Dataset, tmp_path: Path) -> None:
    large = upscale_small(folder, tmp_path / "copy", FOUR, target=60, encoding=Encoding("jpeg"))
    assert {p.suffix for p in (tmp_path / "copy").rglob("*.*") if not p.name.startswith(".")} == {
        ".jpg",
        ".txt",
    }
    assert len(large.records) == 4
