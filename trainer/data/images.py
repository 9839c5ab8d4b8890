"""Open image files safely, and turn one into the pixels of its bucket.

The format is told by content, never by the file's suffix. Limits are our own and per call: Pillow's
process-wide settings belong to the host and are left alone.
"""

from __future__ import annotations

import functools
import hashlib
import io
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from PIL import ExifTags, Image

from ..errors import LoraGraftError
from .buckets import cover

if TYPE_CHECKING:
    from .records import Record

Size = tuple[int, int]

# The decoders that photos and drawings need; the others carry nearly all of Pillow's security reports.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
ANIMATED_FORMATS = ("PNG", "WEBP", "GIF", "TIFF", "AVIF")
MAX_PIXELS = 64_000_000
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

OPAQUE_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
ALPHA_MODES = ("LA", "PA", "RGBA")
KEYED_MODES = ("1", "L", "P", "RGB")  # may name one colour that counts as transparent
WIDE_GRAY_MODES = ("I", "I;16", "I;16L", "I;16B")

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
)


class UnreadableImageError(ValueError):
    """Why one file cannot be used; callers turn it into a LoraGraftError that lists all such files."""


class NotAnImageError(UnreadableImageError):
    """The content begins like no format that is read here."""


@dataclass(frozen=True)
class ImageFacts:
    """What a full decode told; ``size`` is (height, width) after EXIF orientation."""

    size: Size
    content_hash: str
    has_alpha: bool
    is_animated: bool


def inspect(path: Path) -> ImageFacts:
    """Decode the whole image once and forget its pixels.

    Raises UnreadableImageError with the reason.
    """
    digest = hashlib.sha256()
    try:
        _check_file(path)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
            file.seek(0)
            with _decoded(file) as image:
                _check_mode(image)
                width, height = image.size
                if _orientation(image) in TURNED_BY_90:
                    width, height = height, width
                # Asking for animation moves to the next frame, so it comes last.
                return ImageFacts((height, width), digest.hexdigest(), _has_alpha(image), _is_animated(image))
    except OSError as error:
        raise UnreadableImageError(_os_reason(error)) from error


def is_image(path: Path) -> bool:
    """Say whether the content begins like an image, whatever the file is called.

    Raises UnreadableImageError when the file cannot be opened at all.
    """
    try:
        _check_file(path)
        with path.open("rb") as file:
            _open(file).close()
    except NotAnImageError:
        return False
    except OSError as error:
        raise UnreadableImageError(_os_reason(error)) from error
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


def load_pixels(record: Record, bucket: Size, resized: Size | None = None) -> torch.Tensor:
    """Return the record's image as its bucket sees it: resized, then cut from the centre.

    ``bucket`` and ``resized`` are (width, height); without ``resized`` the image is scaled to cover
    the bucket. Transparent parts lie on white. Result: (3, H, W) float32 in [-1, 1].
    Raises LG-DATA-009 when the file is gone or is not the one that was scanned.
    """
    try:
        data = record.path.read_bytes()
    except OSError as error:
        raise _changed(record, _os_reason(error)) from error
    if hashlib.sha256(data).hexdigest() != record.content_hash:
        raise _changed(record, "its content is another one")
    try:
        with _decoded(io.BytesIO(data)) as image:
            rgb = _cut(_plain(_upright(image)), bucket, resized)
    except UnreadableImageError as error:
        raise _changed(record, str(error)) from error
    pixels = torch.from_numpy(np.array(rgb, dtype=np.uint8))  # (H, W, 3)
    return pixels.permute(2, 0, 1).float().div_(255).mul_(2).sub_(1).contiguous()


def _cut(image: Image.Image, bucket: Size, resized: Size | None) -> Image.Image:
    """Resize and crop in one go, so that a 1 x 60000 image never becomes a giant on the way."""
    whole = resized or cover(image.size, bucket)
    box = []
    for side, scaled, wanted in zip(image.size, whole, bucket, strict=True):
        start = (scaled - wanted) // 2
        box.append((start * side / scaled, (start + wanted) * side / scaled))
    (left, right), (top, bottom) = box
    # Lanczos for both directions: Pillow widens the kernel when it shrinks, so nothing aliases.
    small = image.resize(bucket, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    if small.mode == "RGBA":
        white = Image.new("RGBA", small.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, small).convert("RGB")
    return small


def _plain(image: Image.Image) -> Image.Image:
    """Return the image in RGB, or in RGBA where parts are transparent."""
    if _has_alpha(image):
        return image if image.mode == "RGBA" else image.convert("RGBA")
    if image.mode in WIDE_GRAY_MODES:
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    turn = UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation still to be applied; TIFF has applied its own while loading."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF has many faces; viewers ignore it, and so do we
        return 1
    return value if isinstance(value, int) else 1


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ALPHA_MODES or (image.mode in KEYED_MODES and "transparency" in image.info)


def _is_animated(image: Image.Image) -> bool:
    try:
        return image.format in ANIMATED_FORMATS and bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged later frame does not matter: only the first one is used
        return True


def _check_mode(image: Image.Image) -> None:
    if image.mode not in OPAQUE_MODES + ALPHA_MODES + WIDE_GRAY_MODES:
        raise UnreadableImageError(f"its pixel format {image.mode} is not supported; save it as 8-bit PNG")
    if image.mode == "I" and image.format != "PNG":  # older Pillows open 16-bit PNG as I
        raise UnreadableImageError("32-bit grey values are not supported; save it as 8-bit PNG")


def _check_file(path: Path) -> None:
    info = path.stat()
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


def _open(file: IO[bytes]) -> Image.Image:
    """Read the header only; the size limit is checked before anything is decoded."""
    try:
        image = Image.open(file, formats=_formats())
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"more than {MAX_PIXELS // 10**6} megapixels") from error
    except Exception as error:  # readers raise whatever they meet: OSError, ValueError, struct.error, ...
        file.seek(0)
        raise NotAnImageError(_what_it_is(file.read(64))) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise UnreadableImageError(
            f"{width}x{height}, {width * height / 10**6:.0f} megapixels; the limit is {MAX_PIXELS // 10**6}"
        )
    return image


def _decoded(file: IO[bytes]) -> Image.Image:
    image = _open(file)
    try:
        image.load()
    except Exception as error:  # see _open
        image.close()
        raise UnreadableImageError(_decode_reason(error)) from error
    return image


def _what_it_is(start: bytes) -> str:
    head = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for prefix, name in LOOKS_LIKE:
        if head.startswith(prefix):
            return f"not an image: {name}"
    if head[4:8] == b"ftyp":
        return "HEIC, AVIF or video that cannot be read here; save it as PNG or JPEG"
    return "not an image, or its beginning is damaged"


def _decode_reason(error: Exception) -> str:
    text = shown(" ".join(str(error).split()), 80)
    return f"truncated or damaged: {text}" if text else "truncated or damaged"


def _os_reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _changed(record: Record, reason: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-009",
        "An image changed after its folder was scanned.",
        where=f"{shown(record.name)} ({reason})",
        why="the plan, the captions and the cache belong to the image as it was.",
        fix="queue again, so that the folder is scanned anew",
    )


def shown(text: object, limit: int = 200) -> str:
    """Return a name fit for one line of a message: control characters escaped, a long middle cut."""
    safe = "".join(c if c.isprintable() or c == "\u3000" else ascii(c)[1:-1] for c in str(text))
    return safe if len(safe) <= limit else f"{safe[: limit // 2]}...{safe[-limit // 2 :]}"
