"""A record's edits: crop, background and mask, and the pixels that come of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loragraft.trainer.data.images import (
    inspect,
    is_plain,
    load_mask,
    load_pixels,
    load_upright,
    mask_key,
    pixels_key,
    upright_mask,
)
from loragraft.trainer.data.records import Record
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, picture

FILES = Path(__file__).parent / "files"


def record_of(path: Path, **edits: object) -> Record:
    facts = inspect(path)
    return dataclasses.replace(
        Record(path, path.name, facts.size, "", "", 1, facts.content_hash),
        **edits,  # type: ignore[arg-type]
    )


def cropped(path: Path, crop: tuple[int, int, int, int], **edits: object) -> Record:
    size = crop[3] - crop[1], crop[2] - crop[0]
    return record_of(path, crop=crop, size=size, **edits)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255 * 2 - 1


def test_a_crop_is_what_one_would_cut_by_hand(tmp_path: Path) -> None:
    source = picture((100, 80), shade=40)
    source.save(tmp_path / "x.png")
    part = source.crop((20, 10, 84, 58))
    part.save(tmp_path / "part.png")
    record = cropped(tmp_path / "x.png", (20, 10, 84, 58))
    assert torch.equal(load_pixels(record, (64, 48)), as_tensor(part))
    assert load_upright(record).tobytes() == part.tobytes()
    # Resized, too: nothing of what was cut off bleeds in.
    assert torch.equal(load_pixels(record, (32, 32)), load_pixels(record_of(tmp_path / "part.png"), (32, 32)))


def test_a_crop_counts_in_upright_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source = picture((64, 32))
    source.save(tmp_path / "x.png", exif=exif)
    upright = source.transpose(Image.Transpose.ROTATE_270)
    record = cropped(tmp_path / "x.png", (0, 0, 16, 40))
    assert load_upright(record).tobytes() == upright.crop((0, 0, 16, 40)).tobytes()


@pytest.mark.parametrize("crop", [(0, 0, 65, 10), (-1, 0, 10, 10), (10, 0, 10, 10), (0, 40, 10, 65)])
def test_a_crop_outside_is_refused(tmp_path: Path, crop: tuple[int, int, int, int]) -> None:
    picture((64, 64)).save(tmp_path / "x.png")
    with Refusal("LG-DATA-009", "x.png", "outside its 64x64"):
        load_upright(record_of(tmp_path / "x.png", crop=crop))


def test_transparent_parts_lie_on_the_records_background(tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 16, 32))
    image.save(tmp_path / "x.png")
    record = record_of(tmp_path / "x.png", background=(0, 255, 0))
    assert load_upright(record).getpixel((30, 5)) == (0, 255, 0)
    pixels = load_pixels(record, (64, 64))
    assert torch.equal(pixels[:, 10, 60], torch.tensor([-1.0, 1.0, -1.0]))
    assert torch.equal(pixels[:, 10, 4], torch.tensor([-1.0, -1.0, 1.0]))


# ---- masks ----


def test_a_record_without_a_mask_learns_everywhere(tmp_path: Path) -> None:
    picture((40, 30)).save(tmp_path / "x.png")
    mask = load_mask(record_of(tmp_path / "x.png"), (32, 24))
    assert mask.shape == (24, 32) and mask.dtype == torch.float32 and torch.all(mask == 1)
    assert upright_mask(record_of(tmp_path / "x.png")).getextrema() == (255, 255)


def test_a_mask_is_cut_as_its_picture_is(tmp_path: Path) -> None:
    """The mask is the picture's own red: wherever the picture goes, the mask goes, too."""
    source = picture((120, 80))
    source.save(tmp_path / "x.png")
    source.getchannel("R").save(tmp_path / "m.png")
    mask = {"mask": tmp_path / "m.png", "mask_hash": inspect(tmp_path / "m.png").content_hash}
    for record in (
        record_of(tmp_path / "x.png", **mask),
        cropped(tmp_path / "x.png", (10, 20, 90, 70), **mask),
    ):
        for bucket, resized in (((64, 64), None), ((64, 32), (80, 50))):
            red = (load_pixels(record, bucket, resized)[0] + 1) / 2
            assert (load_mask(record, bucket, resized) - red).abs().max() < 0.03


def test_a_smaller_mask_is_stretched_over_the_whole_picture_also_where_it_is_cropped(tmp_path: Path) -> None:
    source = picture((400, 200))
    source.save(tmp_path / "x.png")
    source.getchannel("R").resize((100, 50), Image.Resampling.BOX).save(tmp_path / "m.png")
    record = cropped(
        tmp_path / "x.png",
        (200, 40, 360, 200),
        mask=tmp_path / "m.png",
        mask_hash=inspect(tmp_path / "m.png").content_hash,
    )
    red = load_upright(record).getchannel("R")
    assert upright_mask(record).size == red.size == (160, 160)
    difference = np.abs(np.asarray(upright_mask(record), np.int16) - np.asarray(red, np.int16))
    assert difference.max() <= 4


