"""Open image files safely, and tell what they are.

The format is told by content, never by the file's suffix. Limits are our own and per call: Pillow's
process-wide settings belong to the host and are left alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import stat
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image

from ..errors import LoraGraftError
from .budget import PixelBudget
from .bytes_at import opened
from .color import MODES, has_alpha, profile_note
from .headers import read_header

Size = tuple[int, int]

# The decoders that photos and drawings need; the others carry nearly all of Pillow's security reports.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
ANIMATED_FORMATS = ("PNG", "WEBP", "GIF", "TIFF", "AVIF")
MAX_PIXELS = 64_000_000
HARD_MAX_PIXELS = 178_000_000  # where Pillow itself refuses; no setting goes beyond
MAX_FILE_BYTES = 512 * 2**20
CHUNK_BYTES = 2**20

# EXIF orientation -> what brings the picture upright (EXIF 2.3, tag 0x0112); 1 is upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED_BY_90 = (5, 6, 7, 8)

# First bytes -> what a file is that calls itself an image; only for the wording of the refusal.
LOOKS_LIKE = (
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "SVG, a drawing without pixels"),
    (b"<?xml", "XML text"),
    (b"%pdf", "a PDF"),
    (b"8bps", "a Photoshop file"),
    (b"pk\x03\x04", "a zip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the picture itself"),
    (b"\xff\x0a", "JPEG XL, which is not read; save it as PNG or JPEG"),
    (b"\x00\x00\x00\x0cjxl ", "JPEG XL, which is not read; save it as PNG or JPEG"),
)
# Brands of an ISO media file (bytes 8 to 12, after "ftyp") that are pictures in HEVC.
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
HEIF_PACKAGES = ("pi_heif", "pillow_heif")  # the same reader; the second one can write, too
NEEDS_HEIF = "HEIC needs the package pi-heif: pip install pi-heif"
NEEDS_AVIF = "AVIF needs Pillow 11.3 or newer: pip install --upgrade Pillow"


class UnreadableImageError(ValueError):
    """Why one file cannot be used; callers turn it into a LoraGraftError that lists all such files."""


class NotAnImageError(UnreadableImageError):
    """The content begins like no format that is read here."""


@dataclass(frozen=True)
class ImageFacts:
    """What a look at a file told; ``size`` is (height, width) after EXIF orientation.

    ``content_hash`` is the sha256 of its bytes, "" after a look at the header alone. ``profile`` names the
    colour profile that is converted to sRGB, or says why one is left aside.
    """

    size: Size
    content_hash: str
    has_alpha: bool
    is_animated: bool
    profile: str = ""


def inspect(
    path: Path | str, *, max_pixels: int = MAX_PIXELS, budget: PixelBudget | None = None
) -> ImageFacts:
    """Hash the file, decode the whole image once and forget its pixels; ``budget`` waits for room for them.

    Raises UnreadableImageError with the reason.
    """
    digest = hashlib.sha256()
    try:
        _check_file(path)
        with open(path, "rb") as file:  # noqa: PTH123
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
            file.seek(0)
            with open_image(file, max_pixels) as image:
                pixels = image.width * image.height
                with budget.taken(pixels) if budget else nullcontext():
                    _load(image)
                    return _facts(image, digest.hexdigest())
    except OSError as error:
        raise UnreadableImageError(os_reason(error)) from error


def glance(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Read the image's header only: quick, and no proof that the rest of the file is whole.

    Raises UnreadableImageError with the reason.
    """
    try:
        with opened(path) as raw:
            _check_status(raw.status())
            header = read_header(raw)
        if header is not None:
            _check_size((header.width, header.height), max_pixels)
            turned = header.orientation in TURNED_BY_90
            size = (header.width, header.height) if turned else (header.height, header.width)
            return ImageFacts(size, "", header.has_alpha, header.is_animated)
        with open(path, "rb") as file, open_image(file, max_pixels) as image:  # noqa: PTH123
            return _facts(image, "")
    except OSError as error:
        raise UnreadableImageError(os_reason(error)) from error


def is_image(path: Path | str) -> bool:
    """Say whether the content begins like an image, whatever the file is called.

    Raises UnreadableImageError when the file cannot be opened at all.
    """
    try:
        _check_file(path)
        with open(path, "rb") as file:  # noqa: PTH123
            open_image(file).close()
    except NotAnImageError:
        return False
    except OSError as error:
        raise UnreadableImageError(os_reason(error)) from error
    return True


def read_size_checked(path: Path) -> Size:
    """Return (height, width) after EXIF orientation, having decoded the whole file; raises LG-DATA-003."""
    try:
        return inspect(path).size
    except UnreadableImageError as error:
        raise LoraGraftError(
            "LG-DATA-003",
            "An image cannot be read.",
            where=f"{shown(path.name)} ({error})",
            why="training on it would stop the run at a random later step.",
            fix="delete or replace the file",
        ) from error


# ---- opening ----


