"""Turn a record into the pixels and the mask that training sees: its picture with its edits.

Every picture goes through here, and no other file decodes one for training.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..errors import LoraGraftError
from .buckets import cover
from .color import has_alpha, on_background, to_srgb
from .image_files import (
    HARD_MAX_PIXELS,
    MAX_PIXELS,
    ImageFacts,
    NotAnImageError,
    UnreadableImageError,
    check_mode,
    decoded,
    glance,
    inspect,
    is_animated,
    is_image,
    open_image,
    orientation_of,
    os_reason,
    read_size_checked,
    shown,
    upright,
)

if TYPE_CHECKING:
    from .records import Record

__all__ = [
    "HARD_MAX_PIXELS",
    "MAX_PIXELS",
    "ImageFacts",
    "NotAnImageError",
    "UnreadableImageError",
    "glance",
    "inspect",
    "is_image",
    "is_plain",
    "load_mask",
    "load_pixels",
    "load_upright",
    "mask_key",
    "pixels_key",
    "read_checked",
    "read_size_checked",
    "shown",
    "upright_mask",
]

Size = tuple[int, int]
Box = tuple[float, float, float, float]


def load_pixels(record: Record, bucket: Size, resized: Size | None = None) -> torch.Tensor:
    """Return the record's image as its bucket sees it: cropped, resized, then cut from the centre.

    ``bucket`` and ``resized`` are (width, height); without ``resized`` the image is scaled to cover
    the bucket. Transparent parts lie on the record's background. Result: (3, H, W) float32 in [-1, 1].
    Raises LG-DATA-009 when the file is gone or is not the one that was scanned.
    """
    whole = _whole(record)
    # Lanczos for both directions: Pillow widens the kernel when it shrinks, so nothing aliases.
    small = whole.resize(bucket, Image.Resampling.LANCZOS, box=_cut_box(whole.size, bucket, resized))
    pixels = torch.from_numpy(np.array(on_background(small, record.background), dtype=np.uint8))  # (H, W, 3)
    return pixels.permute(2, 0, 1).float().div_(255).mul_(2).sub_(1).contiguous()


def load_mask(record: Record, bucket: Size, resized: Size | None = None) -> torch.Tensor:
    """Return where to learn, cut as `load_pixels` cuts the picture: (H, W) float32, 1 is fully, 0 not at all.

    All ones for a record without a mask. Raises LG-DATA-009 as `load_pixels` does.
    """
    if record.mask is None:
        return torch.ones(bucket[1], bucket[0])
    whole = upright_mask(record)
    small = whole.resize(bucket, Image.Resampling.BILINEAR, box=_cut_box(whole.size, bucket, resized))
    return torch.from_numpy(np.array(small, dtype=np.float32)).div_(255)


def load_upright(record: Record, data: bytes | None = None) -> Image.Image:
    """Return the record's whole picture as training sees it before resizing: upright, cropped, in RGB.

    ``data`` are the file's bytes where `read_checked` has read them already.
    Raises LG-DATA-009 when the file is gone or is not the one that was scanned.
    """
    return on_background(_whole(record, data), record.background)


def read_checked(record: Record) -> bytes:
    """Return the bytes of the record's file; raises LG-DATA-009 where they are not those scanned."""
    return _read(record, record.path, record.content_hash)


def is_plain(data: bytes, format: str) -> bool:
    """Say whether a file's bytes are in this format ("png", "jpeg", "webp") and need no change for training.

    Plain: upright, one frame, 8-bit grey or RGB without transparency, in sRGB.
    """
    try:
        with open_image(io.BytesIO(data)) as image:
            return (
                image.format == format.upper()
                and image.mode in ("L", "RGB")
                and orientation_of(image) == 1
                and not has_alpha(image)
                and not image.info.get("icc_profile")
                and not is_animated(image)
            )
    except UnreadableImageError:
        return False


def upright_mask(record: Record) -> Image.Image:
    """Return the mask of `load_upright`'s picture, of the same size, in L; white for a record without one.

    Raises LG-DATA-009 as `load_upright` does.
    """
    size = record.size[1], record.size[0]
    if record.mask is None:
        return Image.new("L", size, 255)
    if record.mask == record.path:
        image = _whole(record)
        return image.getchannel("A") if image.mode == "RGBA" else Image.new("L", size, 255)
    data = _read(record, record.mask, record.mask_hash)
    mask = on_background(_decode(record, data), (0, 0, 0)).convert("L")
    whole = size if record.crop is None else _upright_size(record)
    box = record.crop or (0, 0, *whole)
    if mask.size != whole:
        scale = mask.width / whole[0], mask.height / whole[1]
        scaled = (box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1])
        return mask.resize(size, Image.Resampling.BILINEAR, box=scaled)
    return mask.crop(box)


def pixels_key(record: Record) -> dict[str, Any]:
    """Return all that `load_pixels` makes of the record before its bucket, as ingredients of a cache key."""
    key: dict[str, Any] = {"image": record.content_hash}
    if record.crop is not None:
        key["crop"] = list(record.crop)
    if record.background != (255, 255, 255):
        key["background"] = list(record.background)
    return key


def mask_key(record: Record) -> dict[str, Any]:
    """Return all that `load_mask` makes of the record before its bucket, as ingredients of a cache key."""
    if record.mask is None:
        return {}
    kind = "alpha" if record.mask == record.path else "file"
    return {
        "mask": record.mask_hash,
        "kind": kind,
        "crop": list(record.crop or ()),
        "size": list(record.size),
    }


def _whole(record: Record, data: bytes | None = None) -> Image.Image:
    """Return the picture upright and cropped, in RGB, or in RGBA where parts are transparent."""
    image = _decode(record, read_checked(record) if data is None else data)
    if record.crop is not None:
        left, top, right, bottom = record.crop
        if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
            raise _changed(record, f"its crop {record.crop} lies outside its {image.width}x{image.height}")
        image = image.crop(record.crop)
    return image


def _read(record: Record, path: Path, content_hash: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _changed(record, os_reason(error)) from error
    if content_hash and hashlib.sha256(data).hexdigest() != content_hash:
        whose = "its" if path == record.path else "its mask's"
        raise _changed(record, f"{whose} content is another one")
    return data


def _decode(record: Record, data: bytes) -> Image.Image:
    try:
        with decoded(io.BytesIO(data)) as image:
            check_mode(image)
            return to_srgb(upright(image))
    except UnreadableImageError as error:
        raise _changed(record, str(error)) from error


def _upright_size(record: Record) -> Size:
    try:
        height, width = glance(record.path, max_pixels=HARD_MAX_PIXELS).size
    except UnreadableImageError as error:
        raise _changed(record, str(error)) from error
    return width, height


def _cut_box(size: Size, bucket: Size, resized: Size | None) -> Box:
    """Return what part of the image the bucket holds; resizing only it never makes a giant on the way."""
    whole = resized or cover(size, bucket)
    sides = []
    for side, scaled, wanted in zip(size, whole, bucket, strict=True):
        start = (scaled - wanted) // 2
        sides.append((start * side / scaled, (start + wanted) * side / scaled))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def _changed(record: Record, reason: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-009",
        "An image changed after its folder was scanned.",
        where=f"{shown(record.name)} ({reason})",
        why="the plan, the captions and the cache belong to the image as it was.",
        fix="queue again, so that the folder is scanned anew",
    )
