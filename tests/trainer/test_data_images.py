"""Images: every format and orientation, nothing dangerous, and the pixels that training sees."""

from __future__ import annotations

import hashlib
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, features

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data import image_files
from loragraft.trainer.data.buckets import select_bucket
from loragraft.trainer.data.images import (
    UnreadableImageError,
    inspect,
    is_image,
    load_pixels,
    read_size_checked,
    shown,
)
from loragraft.trainer.data.records import Record
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, picture


def record_of(path: Path) -> Record:
    facts = inspect(path)
    return Record(path, path.name, facts.size, "", "", 1, facts.content_hash)


def pixels_of(path: Path, bucket: tuple[int, int], resized: tuple[int, int] | None = None) -> torch.Tensor:
    return load_pixels(record_of(path), bucket, resized)


def as_tensor(image: Image.Image) -> torch.Tensor:
    array = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 255 * 2 - 1


# ---- formats ----


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_formats_are_told_by_content_not_by_suffix(tmp_path: Path, format: str) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for suffix in (".png", ".dat", ""):
        path = tmp_path / f"x{suffix}"
        picture((48, 32)).save(path, format=format)
        assert is_image(path)
        assert read_size_checked(path) == (32, 48)
        assert pixels_of(path, (48, 32)).shape == (3, 32, 48)