def _facts(image: Image.Image, content_hash: str) -> ImageFacts:
    check_mode(image)
    width, height = image.size
    if _needs_turn(image, decoded=bool(content_hash)):
        width, height = height, width
    profile = profile_note(image) if content_hash else ""
    # Asking for animation moves to the next frame, so it comes last.
    return ImageFacts((height, width), content_hash, has_alpha(image), is_animated(image), profile)


def upright(image: Image.Image) -> Image.Image:
    """Return the image as its EXIF orientation says it is to be seen."""
    turn = UPRIGHT.get(orientation_of(image))
    return image if turn is None else image.transpose(turn)


def _needs_turn(image: Image.Image, *, decoded: bool) -> bool:
    """Say whether height and width change places; TIFF has its upright size from the beginning."""
    if image.format == "TIFF" and not decoded:
        return False
    return orientation_of(image) in TURNED_BY_90


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation still to be applied; TIFF has applied its own while loading."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF has many faces; viewers ignore it, and so do we
        return 1
    return value if isinstance(value, int) else 1


def is_animated(image: Image.Image) -> bool:
    """Say whether the image has several frames or pages; asking moves to another one."""
    try:
        return image.format in ANIMATED_FORMATS and bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged later frame does not matter: only the first one is used
        return True


def check_mode(image: Image.Image) -> None:
    """Raise UnreadableImageError for pixels of a kind whose range is not known."""
    if image.mode not in MODES:
        raise UnreadableImageError(f"its pixel format {image.mode} is not supported; save it as 8-bit PNG")
    if image.mode == "I" and image.format != "PNG":  # older Pillows open 16-bit PNG as I
        raise UnreadableImageError("32-bit grey values are not supported; save it as 8-bit PNG")


def _check_file(path: Path | str) -> None:
    _check_status(os.stat(path))  # noqa: PTH116 (a text, which a scan need not parse)


def _check_status(info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
        raise UnreadableImageError("not a regular file")
    if info.st_size == 0:
        raise NotAnImageError("0 bytes")
    if info.st_size > MAX_FILE_BYTES:
        raise UnreadableImageError(
            f"{info.st_size / 2**20:.0f} MiB, the limit is {MAX_FILE_BYTES // 2**20} MiB"
        )


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(file: IO[bytes], max_pixels: int = HARD_MAX_PIXELS) -> Image.Image:
    """Read the header only; the size limit is checked before anything is decoded."""
    try:
        image: Image.Image = Image.open(file, formats=_formats())
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"more than {max_pixels / 10**6:g} megapixels") from error
    except Exception as error:  # readers raise whatever they meet: OSError, ValueError, struct.error, ...
        file.seek(0)
        start = file.read(64)
        file.seek(0)
        if start[4:8] != b"ftyp" or start[8:12] not in HEIC_BRANDS:
            raise NotAnImageError(_what_it_is(start)) from error
        image = _open_heic(file)
    try:
        _check_size(image.size, max_pixels)
    except UnreadableImageError:
        image.close()
        raise
    return image


def _check_size(size: Size, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise UnreadableImageError(
            f"{width}x{height}, {width * height / 10**6:.0f} megapixels; the limit is {max_pixels / 10**6:g}"
        )


def _open_heic(file: IO[bytes]) -> Image.Image:
    """Open a HEIC picture with the package that is there, without registering it in the host's Pillow."""
    for package in HEIF_PACKAGES:
        try:
            reader = importlib.import_module(f"{package}.as_plugin").HeifImageFile
            break
        except ImportError:
            continue
    else:
        raise UnreadableImageError(NEEDS_HEIF)
    try:
        image: Image.Image = reader(file)
    except Exception as error:  # see _open
        raise NotAnImageError("HEIC or AVIF that is damaged, or of a kind that is not read") from error
    return image


def decoded(file: IO[bytes]) -> Image.Image:
    """Open an image and decode it whole; raises UnreadableImageError."""
    image = open_image(file)
    try:
        _load(image)
    except UnreadableImageError:
        image.close()
        raise
    return image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # see _open
        raise UnreadableImageError(_decode_reason(error)) from error


def _what_it_is(start: bytes) -> str:
    head = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for prefix, name in LOOKS_LIKE:
        if head.startswith(prefix) or start.startswith(prefix):
            return f"not an image: {name}"
    if start[4:8] == b"ftyp":
        if start[8:12] in (b"avif", b"avis") and "AVIF" not in _formats():
            return NEEDS_AVIF
        return "not an image: a video, or a kind of HEIC or AVIF that is not read; save it as PNG or JPEG"
    return "not an image, or its beginning is damaged"


def _decode_reason(error: Exception) -> str:
    text = shown(" ".join(str(error).split()), 80)
    return f"truncated or damaged: {text}" if text else "truncated or damaged"


def os_reason(error: OSError) -> str:
    """Return why the system refused, in its words."""
    return error.strerror or type(error).__name__


def shown(text: object, limit: int = 200) -> str:
    """Return a name fit for one line of a message: control characters escaped, a long middle cut."""
    safe = "".join(c if c.isprintable() or c == "\u3000" else ascii(c)[1:-1] for c in str(text))
    return safe if len(safe) <= limit else f"{safe[: limit // 2]}...{safe[-limit // 2 :]}"
