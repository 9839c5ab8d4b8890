"""Duplicates: what is the same is found, what only looks alike is not, and the best one is kept."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from loragraft.trainer.data.duplicate_sheet import duplicate_sheet
from loragraft.trainer.data.duplicates import (
    MAX_DISTANCE,
    NEAR,
    SAME_FILE,
    SAME_PIXELS,
    Print,
    _bits,
    _grouped,
    dhash,
    duplicate_lines,
    find_duplicates,
    phash,
    without_duplicates,
)
from loragraft.trainer.data.records import Dataset, Record
from loragraft.trainer.data.scan import scan_folder
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal


@functools.cache
def photo(seed: int, size: tuple[int, int] = (480, 320)) -> Image.Image:
    """Return noise with the spectrum of photos: structure at every scale."""
    width, height = size
    noise = np.random.default_rng(seed).normal(size=(3, height, width))
    across, down = np.fft.fftfreq(width)[None], np.fft.fftfreq(height)[:, None]
    spectrum = 1 / np.maximum(np.hypot(across, down), 1 / max(size)) ** 1.2
    values = np.fft.ifft2(np.fft.fft2(noise) * spectrum).real
    values = (values - values.mean()) / values.std() * 55 + 128
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(io.BytesIO(data.getvalue())).convert("RGB")


def scanned(folder: Path, pictures: dict[str, Image.Image], **options: Any) -> Dataset:
    for name, image in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, **({"quality": 95} if name.endswith("jpg") else {}))
    return scan_folder(folder, class_tokens="x", **options)


def groups_of(dataset: Dataset, **options: Any) -> list[tuple[str, dict[str, str]]]:
    return [
        (group.kept.name, {twin.record.name: twin.kind for twin in group.twins})
        for group in find_duplicates(dataset, **options)
    ]


# ---- what is found ----


def test_exact_twins_in_any_format(tmp_path: Path) -> None:
    one, two = photo(1), photo(2)
    turned = Image.Exif()
    turned[0x0112] = 6
    dataset = scanned(tmp_path, {"a.png": one, "b.bmp": one, "c.png": two, "e.webp": photo(3)})
    one.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "d.tif", exif=turned)
    (tmp_path / "copy of c.png").write_bytes((tmp_path / "c.png").read_bytes())
    dataset = scan_folder(tmp_path, class_tokens="x")
    assert groups_of(dataset, near=False) == [
        ("c.png", {"copy of c.png": SAME_FILE}),
        ("d.tif", {"a.png": SAME_PIXELS, "b.bmp": SAME_PIXELS}),
    ]


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda i: jpeg(i, 30), True),
        (lambda i: i.resize((240, 160), Image.Resampling.LANCZOS), True),
        (lambda i: i.resize((120, 80), Image.Resampling.BICUBIC), True),
        (lambda i: ImageEnhance.Brightness(i).enhance(1.05), True),
        (lambda i: i.crop((2, 1, 478, 319)), True),
        (lambda i: i.filter(ImageFilter.GaussianBlur(1)), True),
        (lambda i: i.convert("L").convert("RGB"), False),
        (lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT), False),
        (lambda i: i.crop((60, 40, 480, 320)), False),
        (lambda i: Image.fromarray(np.asarray(i)[..., ::-1].copy()), False),
    ],
)
def test_near_twins(tmp_path: Path, edit: Any, found: bool) -> None:
    for seed in range(2):
        image = photo(seed)
        dataset = scanned(tmp_path / str(seed), {"a.png": image, "b.png": edit(image)})
        assert bool(find_duplicates(dataset)) == found, seed


def test_no_false_twins_among_many() -> None:
    prints = [(dhash(photo(s).convert("L")), phash(photo(s).convert("L"))) for s in range(24)]
    far = [
        max((a[0] ^ b[0]).bit_count(), (a[1] ^ b[1]).bit_count())
        for a, b in itertools.combinations(prints, 2)
    ]
    assert min(far) > 2 * MAX_DISTANCE, "a wide gap between the nearest strangers and the limit"


def test_flat_pictures_of_other_colours_are_no_twins(tmp_path: Path) -> None:
    colors = ("red", "blue", "white", "black", "#808080")
    dataset = scanned(tmp_path, {f"{c.strip('#')}.png": Image.new("RGB", (64, 64), c) for c in colors})
    assert find_duplicates(dataset) == []
    Image.new("RGB", (99, 31), "red").save(tmp_path / "red2.png")
    assert groups_of(scan_folder(tmp_path, class_tokens="x")) == [("red.png", {"red2.png": NEAR})]


def test_what_training_sees_is_compared(tmp_path: Path) -> None:
    dataset = scanned(tmp_path, {"a.png": photo(1), "b.png": photo(1)})
    a, b = dataset.records
    left = dataclasses.replace(a, crop=(0, 0, 240, 320), size=(320, 240))
    right = dataclasses.replace(b, crop=(240, 0, 480, 320), size=(320, 240))
    assert find_duplicates(dataset.replaced([left, right])) == []
    same = dataclasses.replace(right, crop=left.crop)
    assert [t.kind for g in find_duplicates(dataset.replaced([left, same])) for t in g.twins] == [SAME_FILE]
    reg = dataclasses.replace(b, is_reg=True)
    assert find_duplicates(dataset.replaced([a, reg])) == [], "it is meant to be there, too"


# ---- what is kept ----


def test_the_largest_then_the_least_compressed_then_the_sharpest_is_kept(tmp_path: Path) -> None:
    image = photo(5)
    small, large = image.resize((240, 160)), image.resize((600, 400))
    dataset = scanned(tmp_path / "1", {"a.png": small, "b.jpg": large, "c.png": image})
    assert groups_of(dataset)[0][0] == "b.jpg"
    (tmp_path / "2").mkdir()
    for name, quality in (("a.jpg", 40), ("b.jpg", 95), ("c.jpg", 80)):
        image.save(tmp_path / "2" / name, quality=quality)
    dataset = scan_folder(tmp_path / "2", class_tokens="x")
    assert groups_of(dataset) == [("b.jpg", {"a.jpg": NEAR, "c.jpg": NEAR})]
    blurred = image.filter(ImageFilter.GaussianBlur(1.5))
    dataset = scanned(tmp_path / "3", {"a.bmp": blurred, "b.bmp": image})
    assert groups_of(dataset) == [("b.bmp", {"a.bmp": NEAR})]
    dataset = scanned(tmp_path / "4", {"b10.bmp": image, "b9.bmp": image})
    assert groups_of(dataset) == [("b9.bmp", {"b10.bmp": SAME_FILE})]


def test_skipping_keeps_the_best_and_deletes_nothing(tmp_path: Path) -> None:
    dataset = scanned(tmp_path, {"a.png": photo(1), "b.bmp": photo(1), "c.png": photo(2)})
    before = sorted(p.name for p in tmp_path.iterdir())
    groups = find_duplicates(dataset)
    kept, rest = without_duplicates(dataset, groups)
    assert [r.name for r in kept.records] == ["b.bmp", "c.png"]
    assert [r.name for r in rest.records] == ["a.png"]
    assert "Left out as duplicates: 1 image." in kept.lines
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    lines = duplicate_lines(groups)
    assert "1 group of duplicates, 1 image too many (1 same pixels)" in lines[0] and "largest" in lines[0]
    assert lines[1] == "  b.bmp (480x320): a.png (480x320) same pixels"
    assert duplicate_lines([]) == ["No duplicates."]


# ---- again, cancelled, wrong ----


def test_a_second_look_decodes_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loragraft.trainer.data import duplicates

    looked: list[str] = []
    real = duplicates.print_of

    def print_of(record: Record) -> Print:
        looked.append(record.name)
        return real(record)

    monkeypatch.setattr(duplicates, "print_of", print_of)
    prints: dict[Any, Any] = {}
    dataset = scanned(tmp_path, {"a.png": photo(1), "b.png": photo(2)})
    find_duplicates(dataset, prints=prints)
    find_duplicates(dataset, prints=prints)
    assert sorted(looked) == ["a.png", "b.png"]
    photo(3).save(tmp_path / "b.png")
    find_duplicates(scan_folder(tmp_path, class_tokens="x"), prints=prints)
    assert looked[2:] == ["b.png"]


def test_cancel(tmp_path: Path) -> None:
    dataset = scanned(tmp_path, {f"{i}.png": photo(i, (60, 40)) for i in range(12)})

    def cancel(done: int, total: int) -> None:
        assert total == 12
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_duplicates(dataset, progress=cancel)


@pytest.mark.parametrize("distance", [-1, 17, True])
def test_wrong_distances(tmp_path: Path, distance: int) -> None:
    dataset = scanned(tmp_path, {"a.png": photo(1, (60, 40))})
    with Refusal("LG-CFG-003", "distance", "0 to 16"):
        find_duplicates(dataset, distance=distance)
    assert find_duplicates(dataset.replaced([])) == []


def test_the_sheet_shows_groups(tmp_path: Path) -> None:
    images = {f"{i}{s}": photo(i, (90, 60)) for i in range(14) for s in (".png", ".bmp")}
    groups = find_duplicates(scanned(tmp_path, images))
    assert len(groups) == 14
    sheet = duplicate_sheet(groups)
    assert sheet.size == (2 * 168 + 8, 12 * 186 + 8)
    assert len(set(np.asarray(sheet).reshape(-1, 3)[::7].max(axis=1).tolist())) > 50, (
        "there are pictures on it"
    )
    assert duplicate_sheet([]).size == (2 * 168 + 8, 186 + 8)


# ---- any hashes ----

hashes = st.builds(
    Print,
    dhash=st.sampled_from([0, 1, 0b111, 0b11111, 2**64 - 1, 2**63]),
    phash=st.sampled_from([0, 0b1111, 0b11111, 2**64 - 1]),
    thumb=st.sampled_from([bytes(192), bytes([10]) * 192, bytes([200]) * 192]),
    pixels=st.sampled_from(["a", "b", "c", "d"]),
    sharpness=st.floats(0, 9),
    num_bytes=st.integers(1, 4),
)


@given(st.lists(hashes, max_size=12), st.booleans(), st.integers(0, 16))
@settings(max_examples=cases(2000), deadline=None)
def test_every_picture_is_in_at_most_one_group_and_near_to_its_best(
    prints: list[Print], near: bool, distance: int
) -> None:
    records = [Record(Path(f"{i}"), f"{i}", (i % 3 + 1, 2), "", "", 1, "") for i in range(len(prints))]
    groups = _grouped(list(zip(records, prints, strict=True)), near, distance)
    names = [r.name for g in groups for r in (g.kept, *(t.record for t in g.twins))]
    assert len(names) == len(set(names))
    kept = {r.name for r in records} - {t.record.name for g in groups for t in g.twins}

    def same(a: Print, b: Print) -> bool:
        bits = max((a.dhash ^ b.dhash).bit_count(), (a.phash ^ b.phash).bit_count())
        colors = np.abs(
            np.frombuffer(a.thumb, np.uint8).astype(int) - np.frombuffer(b.thumb, np.uint8)
        ).mean()
        return a.pixels == b.pixels or (near and bits <= distance and bool(colors <= 12))

    for group in groups:
        best = prints[int(group.kept.name)]
        for twin in group.twins:
            assert same(best, prints[int(twin.record.name)])
            assert group.kept.size >= twin.record.size
    for a, b in itertools.combinations(sorted(kept, key=int), 2):
        assert not same(prints[int(a)], prints[int(b)]), "two that are kept are never the same"


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8))
def test_bits_are_counted(values: list[int]) -> None:
    assert _bits(np.array(values, dtype=np.uint64)).tolist() == [value.bit_count() for value in values]
