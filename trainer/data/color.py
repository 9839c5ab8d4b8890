"""Bring decoded pictures to sRGB: pixel formats, colour profiles, and what lies under transparent parts."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image

Color = tuple[int, int, int]

WHITE: Color = (255, 255, 255)
OPAQUE_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
ALPHA_MODES = ("LA", "PA", "RGBA", "La", "RGBa")
KEYED_MODES = ("1", "L", "P", "RGB")  # may name one colour that counts as transparent
WIDE_GRAY_MODES = ("I", "I;16", "I;16L", "I;16B")
MODES = OPAQUE_MODES + ALPHA_MODES + WIDE_GRAY_MODES

# Parsing a profile and building its transform take time that grows with its size. Printers' CMYK profiles,
# the largest in use, have 0.5 to 3 MB.
MAX_PROFILE_BYTES = 4 * 2**20
# A profile that moves no colour further than this (of 255) is sRGB under another name: nothing is converted.
SAME_COLOR = 3
# Profile's colour space -> the Pillow mode in which its transform takes pixels.
PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
GRAY_MODES = ("1", "L", "LA", "La", *WIDE_GRAY_MODES)

IGNORED, TOO_LARGE, UNFIT = "damaged", "too large", "made for other pixels"


def has_alpha(image: Image.Image) -> bool:
    """Say whether parts of the image may be transparent."""
    return image.mode in ALPHA_MODES or (image.mode in KEYED_MODES and "transparency" in image.info)


def to_srgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB, or in RGBA where parts are transparent, its colours converted to sRGB.

    A profile that is damaged, larger than 4 MiB or made for other pixels is left aside; `profile_note`
    says so.
    """
    transform = _transform_of(image)[0]
    alpha = None
    if has_alpha(image):
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        if transform is None:
            return image
        alpha = image.getchannel("A")
        image = image.convert(transform.input_mode)
    elif image.mode in WIDE_GRAY_MODES:
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if transform is not None:
        image = image if image.mode == transform.input_mode else image.convert(transform.input_mode)
        image = transform.apply(image)
        if alpha is not None:
            image.putalpha(alpha)
        return image
    return image if image.mode == "RGB" else image.convert("RGB")


def on_background(image: Image.Image, background: Color = WHITE) -> Image.Image:
    """Return an RGB or RGBA image in RGB, transparent parts lying on the colour."""
    if image.mode != "RGBA":
        return image
    ground = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def profile_note(image: Image.Image) -> str:
    """Return what the image's colour profile does: "" for sRGB or none, its name, or why it is left aside."""
    return _transform_of(image)[1]


def _transform_of(image: Image.Image) -> tuple[Any, str]:
    profile = image.info.get("icc_profile")
    if not profile or not isinstance(profile, bytes):
        return None, ""
    if len(profile) > MAX_PROFILE_BYTES:
        return None, TOO_LARGE
    kind = "CMYK" if image.mode == "CMYK" else "GRAY" if image.mode in GRAY_MODES else "RGB "
    return _transform(profile, kind)


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, kind: str) -> tuple[Any, str]:
    """Return the transform to sRGB for pixels of this kind (None where there is nothing to do) and a note."""
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
        if space == "RGB " and kind == "GRAY":
            kind = space  # grey pixels are colours too
        if space != kind:
            return None, UNFIT
        mode = PROFILE_MODES[space]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "CMYK" and _moves_nothing(transform, mode):
            return None, ""
        return transform, " ".join((source.profile.profile_description or "a profile without a name").split())
    except Exception:  # a damaged profile has many faces; viewers then show the plain values, and so do we
        return None, IGNORED


def _moves_nothing(transform: Any, mode: str) -> bool:
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    if mode == "L":
        array = np.arange(256, dtype=np.uint8)[None]
    else:
        array = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    image = Image.fromarray(array)
    before = np.asarray(image.convert("RGB"), dtype=np.int16)
    after = np.asarray(transform.apply(image), dtype=np.int16)
    return int(np.abs(after - before).max()) <= SAME_COLOR
