"""``loragraft dataset frames`` and ``crop``: one step after another, on real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loragraft.trainer import api
from loragraft.trainer.__main__ import main
from loragraft.trainer.data.subjects import own_subjects, subjects_from_file
from loragraft_tests.trainer.data_folders import Refusal, fill, picture
from loragraft_tests.trainer.videos import encode, scene


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of a wide and a square picture with captions and masks."""
    root = fill(tmp_path / "photos", {"a.png": (300, 100), "b.png": (64, 64), "a.txt": "one", "b.txt": "two"})
    (tmp_path / "masks").mkdir()
    mask = Image.new("L", (300, 100), 0)
    mask.paste(255, (200, 20, 260, 80))
    mask.save(tmp_path / "masks" / "a.png")
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run a command; return its exit status and all that it printed."""
    try:
        status: Any = main(["dataset", *map(str, arguments)])
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    return int(status or 0), printed.out + printed.err


def test_frames_then_crop_then_originals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode(tmp_path / "videos" / "4_miri" / "v.mp4", [scene(n) for n in range(20)])
    out, file = tmp_path / "out", tmp_path / "frames.json"
    flags = ("--every_n_frames", 10, "--no-skip_blurred", "--no-skip_similar")
    status, text = run(capsys, "frames", tmp_path / "videos", "--out", out, "--dry_run", *flags)
    assert status == 0 and "4_miri/v.mp4: new, to be read" in text and not out.exists()
    status, text = run(capsys, "frames", tmp_path / "videos", "--out", out, "--save", file, *flags)
    assert status == 0 and "2 pictures of 1 video; up to date already: 0." in text
    assert {r.caption for r in api.load_dataset(file).records} == {"miri"}
    crop, reg, sheet = tmp_path / "crop.json", tmp_path / "reg.json", tmp_path / "sheet.png"
    status, text = run(
        capsys, "crop", file, "--mode", "square", "--out", crop, "--originals", reg, "--preview", sheet
    )
    assert status == 0 and "Cropped (square): 2 of 2 pictures" in text
    assert [r.crop for r in api.load_dataset(crop).records] == [(16, 0, 80, 64)] * 2
    assert all(r.is_reg and r.crop is None for r in api.load_dataset(reg).records)
    assert Image.open(sheet).size[0] > 200


def test_without_out_nothing_is_written(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in photos.parent.rglob("*")}
    status, text = run(capsys, "crop", photos, "--mode", "beyond_aspect")
    assert status == 0 and "Cropped (beyond_aspect): 1 of 2 pictures; cut off: 33%" in text
    assert {p: p.stat().st_mtime_ns for p in photos.parent.rglob("*")} == before


def test_the_subject_of_a_file_or_of_the_own_masks(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes, out = photos.parent / "boxes.json", photos.parent / "crop.json"
    boxes.write_text(json.dumps({"a.png": [{"x": 10, "y": 10, "width": 40, "height": 40}]}), "utf-8")
    common = ("--mode", "subject", "--margin", 0, "--min_side", 0, "--out", out)
    status, text = run(capsys, "crop", photos, "--boxes", boxes, *common)
    assert status == 0 and "No subject was found; left as they are: b.png" in text
    assert [r.crop for r in api.load_dataset(out).records] == [(10, 10, 50, 50), None]
    status, text = run(
        capsys, "crop", photos, "--masks", "folder", "--mask_folder", photos.parent / "masks", *common
    )
    assert status == 0, text
    assert [r.crop for r in api.load_dataset(out).records] == [(200, 20, 260, 80), None]


def test_refusals_are_printed_with_their_code(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (
        (("frames", photos / "nowhere", "--out", photos / "x"), "LG-DATA-040"),
        (("frames", photos, "--out", photos / "x", "--start", 3, "--end", 2), "LG-CFG-003"),
        (("crop", photos, "--mode", "subject"), "LG-DATA-050"),
        (("crop", photos, "--width", 0), "LG-CFG-003"),
        (("crop", photos, "--upscale_model", "m.safetensors"), "LG-DATA-056"),
        (("crop", photos, "--upscale_model", "m.pth", "--copy", "c"), "LG-DATA-055"),
    ):
        status, text = run(capsys, *arguments)
        assert status == 1 and code in text, text


def test_files_of_boxes(photos: Path) -> None:
    dataset, file = api.scan_folder(photos), photos.parent / "boxes.json"
    box = {"x": 1, "y": 2, "width": 30, "height": 40}
    for content, expected in (
        ({"b.png": box}, [None, (1, 2, 31, 42)]),
        ([[box], []], [(1, 2, 31, 42), None]),
        ([[[box], []]], [(1, 2, 31, 42), None]),
        ({}, [None, None]),
    ):
        file.write_text(json.dumps(content), "utf-8")
        assert subjects_from_file(file, dataset) == expected
    for text in ('{"c.png": []}', "7", "{", '{"a.png": 7}', '{"a.png": [[1, 2]]}', '{"a.png": [{"x": NaN}]}'):
        file.write_text(text, "utf-8")
        with Refusal("LG-DATA-051"):
            subjects_from_file(file, dataset)
    with Refusal("LG-DATA-051", "gone.json"):
        subjects_from_file(photos / "gone.json", dataset)


def test_own_masks_are_subjects(photos: Path) -> None:
    masked = api.scan_folder(photos, masks="folder", mask_folder=str(photos.parent / "masks"))
    assert own_subjects(masked) == [(200, 20, 260, 80), None]
    picture((300, 100)).save(photos.parent / "masks" / "a.png")
    with Refusal("LG-DATA-009"):
        own_subjects(masked)