@pytest.mark.parametrize("format", ["PPM", "TGA", "PCX", "ICO", "JPEG2000", "EPS", "PDF"])
def test_other_decoders_are_never_reached(tmp_path: Path, format: str) -> None:
    path = tmp_path / "x.png"
    picture((64, 64)).save(path, format=format)
    assert not is_image(path)
    with Refusal("LG-DATA-003", "x.png", "not an image"):
        read_size_checked(path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.tif"
    source = picture((40, 40)).convert(mode)
    source.save(path)
    assert torch.equal(pixels_of(path, (40, 40)), as_tensor(source))


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(values).save(path)
    pixels = pixels_of(path, (32, 32))
    assert pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(pixels[0], torch.from_numpy((values >> 8).astype(np.float32)) / 255 * 2 - 1)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.tif"
    Image.new(mode, (8, 8), 1).save(path)
    with pytest.raises(UnreadableImageError, match="8-bit PNG"):
        inspect(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_lie_on_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.png"
    image = Image.new(mode, (32, 32), (255, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.paste(Image.new(mode, (16, 32), (0, 0, 255, 255) if mode == "RGBA" else (0, 255)), (0, 0))
    image.save(path)
    assert inspect(path).has_alpha
    pixels = pixels_of(path, (64, 64))  # enlarged: hidden red must not bleed in
    assert torch.all(pixels[:, :, 40:] == 1)
    assert torch.all(pixels[0, :, :24] == -1)
    edge = pixels[:, 0, 24:40]
    assert torch.all(edge[0] == edge[1]), "no red fringe"


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_counts_as_alpha(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.png"
    image = Image.new("RGB", (16, 16), (10, 10, 10))
    image.paste((200, 200, 200), (0, 0, 8, 16))
    image = image.convert(mode) if mode != "P" else image.quantize(4)
    key = image.getpixel((12, 0))
    image.save(path, transparency=key)
    assert inspect(path).has_alpha
    assert torch.all(pixels_of(path, (16, 16))[:, :, 8:] == 1)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(tmp_path: Path, format: str) -> None:
    path = tmp_path / "x"
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(path, format=format, save_all=True, append_images=frames[1:], **options)
    assert inspect(path).is_animated
    assert torch.equal(pixels_of(path, (32, 32)), as_tensor(frames[0]))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path: Path, format: str, orientation: int) -> None:
    path = tmp_path / "x"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    picture((64, 32)).save(path, format=format, exif=exif, **options)
    size = read_size_checked(path)
    assert size == ((32, 64) if orientation < 5 else (64, 32))
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        assert upright.size == (size[1], size[0])
        assert torch.equal(pixels_of(path, (size[1], size[0])), as_tensor(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    picture((64, 32)).save(path, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00\x01")
    assert read_size_checked(path) == (32, 64)


# ---- the pixels of a bucket ----


def naive(path: Path, bucket: tuple[int, int], resized: tuple[int, int]) -> torch.Tensor:
    """Resize, then crop at (excess // 2): the reference's two steps."""
    with Image.open(path) as image:
        large = image.convert("RGB").resize(resized, Image.Resampling.LANCZOS)
    left, top = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
    return as_tensor(large.crop((left, top, left + bucket[0], top + bucket[1])))


@pytest.mark.parametrize("no_upscale", [False, True])
@pytest.mark.parametrize(
    "size", [(64, 64), (100, 61), (61, 100), (333, 128), (97, 99), (200, 65), (129, 127)]
)
def test_cut_equals_resize_then_centre_crop(tmp_path: Path, size: tuple[int, int], no_upscale: bool) -> None:
    path = tmp_path / "x.png"
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    config = DatasetConfig(
        resolution=128,
        min_bucket_reso=64,
        max_bucket_reso=256,
        bucket_reso_steps=32,
        bucket_no_upscale=no_upscale,
    )
    choice = select_bucket(size, config)
    pixels = pixels_of(path, choice.bucket, choice.resized)
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    expected = naive(path, choice.bucket, choice.resized)
    assert (pixels - expected).abs().max() <= 2 / 255 + 1e-6  # one grey level, from Pillow's rounding
    assert (pixels != expected).float().mean() < 0.02
    if not no_upscale:
        assert torch.equal(pixels, pixels_of(path, choice.bucket)), "covering is the default"


def test_an_uncut_image_is_untouched(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    source = picture((70, 50))
    source.save(path)
    assert torch.equal(pixels_of(path, (70, 50)), as_tensor(source))
    assert torch.equal(pixels_of(path, (64, 32), (70, 50)), as_tensor(source.crop((3, 9, 67, 41))))


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (1, 1), (3, 2)])
def test_extreme_shapes(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", size, (255, 0, 0)).save(path)
    choice = select_bucket(size, DatasetConfig())
    pixels = pixels_of(path, choice.bucket, choice.resized)
    assert pixels.shape == (3, choice.bucket[1], choice.bucket[0])
    assert torch.all(pixels[0] == 1) and torch.all(pixels[1:] == -1)


def test_an_image_that_changed_after_the_scan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    picture(shade=1).save(path)
    record = record_of(path)
    assert record.content_hash == hashlib.sha256(path.read_bytes()).hexdigest()
    picture(shade=2).save(path)
    with Refusal("LG-DATA-009", "x.png", "another one"):
        load_pixels(record, (64, 64))
    path.unlink()
    with Refusal("LG-DATA-009", "x.png", "No such file"):
        load_pixels(record, (64, 64))


# ---- nothing dangerous ----


def png_header(width: int, height: int) -> bytes:
    """Return a small PNG file that claims to be of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (9400, 9400), (20000, 20000), (2**31 - 1, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png_header(width, height))
    with pytest.raises(UnreadableImageError, match="megapixels"):
        inspect(path)


def test_what_a_refused_file_is(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for data, reason in [
        (b"", "0 bytes"),
        (b"  <!DOCTYPE html><html>", "an HTML page"),
        (b"<svg xmlns='x'>", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "HEIC"),
        (b"hello", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
    ]:
        path.write_bytes(data)
        assert not is_image(path)
        with pytest.raises(UnreadableImageError, match=reason):
            inspect(path)
    with pytest.raises(UnreadableImageError, match="not a regular file"):
        inspect(tmp_path)
    with pytest.raises(UnreadableImageError, match="No such file"):
        inspect(tmp_path / "gone")


def test_a_giant_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    picture().save(path)
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 100)
    with pytest.raises(UnreadableImageError, match="MiB"):
        inspect(path)


def test_no_setting_of_the_process_is_changed(tmp_path: Path) -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, Image.WARN_POSSIBLE_FORMATS)
    path = tmp_path / "x.png"
    picture().save(path)
    pixels_of(path, (64, 64))
    path.write_bytes(png_header(20000, 20000))
    with pytest.raises(UnreadableImageError):
        inspect(path)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, Image.WARN_POSSIBLE_FORMATS)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_never_anything_else(tmp_path: Path) -> None:
    rng = random.Random("damage")
    samples = [(Path(__file__).parent / "files" / "turned.heic").read_bytes()]
    for format in (
        "PNG",
        "JPEG",
        "WEBP",
        "BMP",
        "TIFF",
        "GIF",
        *(["AVIF"] if features.check("avif") else []),
    ):
        path = tmp_path / format
        picture((40, 30)).save(path, format=format)
        samples.append(path.read_bytes())
    path = tmp_path / "x.png"
    truncated = refused = 0
    for number in range(cases(2000)):
        data = bytearray(samples[number % len(samples)])
        if cut := number % 3 == 0:
            del data[rng.randrange(len(data) // 2) :]
        else:
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        truncated += cut
        try:
            facts = inspect(path)
        except UnreadableImageError as error:
            refused += cut
            assert str(error) and "\n" not in str(error)
            continue
        pixels = load_pixels(Record(path, "x.png", facts.size, "", "", 1, facts.content_hash), (64, 64))
        assert torch.isfinite(pixels).all()
    assert refused == truncated, "half a file is never taken for a whole one"


def test_names_in_messages_are_one_clean_line() -> None:
    assert shown("a\nb\x1b[31m\u202e\udcff") == "a\\nb\\x1b[31m\\u202e\\udcff"
    assert shown("\u9ed2\u732b \U0001f408") == "\u9ed2\u732b \U0001f408"
    assert len(shown("x" * 10_000)) <= 203
