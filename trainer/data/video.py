"""Open video files safely, and turn their frames into upright pictures with square pixels.

A file is told by its first bytes and given to the one reader that they mean, so that a playlist in a
video's clothes is never followed, and only local files are opened. Decoding is lazy: one frame at a time.
"""

from __future__ import annotations

import importlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import LoraGraftError
from .images import shown

Size = tuple[int, int]

# A file of such a name is meant to be a video: if it cannot be read, the user must hear of it.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".mpg"),
    *(".mpeg", ".ts", ".m2ts", ".mts", ".ogv", ".vob", ".rm", ".asf", ".m3u8", ".mxf", ".dv", ".f4v"),
)
# Bytes 4 to 8 of QuickTime and MP4 files, and the brands that make such a file a picture instead.
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
PICTURE_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis", b"hevc", b"hevx")
MATROSKA = b"\x1aE\xdf\xa3"
OTHERS = (  # first bytes of what is no readable video; only for the wording of the refusal
    (b"#extm3u", "a playlist that names other files"),
    (b"ffconcat", "a list that names other files"),
    (b"<?xml", "XML text"),
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"version https://git-lfs", "a Git LFS pointer, not the video itself"),
    (b"riff", "AVI or another RIFF file"),
    (b"gif8", "a GIF that does not move"),
    (b"oggs", "Ogg"),
    (b"flv", "Flash video"),
    (b"0&\xb2u", "Windows Media"),
    (b"\x00\x00\x01\xba", "an MPEG program stream"),
    (b"g@", "an MPEG transport stream"),
)

# Far above any sane source, low enough that a crafted file cannot hold the machine.
MAX_PIXELS = 64_000_000
MAX_FPS = 1000
MAX_SECONDS = 24 * 3600
MAX_FRAMES = 5_000_000
MAX_DECODED_BYTES = 2**43
MAX_WALL_SECONDS = 2 * 3600
MAX_PIXEL_ASPECT = 10
READ_TIMEOUT_S = 30.0

# The display matrix's (a, b, c, d), which sends (x, y) to (a x + c y, b x + d y), -> what brings upright.
UPRIGHT: dict[tuple[int, int, int, int], Image.Transpose | None] = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
TURNED_BY_90 = tuple(turn for (a, *_), turn in UPRIGHT.items() if a == 0)
# AVColorSpace -> swscale's matrix; RGB (0) needs none, and a video that names none gets one by its size.
MATRICES = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020", 10: "BT2020"}
LIMITED, FULL = 1, 2
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
HD_LINES = 720


class UnreadableVideoError(ValueError):
    """Why one file cannot be used, or from where on; callers list all such files in one LoraGraftError."""


@dataclass(frozen=True)
class VideoFacts:
    """What the header and the first frame told.

    ``size`` is (height, width) as shown: upright, with square pixels. ``seconds`` and ``num_frames`` are
    the header's claim, 0 where it makes none. ``notes`` say what about the pictures needs attention.
    """

    size: Size
    seconds: float
    num_frames: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """One decoded frame; ``seconds`` counts from the video's start, ``is_key`` is a whole picture."""

    seconds: float
    is_key: bool
    decoded: Any