def test_the_alpha_channel_as_a_mask(tmp_path: Path) -> None:
    image = picture((64, 48)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((64, 48)))
    image.save(tmp_path / "x.png")
    record = cropped(tmp_path / "x.png", (0, 24, 64, 48), mask=tmp_path / "x.png")
    expected = image.getchannel("A").crop((0, 24, 64, 48))
    assert upright_mask(record).tobytes() == expected.tobytes()
    loaded = load_mask(record, (64, 24))
    assert torch.equal(loaded, torch.from_numpy(np.array(expected, dtype=np.float32)) / 255)
    picture((64, 48)).save(tmp_path / "y.png")
    assert load_mask(record_of(tmp_path / "y.png", mask=tmp_path / "y.png"), (64, 48)).min() == 1


def test_a_mask_that_changed_is_refused(tmp_path: Path) -> None:
    picture((40, 30)).save(tmp_path / "x.png")
    Image.new("L", (40, 30), 9).save(tmp_path / "m.png")
    record = record_of(tmp_path / "x.png", mask=tmp_path / "m.png", mask_hash="0" * 64)
    with Refusal("LG-DATA-009", "its mask's content is another one"):
        load_mask(record, (32, 32))


def test_a_transparent_masks_hidden_parts_are_black(tmp_path: Path) -> None:
    picture((8, 8)).save(tmp_path / "x.png")
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "m.png")
    mask_hash = inspect(tmp_path / "m.png").content_hash
    record = record_of(tmp_path / "x.png", mask=tmp_path / "m.png", mask_hash=mask_hash)
    assert load_mask(record, (8, 8)).max() == 0


# ---- keys ----


def test_keys_hold_every_edit_and_nothing_where_there_is_none(tmp_path: Path) -> None:
    picture((40, 30)).save(tmp_path / "x.png")
    plain = record_of(tmp_path / "x.png")
    assert pixels_key(plain) == {"image": plain.content_hash} and mask_key(plain) == {}
    masked = {"mask": tmp_path / "m.png", "mask_hash": "a" * 64}
    edits: list[dict[str, object]] = [
        {"crop": (0, 0, 10, 10)},
        {"background": (1, 2, 3)},
        {"content_hash": "b" * 64},
    ]
    keys = [pixels_key(dataclasses.replace(plain, **edit)) for edit in edits]  # type: ignore[arg-type]
    assert len({repr(key) for key in [*keys, pixels_key(plain)]}) == 4
    one = dataclasses.replace(plain, **masked)  # type: ignore[arg-type]
    others = [
        dataclasses.replace(one, mask=one.path),
        dataclasses.replace(one, mask_hash="c" * 64),
        dataclasses.replace(one, crop=(0, 0, 10, 10)),
    ]
    assert len({repr(mask_key(record)) for record in [plain, one, *others]}) == 5


# ---- HEIC ----


def test_heic_is_read_upright() -> None:
    pytest.importorskip("pi_heif")
    image = load_upright(record_of(FILES / "picture.heic"))
    near = [image.getpixel(at) for at in ((8, 8), (56, 8), (8, 40), (56, 40))]
    for got, wanted in zip(near, [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], strict=True):
        assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) <= 12
    turned = load_upright(record_of(FILES / "turned.heic"))
    assert turned.size == (48, 64)
    assert turned.getpixel((8, 8))[2] > 200, "blue, which lay below, is in front after the turn"


def test_heic_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match="pip install pi-heif"):
        inspect(FILES / "picture.heic")


# ---- what needs no change ----


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        ({}, True),
        ({"mode": "L"}, True),
        ({"mode": "RGBA"}, False),
        ({"mode": "P"}, False),
        ({"orientation": 6}, False),
        ({"icc_profile": b"x"}, False),
    ],
)
def test_is_plain(tmp_path: Path, change: dict[str, object], plain: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = change.get("orientation", 1)
    options = {"icc_profile": change["icc_profile"]} if "icc_profile" in change else {}
    picture((8, 8)).convert(str(change.get("mode", "RGB"))).save(tmp_path / "x.png", exif=exif, **options)
    data = (tmp_path / "x.png").read_bytes()
    assert is_plain(data, "png") == plain
    assert not is_plain(data, "jpeg") and not is_plain(b"?", "png")


@given(st.data())
@settings(max_examples=cases(300), deadline=None)
def test_pixels_and_mask_of_any_crop_fit_the_bucket(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.png"
    if not path.exists():
        picture((97, 61)).save(path)
        picture((50, 70)).convert("L").save(path.with_name("any mask.png"))
    left, top = data.draw(st.integers(0, 96)), data.draw(st.integers(0, 60))
    right, bottom = data.draw(st.integers(left + 1, 97)), data.draw(st.integers(top + 1, 61))
    mask = path.with_name("any mask.png")
    mask_hash = inspect(mask).content_hash
    record = cropped(path, (left, top, right, bottom), mask=mask, mask_hash=mask_hash)
    bucket = data.draw(st.integers(1, 9)) * 8, data.draw(st.integers(1, 9)) * 8
    pixels, weights = load_pixels(record, bucket), load_mask(record, bucket)
    assert pixels.shape == (3, bucket[1], bucket[0]) and weights.shape == (bucket[1], bucket[0])
    assert pixels.abs().max() <= 1 and weights.min() >= 0 and weights.max() <= 1
    assert load_upright(record).size == upright_mask(record).size == (right - left, bottom - top)
