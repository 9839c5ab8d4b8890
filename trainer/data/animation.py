"""Animated pictures (GIF, WebP, APNG, AVIF) as videos, and the one way to open either kind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from .color import on_background, to_srgb
from .images import shown
from .video import (
    Frame,
    UnreadableVideoError,
    VideoFacts,
    check_limits,
    container_of,
    head_of,
    open_video,
)

FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
DEFAULT_SECONDS = 0.1  # what browsers take where a file gives a frame no time


class Reel(Protocol):
    """What can be read frame by frame; see `video.Video`."""

    facts: VideoFacts
    num_damaged: int
    is_cut_off: bool

    def frames(self, start: float = 0.0, end: float = 0.0, *, keys_only: bool = False) -> Iterator[Frame]: ...

    def picture(self, frame: Frame) -> Image.Image: ...

    def gray(self, frame: Frame, long_side: int) -> np.ndarray: ...


def moves(path: Path) -> bool:
    """Say whether a file is a video or an animated picture, by its content.

    Raises UnreadableVideoError where it cannot be read at all.
    """
    return container_of(path) is not None or _is_animation(path)


@contextmanager
def open_reel(path: Path) -> Iterator[Reel]:
    """Open a video or an animated picture; raises UnreadableVideoError, and LG-DATA-042 for a video."""
    if container_of(path) is None and _is_animation(path):
        with path.open("rb") as file, _opened(file) as image:
            yield Animation(image)
    else:
        with open_video(path) as video:
            yield video


class Animation:
    """An open animated picture; every frame is a whole picture, transparent parts lie on white."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self.num_damaged, self.is_cut_off = 0, False
        check_limits(image.width, image.height, 1, 0, 0)
        frames = [frame.seconds for frame in self.frames()]
        if not frames:
            raise UnreadableVideoError("no frame in it can be decoded")
        self.facts = VideoFacts((image.height, image.width), self._ends_at, len(frames))

    def frames(self, start: float = 0.0, end: float = 0.0, *, keys_only: bool = False) -> Iterator[Frame]:
        """Yield the frames shown from ``start`` to ``end`` seconds (0: to the end), in order."""
        begun, seconds = time.monotonic(), 0.0
        self.num_damaged = 0
        width, height = self._image.size
        number = 0
        while True:
            try:
                self._image.seek(number)
                self._image.load()
            except EOFError:
                break
            except Exception as error:  # decoders raise whatever they meet: OSError, ValueError, struct.error
                if number == 0:
                    raise UnreadableVideoError(f"damaged: {shown(error, 80)}") from error
                self.num_damaged += 1
                break
            number += 1
            check_limits(width, height, number, number * width * height * 3, time.monotonic() - begun)
            if end and seconds >= end:
                return
            if seconds >= start:
                yield Frame(seconds, True, self._image)
            duration = self._image.info.get("duration")
            if isinstance(duration, (int, float)) and duration > 0:
                seconds += duration / 1000
            else:
                seconds += DEFAULT_SECONDS
        self._ends_at = seconds

    def picture(self, frame: Frame) -> Image.Image:
        """Return the frame in RGB."""
        return on_background(to_srgb(frame.decoded.copy()))

    def gray(self, frame: Frame, long_side: int) -> np.ndarray:
        """Return a small grey version for measuring, (H, W) uint8, its longer side at most ``long_side``."""
        gray = self.picture(frame).convert("L")
        scale = min(1.0, long_side / max(gray.size))
        size = max(1, round(gray.width * scale)), max(1, round(gray.height * scale))
        return np.array(gray.resize(size, Image.Resampling.BOX), dtype=np.uint8)


def _is_animation(path: Path) -> bool:
    """Say whether this is an animated picture; only files that begin like one are opened."""
    head = head_of(path)
    begins = head.startswith((b"GIF8", b"\x89PNG")) or head[8:16] == b"WEBPVP8X" or head[4:12] == b"ftypavis"
    if not begins:
        return False
    try:
        with path.open("rb") as file, _opened(file) as image:
            return bool(getattr(image, "is_animated", False))
    except (OSError, UnreadableVideoError):
        return False


@contextmanager
def _opened(file: object) -> Iterator[Image.Image]:
    Image.init()
    try:
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])  # type: ignore[arg-type]
    except Exception as error:  # see Animation.frames; among them Pillow's own size limit
        raise UnreadableVideoError(f"damaged: {shown(error, 80)}") from error
    with image:
        yield image
