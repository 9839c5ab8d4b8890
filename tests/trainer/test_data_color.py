"""Colours: profiles to sRGB, CMYK, grey, transparency; and profiles that are wrong."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from loragraft.trainer.data.color import IGNORED, MAX_PROFILE_BYTES, TOO_LARGE, UNFIT, profile_note, to_srgb
from loragraft.trainer.data.images import inspect, load_upright
from loragraft.trainer.data.records import Record
from loragraft.trainer.data.scan import scan_folder
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer import icc
from loragraft_tests.trainer.data_folders import picture

SWAPPED = icc.matrix_profile(icc.BLUE, icc.GREEN, icc.RED)


def with_profile(image: Image.Image, profile: bytes) -> Image.Image:
    image.info["icc_profile"] = profile
    return image


def colors(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def test_a_profile_whose_red_is_blue_swaps_them() -> None:
    image = with_profile(picture((32, 32), shade=77), SWAPPED)
    expected = colors(picture((32, 32), shade=77))[..., ::-1]
    assert np.abs(colors(to_srgb(image)) - expected).max() <= 12  # gamma 2.2 is not exactly sRGB's curve
    assert profile_note(image) == "Test profile"


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "LA", "1"])
def test_every_mode_is_converted(mode: str) -> None:
    image = with_profile(picture((32, 32), shade=200).convert(mode), SWAPPED)
    result = to_srgb(image)
    plain = picture((32, 32), shade=200).convert(mode).convert("RGBA" if mode.endswith("A") else "RGB")
    assert result.mode == plain.mode
    assert np.abs(colors(result)[..., :3] - colors(plain)[..., 2::-1]).max() <= 12
    if mode.endswith("A"):
        assert np.array_equal(colors(result)[..., 3], colors(plain)[..., 3])


def test_srgb_under_any_name_changes_nothing() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = with_profile(picture((32, 32)), srgb)
    assert profile_note(image) == ""
    assert to_srgb(image) is image


def test_grey_profiles() -> None:
    image = with_profile(Image.linear_gradient("L"), icc.gray_profile(1.0))
    result = colors(to_srgb(image))[:, 0]
    assert (result[:, 0] == result[:, 1]).all()
    assert abs(int(result[128, 0]) - 188) <= 1  # half of the light is 188 in sRGB
    wide = Image.fromarray(np.full((4, 4), 32896, np.uint16))
    assert abs(int(colors(to_srgb(with_profile(wide, icc.gray_profile(1.0))))[0, 0, 0]) - 188) <= 1


def test_cmyk() -> None:
    cyan = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    assert to_srgb(cyan.copy()).getpixel((0, 0)) == (0, 255, 255), "without a profile, the plain formula"
    red, green, blue = to_srgb(with_profile(cyan, icc.cmyk_profile())).getpixel((0, 0))
    assert max(abs(red - 119), abs(green - 119), abs(blue - 119)) <= 3, "lightness 50"
    paper = with_profile(Image.new("CMYK", (4, 4)), icc.cmyk_profile())
    assert min(to_srgb(paper).getpixel((0, 0))) >= 253


def test_a_cmyk_jpeg_as_photoshop_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.new("CMYK", (16, 16), (0, 0, 0, 255)).save(path, quality=95)
    assert b"Adobe" in path.read_bytes()
    facts = inspect(path)
    image = load_upright(Record(path, "x", facts.size, "", "", 1, facts.content_hash))
    assert max(image.getpixel((8, 8))) <= 2, "full black is not inverted"


@pytest.mark.parametrize(
    ("profile", "note"),
    [
        (b"rubbish", IGNORED),
        (SWAPPED[:300], IGNORED),
        (icc.cmyk_profile(), UNFIT),
        (icc.gray_profile(2.2), UNFIT),
        (bytes(MAX_PROFILE_BYTES + 1), TOO_LARGE),
    ],
)
def test_profiles_that_cannot_be_used_leave_the_values_as_they_are(profile: bytes, note: str) -> None:
    image = with_profile(picture((8, 8)), profile)
    assert to_srgb(image).tobytes() == picture((8, 8)).tobytes()
    assert profile_note(image) == note


def test_the_scan_says_what_became_of_profiles(tmp_path: Path) -> None:
    picture((32, 32)).save(tmp_path / "a.png", icc_profile=SWAPPED)
    picture((32, 32)).save(tmp_path / "b.png", icc_profile=b"rubbish")
    lines = scan_folder(tmp_path, class_tokens="x").lines
    assert any("converted to sRGB (1): a.png (Test profile)" in line for line in lines)
    assert any("taken as sRGB (1): b.png (damaged)" in line for line in lines)


def test_damaged_profiles_neither_crash_nor_hang() -> None:
    rng = random.Random("profiles")
    sources = [SWAPPED, icc.gray_profile(1.8), icc.cmyk_profile()]
    modes = ["RGB", "L", "CMYK"]
    for number in range(cases(300)):
        data = bytearray(sources[number % 3])
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        image = with_profile(picture((16, 16)).convert(modes[number % 3]), bytes(data))
        begun = time.monotonic()
        assert to_srgb(image).mode == "RGB"
        assert time.monotonic() - begun < 5
