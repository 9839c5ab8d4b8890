"""Cropping: the geometry for any size, the edit of the record, and what is said about the subject."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from loragraft.trainer.data.crop import (
    ALIGNMENTS,
    Cropped,
    CropSettings,
    Subject,
    crop_box,
    crop_dataset,
    largest,
)
from loragraft.trainer.data.images import load_mask, load_upright
from loragraft.trainer.data.records import Dataset, Record
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, picture

SIDES = st.integers(1, 5000)
SIZES = st.tuples(SIDES, SIDES)


def record(size: tuple[int, int], name: str = "a.png", **changes: Any) -> Record:
    """Return a record of a picture that is this (width, height); no file is behind it."""
    made = Record(Path(name), name, size[::-1], "a cat", "cat", 3, "0" * 64)
    return dataclasses.replace(made, **changes)


def dataset(*records: Record) -> Dataset:
    return Dataset(Path("root"), records, ("scanned",))


def crop(size: tuple[int, int], subject: Subject | None = None, **chosen: Any) -> Cropped:
    subjects = None if subject is None else [subject]
    return crop_dataset(dataset(record(size)), CropSettings(**chosen), subjects)


@st.composite
def subjects(draw: st.DrawFn, size: tuple[int, int]) -> Subject:
    xs = sorted(draw(st.lists(st.floats(0, size[0]), min_size=2, max_size=2)))
    ys = sorted(draw(st.lists(st.floats(0, size[1]), min_size=2, max_size=2)))
    return xs[0], ys[0], max(xs[1], xs[0] + 1e-3), max(ys[1], ys[0] + 1e-3)


CHOSEN = st.builds(
    CropSettings,
    mode=st.sampled_from(["keep", "beyond_aspect", "fixed", "square", "subject"]),
    align=st.sampled_from(list(ALIGNMENTS)),
    width=SIDES,
    height=SIDES,
    max_aspect=st.floats(1, 10),
    margin=st.floats(0, 3),
    subject_shape=st.sampled_from(["free", "square", "fixed"]),
    min_side=st.integers(0, 2000),
)


# ---- the geometry ----


@settings(max_examples=cases(2000), deadline=None)
@given(SIZES, CHOSEN, st.data())
def test_every_box_lies_in_the_picture_and_has_an_area(
    size: tuple[int, int], chosen: CropSettings, data: st.DataObject
) -> None:
    subject = data.draw(st.none() | subjects(size))
    left, top, right, bottom = crop_box(size, chosen, subject)
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    if chosen.mode == "keep" or (chosen.mode == "subject" and subject is None):
        assert (left, top, right, bottom) == (0, 0, *size)


@settings(max_examples=cases(2000), deadline=None)
@given(SIZES, st.floats(0.05, 20))
@example((1, 5000), 1.0)
def test_the_largest_part_of_a_shape(size: tuple[int, int], aspect: float) -> None:
    width, height = largest(size, aspect)
    assert 1 <= width <= size[0] and 1 <= height <= size[1]
    assert width == size[0] or height == size[1], "it cannot be larger"
    # Nothing is stretched: the shape is met to within the rounding of one side to whole pixels.
    assert abs(width - height * aspect) <= max(0.5, 0.5 * aspect) + 1e-6 or 1 in (width, height)


@settings(max_examples=cases(1000), deadline=None)
@given(SIZES, st.sampled_from(list(ALIGNMENTS)), st.sampled_from(["fixed", "square", "beyond_aspect"]))
def test_nine_alignments(size: tuple[int, int], align: str, mode: str) -> None:
    left, top, right, bottom = crop_box(size, CropSettings(mode=mode, align=align, width=300, height=400))
    free = {"left": left, "top": top, "right": size[0] - right, "bottom": size[1] - bottom}
    for side in align.replace("center", "").split("_"):
        assert not side or free[side] == 0
    if "left" not in align and "right" not in align:
        assert abs(free["left"] - free["right"]) <= 1
    if "top" not in align and "bottom" not in align:
        assert abs(free["top"] - free["bottom"]) <= 1


@settings(max_examples=cases(2000), deadline=None)
@given(SIZES, CHOSEN, st.data())
def test_a_subject_that_fits_stays_whole(
    size: tuple[int, int], chosen: CropSettings, data: st.DataObject
) -> None:
    subject = data.draw(subjects(size))
    left, top, right, bottom = crop_box(size, chosen, subject)
    if right - left >= subject[2] - subject[0]:
        assert left <= subject[0] + 1 and subject[2] <= right + 1
    if bottom - top >= subject[3] - subject[1]:
        assert top <= subject[1] + 1 and subject[3] <= bottom + 1
    if chosen.mode == "subject" and chosen.subject_shape == "free":
        # A free shape always has room for the subject and its margin, as far as the picture reaches.
        margin = chosen.margin * max(subject[2] - subject[0], subject[3] - subject[1])
        assert left <= max(0, subject[0] - margin) + 1 and right >= min(size[0], subject[2] + margin) - 1
        assert top <= max(0, subject[1] - margin) + 1 and bottom >= min(size[1], subject[3] + margin) - 1
        assert right - left >= min(size[0], chosen.min_side)
        assert bottom - top >= min(size[1], chosen.min_side)


@pytest.mark.parametrize(
    ("size", "chosen", "box"),
    [
        ((3000, 1000), {"mode": "beyond_aspect"}, (500, 0, 2500, 1000)),
        ((2000, 1000), {"mode": "beyond_aspect"}, (0, 0, 2000, 1000)),
        ((1000, 3000), {"mode": "beyond_aspect", "align": "top"}, (0, 0, 1000, 2000)),
        ((1000, 600), {"mode": "square"}, (200, 0, 800, 600)),
        ((1000, 600), {"mode": "square", "align": "bottom_right"}, (400, 0, 1000, 600)),
        ((1000, 600), {"mode": "fixed", "width": 2, "height": 3}, (300, 0, 700, 600)),
        ((400, 600), {"mode": "fixed", "width": 1024, "height": 1024}, (0, 100, 400, 500)),
    ],
)
def test_examples(size: tuple[int, int], chosen: dict[str, Any], box: tuple[int, ...]) -> None:
    assert crop_box(size, CropSettings(**chosen)) == box


@pytest.mark.parametrize(
    ("chosen", "box"),
    [
        ({"margin": 0, "min_side": 0}, (400, 300, 500, 400)),
        ({"margin": 0.5, "min_side": 0}, (350, 250, 550, 450)),
        ({"margin": 0, "min_side": 300}, (300, 200, 600, 500)),
        ({"margin": 5, "min_side": 0}, (0, 0, 1000, 800)),
        (
            {"margin": 0, "min_side": 0, "subject_shape": "fixed", "width": 2, "height": 1},
            (350, 300, 550, 400),
        ),
        ({"margin": 0, "min_side": 900, "subject_shape": "square"}, (50, 0, 850, 800)),
        # The margin has no room, and the subject itself does: it stays whole.
        (
            {"margin": 9, "min_side": 0, "subject_shape": "fixed", "width": 3, "height": 16},
            (400, 0, 550, 800),
        ),
    ],
)
def test_around_the_subject(chosen: dict[str, Any], box: tuple[int, ...]) -> None:
    assert crop_box((1000, 800), CropSettings(mode="subject", **chosen), (400, 300, 500, 400)) == box


# ---- the edit ----


def test_the_crop_is_an_edit_of_the_record() -> None:
    whole = record((1000, 600))
    cropped = crop_dataset(dataset(whole), CropSettings(mode="square", align="left"))
    (after,) = cropped.dataset.records
    assert after == dataclasses.replace(whole, crop=(0, 0, 600, 600), size=(600, 600))
    assert cropped.dataset.lines[0] == "scanned"
    assert "Cropped (square): 1 of 1 picture; cut off: 40%" in cropped.dataset.lines[1]


def test_a_second_crop_narrows_the_first() -> None:
    once = crop((1000, 600), mode="square", align="right").dataset
    twice = crop_dataset(once, CropSettings(mode="fixed", width=1, height=2, align="left"))
    assert twice.dataset.records[0].crop == (400, 0, 700, 600)
    assert crop_dataset(once, CropSettings()).dataset.records == once.records


def test_the_pixels_and_the_mask_are_those_of_the_box(tmp_path: Path) -> None:
    picture((100, 60)).save(tmp_path / "a.png")
    mask = Image.new("L", (50, 30), 0)
    mask.paste(255, (25, 0, 50, 30))
    mask.save(tmp_path / "m.png")
    whole = record((100, 60), path=tmp_path / "a.png", mask=tmp_path / "m.png", content_hash="", mask_hash="")
    (after,) = crop_dataset(dataset(whole), CropSettings(mode="square", align="right")).dataset.records
    cut = load_upright(after)
    assert cut.size == (60, 60) and cut.tobytes() == picture((100, 60)).crop((40, 0, 100, 60)).tobytes()
    columns = np.asarray(load_mask(after, (60, 60))).mean(axis=0)
    assert columns[:8].max() < 0.1 and columns[12:].min() > 0.9, "white begins at 50 of 100, 10 of the crop"


def test_the_originals_go_on_as_regularisation() -> None:
    wide, square = record((1000, 600), "wide.png"), record((500, 500), "square.png")
    given_set = dataset(wide, square)
    cropped = crop_dataset(given_set, CropSettings(mode="square"))
    (original,) = cropped.originals.records
    assert original == dataclasses.replace(wide, is_reg=True, repeats=1)
    worded = crop_dataset(given_set, CropSettings(mode="square"), reg_caption=" girl ")
    assert worded.originals.records[0].caption == "girl"
    assert [r.is_reg for r in cropped.dataset.records] == [False, False]
    assert crop_dataset(given_set, CropSettings()).originals.records == ()


# ---- what is said ----


def test_a_subject_at_the_edge_is_flagged() -> None:
    cropped = crop((1000, 600), (100, 100, 900, 590), mode="square")
    (edit,) = cropped.edits
    assert edit.box == (200, 0, 800, 600)
    assert edit.cut_sides == ("left", "right") and edit.touched_sides == ()
    near = crop((1000, 600), (300, 100, 400, 595), mode="square").edits[0]
    assert near.cut_sides == () and near.touched_sides == ("bottom",)
    assert "The subject is cut off: a.png (left, right)" in cropped.dataset.lines
    free = crop((1000, 600), (300, 100, 400, 500), mode="square")
    assert free.edits[0].touched_sides == () and len(free.dataset.lines) == 2


def test_kept_pictures_are_flagged_too() -> None:
    assert crop((1000, 600), (0, 100, 50, 200), mode="keep").edits[0].touched_sides == ("left",)


def test_pictures_without_a_subject_and_small_ones_are_named() -> None:
    records = (record((800, 800), "a.png"), record((800, 400), "b.png"))
    cropped = crop_dataset(dataset(*records), CropSettings(mode="subject"), [(1, 1, 9, 9), None])
    assert "No subject was found; left as they are: b.png" in cropped.dataset.lines
    assert [edit.is_cropped for edit in cropped.edits] == [True, False]
    fixed = crop_dataset(dataset(*records), CropSettings(mode="fixed", width=500, height=500))
    assert "Smaller than asked for after the crop: b.png (400x400)" in fixed.dataset.lines


# ---- refusals ----


def test_subjects_must_be_there_and_match() -> None:
    with Refusal("LG-DATA-050", "mode: subject"):
        crop_dataset(dataset(record((9, 9))), CropSettings(mode="subject"))
    with Refusal("LG-DATA-048", "1 subject for 2 pictures"):
        crop_dataset(dataset(record((9, 9)), record((9, 9))), CropSettings(), [None])


@pytest.mark.parametrize(
    "box",
    [
        (200.0, 0, 300, 50),
        (0.0, 0, 0, 50),
        (50.0, 0, 10, 50),
        (-50.0, 0, 50, 50),
        (float("nan"), 0, 5, 5),
        (0.0, 0, float("inf"), 5),
    ],
)
def test_subjects_outside_their_picture_are_refused(box: Subject) -> None:
    records = (record((100, 60), "good.png"), record((100, 60), "bad.png"))
    with Refusal("LG-DATA-049", "1 subject", "bad.png", "100x60"):
        crop_dataset(dataset(*records), CropSettings(), [(1, 1, 9, 9), box])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "zoom"),
        ("align", "middle"),
        ("width", 0),
        ("width", 12.5),
        ("height", True),
        ("max_aspect", 0.5),
        ("margin", -1.0),
        ("margin", float("nan")),
        ("subject_shape", "round"),
        ("min_side", -1),
    ],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with Refusal("LG-CFG-003", f"'{name}'"):
        crop((9, 9), **{name: value})