def load_av() -> Any:
    """Return PyAV; raises LG-DATA-042 where it is not installed."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise LoraGraftError(
            "LG-DATA-042",
            "Videos need the Python package PyAV, which is not installed.",
            where=f"import av ({shown(error, 100)})",
            why="ComfyUI brings it along; a Python without ComfyUI may lack it.",
            fix="run: python -m pip install av",
        ) from error


def container_of(path: Path) -> str | None:
    """Return the reader that a file's first bytes mean, "mov" or "matroska"; None for no video of ours.

    Raises UnreadableVideoError where the file cannot be read at all.
    """
    head = head_of(path)
    if head.startswith(MATROSKA):
        return "matroska"
    if head[4:8] in MP4_BOXES and not (head[4:8] == b"ftyp" and head[8:12] in PICTURE_BRANDS):
        return "mov"
    return None


@contextmanager
def open_video(path: Path) -> Iterator[Video]:
    """Open a video and decode its first frame; raises UnreadableVideoError, LG-DATA-042."""
    av = load_av()
    kind = container_of(path)
    if kind is None:
        raise UnreadableVideoError(_what_it_is(head_of(path)))
    try:
        # A named reader does no guessing; 'file:' keeps any other meaning out of the name.
        container = av.open(
            f"file:{path.absolute()}",
            format=kind,
            container_options={"protocol_whitelist": "file", "format_whitelist": "mov,matroska,webm"},
            metadata_errors="replace",
            timeout=READ_TIMEOUT_S,
        )
    except (av.FFmpegError, ValueError, MemoryError, OverflowError) as error:
        raise UnreadableVideoError(_reason(error)) from error
    with container:
        yield Video(av, container)


class Video:
    """An open video.

    After all of ``frames`` was read, ``num_damaged`` counts what could not be decoded, and ``is_cut_off``
    says that the pictures end well before the length that the header gives for them.
    """

    def __init__(self, av: Any, container: Any) -> None:
        self._av, self._container = av, container
        if not container.streams.video:
            raise UnreadableVideoError("no video in it, only sound or text")
        self._stream = container.streams.video[0]
        # Frames in parallel pay where there are cores for them; on two, slices are a quarter faster.
        self._stream.thread_type = "AUTO" if (os.cpu_count() or 1) >= 4 else "SLICE"
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._gray_reformatter = av.video.reformatter.VideoReformatter()
        self._start = self._stream.start_time or 0
        self._tick = self._stream.time_base or Fraction(1, 1000)
        self.num_damaged, self.is_cut_off = 0, False
        self._check_header()
        first = next(self.frames(), None)
        if first is None:
            raise UnreadableVideoError("no frame in it can be decoded")
        self._turn, self._pixel_aspect, notes = self._how_shown(first.decoded)
        self.facts = VideoFacts(
            self._shown_size(first.decoded), self._seconds(), int(self._stream.frames or 0), notes
        )

    def frames(self, start: float = 0.0, end: float = 0.0, *, keys_only: bool = False) -> Iterator[Frame]:
        """Yield the frames shown from ``start`` to ``end`` seconds (0: the video's end), in order.

        What cannot be decoded is counted in ``num_damaged`` and left out. Raises UnreadableVideoError at
        a limit, or where reading ends in an error.
        """
        self._rewind(start, keys_only)
        begun, num_bytes, last = time.monotonic(), 0, -1.0
        self.num_damaged = 0
        for num_frames, decoded in enumerate(self._decode(), 1):
            num_bytes += decoded.width * decoded.height * 3 // 2
            wall_seconds = time.monotonic() - begun
            check_limits(decoded.width, decoded.height, num_frames, num_bytes, wall_seconds)
            seconds = self._time_of(decoded, last)
            last = max(last, seconds)
            if end and seconds >= end:
                return
            if seconds >= start and not (keys_only and not decoded.key_frame):
                yield Frame(seconds, bool(decoded.key_frame), decoded)
        promised = float((self._stream.duration or 0) * self._tick)
        self.is_cut_off = not keys_only and last < promised - max(1.0, 0.05 * promised)

    def picture(self, frame: Frame) -> Image.Image:
        """Return a frame as it is meant to be seen: RGB, full range, square pixels, upright."""
        decoded = frame.decoded
        width, height = self._square(decoded)
        rgb = self._convert(self._reformatter, decoded, width, height, "rgb24", "BICUBIC")
        image = Image.fromarray(rgb)
        return image if self._turn is None else image.transpose(self._turn)

    def gray(self, frame: Frame, long_side: int) -> np.ndarray:
        """Return a small grey version for measuring, (H, W) uint8, its longer side at most ``long_side``."""
        decoded = frame.decoded
        scale = min(1.0, long_side / max(decoded.width, decoded.height))
        width, height = max(1, round(decoded.width * scale)), max(1, round(decoded.height * scale))
        return self._convert(self._gray_reformatter, decoded, width, height, "gray", "AREA")

    # ---- decoding ----

    def _rewind(self, start: float, keys_only: bool) -> None:
        try:
            self._stream.codec_context.skip_frame = "NONKEY" if keys_only else "DEFAULT"
            target = self._start + int(max(0.0, start) / self._tick)
            self._container.seek(target, stream=self._stream, backward=True)
        except (self._av.FFmpegError, OverflowError) as error:
            raise UnreadableVideoError(f"cannot be wound to {start:g} s: {_reason(error)}") from error

    def _decode(self) -> Iterator[Any]:
        try:
            for packet in self._container.demux(self._stream):
                try:
                    decoded = packet.decode()
                except self._av.FFmpegError:
                    self.num_damaged += 1
                    continue
                for frame in decoded:
                    if frame.is_corrupt:
                        self.num_damaged += 1
                    else:
                        yield frame
        except (self._av.FFmpegError, ValueError, MemoryError) as error:
            raise UnreadableVideoError(_reason(error)) from error

    def _time_of(self, decoded: Any, last: float) -> float:
        if decoded.pts is None:  # a stream without times: count on with its average rate
            rate = self._stream.average_rate
            return max(0.0, last + (float(1 / rate) if rate else 0.04))
        return max(0.0, float((decoded.pts - self._start) * (decoded.time_base or self._tick)))

    # ---- how it is shown ----

    def _how_shown(self, decoded: Any) -> tuple[Image.Transpose | None, Fraction, tuple[str, ...]]:
        notes = []
        turn = None
        matrix = decoded.side_data.get(self._av.sidedata.sidedata.Type.DISPLAYMATRIX)
        if matrix is not None:
            a, b, _, c, d, *_ = (round(int(v) / 65536) for v in np.frombuffer(bytes(matrix), "=i4"))
            if (a, b, c, d) in UPRIGHT:
                turn = UPRIGHT[a, b, c, d]
            else:
                notes.append("it is turned by an odd angle, which is ignored")
        aspect = self._stream.sample_aspect_ratio or Fraction(1)
        if not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
            notes.append(f"its pixels claim to be {aspect} as wide as high, which is ignored")
            aspect = Fraction(1)
        transfer = HDR_TRANSFERS.get(int(getattr(decoded, "color_trc", 0) or 0))
        if transfer:
            notes.append(f"HDR ({transfer}): colours come out pale; convert it to SDR first")
        if decoded.interlaced_frame:
            notes.append("interlaced: moving edges look like combs; deinterlace it first")
        if any(component.is_alpha for component in decoded.format.components):
            notes.append("its transparency is ignored")
        return turn, aspect, tuple(notes)

    def _square(self, decoded: Any) -> Size:
        """Return (width, height) with square pixels; the side that grows is the one that loses nothing."""
        width, height = decoded.width, decoded.height
        if self._pixel_aspect >= 1:
            return max(1, round(width * self._pixel_aspect)), height
        return width, max(1, round(height / self._pixel_aspect))

    def _shown_size(self, decoded: Any) -> Size:
        width, height = self._square(decoded)
        if width * height > MAX_PIXELS:
            raise UnreadableVideoError(f"{width}x{height} as shown; the limit is {MAX_PIXELS // 10**6} MP")
        return (width, height) if self._turn in TURNED_BY_90 else (height, width)

    def _convert(
        self, reformatter: Any, decoded: Any, width: int, height: int, pixels: str, method: str
    ) -> np.ndarray:
        matrix = MATRICES.get(int(decoded.colorspace))
        if matrix is None:  # players take HD for BT.709 and anything smaller for BT.601
            matrix = "ITU709" if min(decoded.width, decoded.height) >= HD_LINES else "ITU601"
        is_yuv = not (decoded.format.is_rgb or decoded.format.has_palette)
        is_full = decoded.color_range == FULL or decoded.format.name.startswith("yuvj") or not is_yuv
        try:
            small = reformatter.reformat(
                decoded,
                width,
                height,
                pixels,
                src_colorspace=matrix if is_yuv else None,
                src_color_range=FULL if is_full else LIMITED,
                dst_color_range=FULL,
                interpolation=method,
            )
        except (self._av.FFmpegError, ValueError) as error:
            raise UnreadableVideoError(f"pixel format {decoded.format.name}: {_reason(error)}") from error
        return np.asarray(small.to_ndarray(), dtype=np.uint8)

    # ---- limits ----

    def _seconds(self) -> float:
        if self._stream.duration:
            return max(0.0, float(self._stream.duration * self._tick))
        return max(0.0, (self._container.duration or 0) / 1_000_000)

    def _check_header(self) -> None:
        context = self._stream.codec_context
        if context is None:  # the file names a codec that no decoder knows
            raise UnreadableVideoError("its video codec is unknown here; convert it to H.264 in an mp4")
        if context.width * context.height > MAX_PIXELS:
            raise UnreadableVideoError(
                f"{context.width}x{context.height}; the limit is {MAX_PIXELS // 10**6} megapixels"
            )
        rate = self._stream.average_rate
        if rate and rate > MAX_FPS:
            raise UnreadableVideoError(f"{float(rate):.0f} frames a second; the limit is {MAX_FPS}")
        if self._seconds() > MAX_SECONDS:
            raise UnreadableVideoError(
                f"{self._seconds() / 3600:.0f} hours long; the limit is {MAX_SECONDS // 3600}"
            )


def check_limits(width: int, height: int, num_frames: int, num_bytes: int, wall_seconds: float) -> None:
    """Raise UnreadableVideoError where what was decoded so far is beyond a limit."""
    for value, limit, what in (
        (width * height, MAX_PIXELS, "pixels a frame"),
        (num_frames, MAX_FRAMES, "frames"),
        (num_bytes, MAX_DECODED_BYTES, "decoded bytes"),
        (wall_seconds, MAX_WALL_SECONDS, "seconds of decoding"),
    ):
        if value > limit:
            raise UnreadableVideoError(f"more than {limit:,} {what}; set start and end")


def head_of(path: Path) -> bytes:
    """Return a file's first bytes; raises UnreadableVideoError."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
            raise UnreadableVideoError("not a regular file")
        with path.open("rb") as file:
            return file.read(64)
    except (OSError, ValueError) as error:
        if isinstance(error, UnreadableVideoError):
            raise
        reason = error.strerror if isinstance(error, OSError) else None
        raise UnreadableVideoError(reason or type(error).__name__) from error


def _what_it_is(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        return "0 bytes"
    if head[4:8] == b"ftyp" and head[8:12] in PICTURE_BRANDS:
        return "a picture (HEIC or AVIF), not a video"
    for prefix, name in OTHERS:
        if start.startswith(prefix) or head.lower().startswith(prefix):
            return f"{name}; only MP4, MOV, MKV, WebM and animated pictures are read"
    return "not an MP4, MOV, MKV or WebM video, or its beginning is damaged"


def _reason(error: BaseException) -> str:
    text = shown(" ".join(str(getattr(error, "strerror", None) or error).split()), 100)
    return f"damaged or unsupported: {text}" if text else "damaged or unsupported"
