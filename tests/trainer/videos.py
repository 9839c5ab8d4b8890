"""Real videos for the tests, encoded here with PyAV: turned, stretched, full range, changing rate."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
QUARTERS = (RED, GREEN, BLUE, WHITE)  # top left, top right, bottom left, bottom right
MATRICES = {1: Colorspace.ITU709, 6: Colorspace.ITU601}


def quarters(size: tuple[int, int] = (96, 64)) -> np.ndarray:
    """Return a picture (width, height) with another colour in each corner."""
    width, height = size
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2], image[: height // 2, width // 2 :] = QUARTERS[:2]
    image[height // 2 :, : width // 2], image[height // 2 :, width // 2 :] = QUARTERS[2:]
    return image


def scene(seed: int, size: tuple[int, int] = (96, 64), cells: int = 8) -> np.ndarray:
    """Return a sharp random pattern (width, height), unlike that of any other seed."""
    rng = np.random.default_rng(seed)
    width, height = size
    small = rng.integers(0, 256, (height // cells, width // cells, 3), dtype=np.uint8)
    return np.ascontiguousarray(np.kron(small, np.ones((cells, cells, 1), np.uint8)))


def encode(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    rate: int = 30,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times_ms: Sequence[int] | None = None,
    turned: float = 0,
    matrix: Any = None,
    pixel_aspect: Fraction | None = None,
    full_range: bool | None = None,
    colorspace: int | None = None,
    key_every: int | None = None,
    muxing: dict[str, str] | None = None,
    crf: int = 4,
) -> Path:
    """Encode RGB frames (H, W, 3); ``turned`` is how far a player turns them counter-clockwise, in degrees.

    ``colorspace`` is ffmpeg's number (1: BT.709, 6: BT.601); the pixels are converted by it, so that a
    right decoder gives the given colours back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crf": str(crf), "preset": "ultrafast"} if codec == "libx264" else {}
    if key_every:
        options |= {"g": str(key_every), "keyint_min": str(key_every), "sc_threshold": "0"}
    wanted_range = None if full_range is None else (2 if full_range else 1)
    with av.open(str(path), "w", container_options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if wanted_range:
            stream.codec_context.color_range = wanted_range
        if colorspace:
            stream.codec_context.colorspace = colorspace
        if turned:
            stream.set_display_rotation(turned)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        converter = VideoReformatter()
        for number, pixels_rgb in enumerate(frames):
            frame = converter.reformat(
                av.VideoFrame.from_ndarray(pixels_rgb, "rgb24"),
                format=pixels,
                dst_colorspace=MATRICES.get(colorspace or 0),
                src_color_range=2,
                dst_color_range=wanted_range,
            )
            frame.pts = number if times_ms is None else times_ms[number]
            frame.time_base = Fraction(1, rate if times_ms is None else 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def corners(image: Any) -> list[tuple[int, int, int]]:
    """Return the colours near the four corners, in the order of QUARTERS."""
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    places = ((height // 8, width // 8), (height // 8, -width // 8), (-height // 8, width // 8))
    places += ((-height // 8, -width // 8),)
    return [tuple(int(v) for v in pixels[y, x]) for y, x in places]  # type: ignore[misc]


def close(found: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, ...]], by: int = 8) -> bool:
    """Say whether all colours are within ``by`` of the wanted ones."""
    return all(
        abs(a - b) <= by for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)
    )
