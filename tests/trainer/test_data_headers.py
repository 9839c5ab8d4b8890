"""The quick look at a header tells what a full decode tells, or leaves it to the library."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, features

from loragraft.trainer.data.bytes_at import BytesHeld
from loragraft.trainer.data.headers import Header, read_header
from loragraft.trainer.data.images import UnreadableImageError, glance, inspect
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import picture

FILES = Path(__file__).parent / "files"
QUICK = ("JPEG", "PNG", "WEBP")


def facts(path: Path) -> tuple[object, ...]:
    """Return what a full decode tells, after checking that the glance tells the same."""
    full, quick = inspect(path), glance(path)
    found = full.size, full.has_alpha, full.is_animated
    assert (quick.size, quick.has_alpha, quick.is_animated) == found
    assert quick.content_hash == "" and len(full.content_hash) == 64
    return found


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_orientation(tmp_path: Path, format: str, orientation: int) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / "x"
    exif = Image.Exif()
    exif[0x010E] = "a description, so that the orientation is not the only entry"
    exif[0x0112] = orientation
    options = {} if format in ("GIF", "BMP") else {"exif": exif}
    picture((64, 32)).save(path, format=format, **options)
    turned = orientation > 4 and bool(options)
    assert facts(path)[0] == ((64, 32) if turned else (32, 64))
    if format in QUICK:
        header = read_header(BytesHeld(path.read_bytes()))
        assert header == Header(64, 32, orientation), "read without the library"


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "GIF", "AVIF"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA"])
def test_transparency(tmp_path: Path, format: str, mode: str) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / "x"
    image = picture((33, 31)).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize((33, 31)))
    try:
        image.save(path, format=format)
    except OSError:
        pytest.skip(f"{format} has no {mode}")
    facts(path)
    if mode == "P" and format in ("PNG", "GIF"):
        image.save(path, format=format, transparency=0)
        assert facts(path)[1]


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "TIFF", "AVIF"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_animation(tmp_path: Path, format: str, frames: int) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / "x"
    pictures = [Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")[:frames]]
    pictures[0].save(path, format=format, save_all=True, append_images=pictures[1:])
    assert facts(path)[2] == (frames > 1)


def test_sixteen_bit_progressive_and_lossless(tmp_path: Path) -> None:
    path = tmp_path / "x"
    Image.new("I;16", (20, 10)).save(path, format="PNG")
    assert facts(path) == ((10, 20), False, False)
    for options in ({"progressive": True}, {"quality": 5}, {"comment": b"x" * 9000}):
        picture((50, 20)).save(path, format="JPEG", **options)
        assert facts(path)[0] == (20, 50)
    picture((50, 20)).convert("L").save(path, format="JPEG")
    assert facts(path)[0] == (20, 50)
    picture((50, 20)).convert("CMYK").save(path, format="JPEG")
    assert facts(path)[0] == (20, 50)
    picture((50, 20)).save(path, format="WEBP", lossless=True)
    assert facts(path)[0] == (20, 50)


def test_a_thumbnail_in_exif_does_not_count(tmp_path: Path) -> None:
    path, small = tmp_path / "x.jpg", io.BytesIO()
    picture((16, 12)).save(small, "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 30_000 + small.getvalue().decode("latin-1")
    picture((200, 100)).save(path, exif=exif)
    assert facts(path)[0] == (200, 100)


def test_orientation_in_other_places(tmp_path: Path) -> None:
    xmp = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/>
    </rdf:RDF></x:xmpmeta>"""
    for format in ("JPEG", "WEBP"):
        picture((64, 32)).save(tmp_path / "x", format=format, xmp=xmp)
        facts(tmp_path / "x")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    picture((64, 32)).save(tmp_path / "x", format="PNG", pnginfo=info)
    facts(tmp_path / "x")
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    picture((64, 32)).save(data, "PNG", exif=exif)
    head, tail = data.getvalue()[:33], data.getvalue()[33:]
    size = 12 + int.from_bytes(tail[:4], "big")
    assert tail[4:8] == b"eXIf"
    late = head + tail[size:-12] + tail[:size] + tail[-12:]  # after the pixels, where some tools put it
    (tmp_path / "x").write_bytes(late)
    assert facts(tmp_path / "x")[0] == (64, 32)


def test_heic() -> None:
    pytest.importorskip("pi_heif")
    assert facts(FILES / "picture.heic") == ((48, 64), False, False)
    assert facts(FILES / "turned.heic") == ((64, 48), False, False)


def test_the_pixel_cap_holds_for_headers(tmp_path: Path) -> None:
    picture((100, 100)).save(tmp_path / "x.png")
    with pytest.raises(UnreadableImageError, match=r"100x100, 0 megapixels; the limit is 0\.009"):
        glance(tmp_path / "x.png", max_pixels=9_000)
    assert glance(tmp_path / "x.png", max_pixels=10_000).size == (100, 100)


@given(
    st.sampled_from(QUICK),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(["L", "RGB", "RGBA"]),
    st.integers(0, 8),
)
@settings(max_examples=cases(500), deadline=None)
def test_any_picture(format: str, width: int, height: int, mode: str, orientation: int) -> None:
    image = Image.new("RGB" if format == "JPEG" and mode == "RGBA" else mode, (width, height))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    data = io.BytesIO()
    image.save(data, format, exif=exif)
    header = read_header(BytesHeld(data.getvalue()))
    assert header is not None
    assert (header.width, header.height) == (width, height)
    assert header.orientation == (orientation or 1)


SAMPLES: dict[str, bytes] = {}


def sample(format: str) -> bytes:
    if format not in SAMPLES:
        data, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 3
        picture((40, 30)).save(data, format, exif=exif)
        SAMPLES[format] = data.getvalue()
    return SAMPLES[format]


@given(st.sampled_from(QUICK), st.data())
@settings(max_examples=cases(3000), deadline=None)
def test_damaged_headers_are_read_or_left(format: str, data: st.DataObject) -> None:
    content = bytearray(sample(format))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    header = read_header(BytesHeld(bytes(content)))
    assert header is None or (header.width > 0 and header.height > 0 and 1 <= header.orientation <= 8)
