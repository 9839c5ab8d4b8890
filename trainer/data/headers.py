"""Read what an image's header tells (size, orientation, transparency, animation) without an image library.

Only the commonest forms are read here, several times as fast; for anything else, and for anything odd,
`read_header` returns None and the library looks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .bytes_at import BytesAt, BytesHeld

WINDOW_BYTES = 4096
MAX_CHUNKS = 20_000
ORIENTATION = 0x0112
SHORT = 3
# JPEG's frame headers: SOF0 to SOF2, the three kinds that occur; Huffman tables etc. are none.
FRAME_MARKERS = (0xC0, 0xC1, 0xC2)
SKIPPED_MARKERS = (0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0))
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_ALPHA = (4, 6)  # colour types with an alpha channel
PNG_KEYED = (0, 2, 3)  # colour types that may name one transparent colour
METADATA = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type", b"Raw Profile Type")
TAIL_BYTES = 8192


@dataclass(frozen=True)
class Header:
    """``width`` and ``height`` are as stored; ``orientation`` is EXIF's, 1 where there is none."""

    width: int
    height: int
    orientation: int = 1
    has_alpha: bool = False
    is_animated: bool = False


class _OddError(ValueError):
    """The file is better left to the library."""


class _Reader:
    """Bytes of a file by position, read in windows."""

    __slots__ = ("_at", "_source", "_window")

    def __init__(self, source: BytesAt | BytesHeld) -> None:
        self._source = source
        self._at, self._window = 0, source.get(0, WINDOW_BYTES)

    def get(self, at: int, count: int) -> bytes:
        """Return ``count`` bytes; raises _OddError where the file ends before."""
        start = at - self._at
        if start < 0 or start + count > len(self._window):
            self._at, self._window = at, self._source.get(at, max(count, WINDOW_BYTES))
            start = 0
            if len(self._window) < count:
                raise _OddError
        return self._window[start : start + count]

    def tail_holds(self, start: int, words: tuple[bytes, ...]) -> bool:
        """Say whether the file's last bytes, those behind ``start``, hold one of the words."""
        tail = self._source.get(max(start, self._source.size() - TAIL_BYTES), TAIL_BYTES)
        return any(word in tail for word in words)


def read_header(source: BytesAt | BytesHeld) -> Header | None:
    """Return the header of a JPEG, PNG or WebP file, or None."""
    reader = _Reader(source)
    try:
        start = reader.get(0, 16)
        if start.startswith(b"\xff\xd8\xff"):
            return _jpeg(reader)
        if start.startswith(PNG_START) and start[12:] == b"IHDR":
            return _png(reader)
        if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
            return _webp(reader)
    except _OddError:
        pass
    return None


def _jpeg(reader: _Reader) -> Header:
    at, orientation, has_xmp = 2, 0, False
    for _ in range(MAX_CHUNKS):
        fill, marker, length = struct.unpack(">BBH", reader.get(at, 4))
        if fill == 0xFF and marker in FRAME_MARKERS:
            depth, height, width, parts = struct.unpack(">BHHB", reader.get(at + 4, 6))
            if (
                depth != 8
                or not height
                or not width
                or parts not in (1, 3, 4)
                or (has_xmp and not orientation)
            ):
                raise _OddError  # XMP can hold an orientation, too
            return Header(width, height, orientation or 1)
        if fill != 0xFF or marker not in SKIPPED_MARKERS or length < 2:
            raise _OddError
        if marker == 0xE1:
            start = reader.get(at + 4, min(length - 2, len(XMP)))
            has_xmp = has_xmp or start == XMP
            if start.startswith(EXIF):
                if orientation:
                    raise _OddError  # several EXIF blocks
                orientation = _exif_orientation(reader.get(at + 10, length - 8)) or 1
        elif marker == 0xE2 and reader.get(at + 4, min(length - 2, 4)) == b"MPF\0":
            raise _OddError  # several pictures in one file
        at += 2 + length
    raise _OddError


def _png(reader: _Reader) -> Header:
    width, height, depth, kind = struct.unpack(">IIBB", reader.get(16, 10))
    if not width or not height or depth not in (1, 2, 4, 8, 16) or kind not in PNG_KEYED + PNG_ALPHA:
        raise _OddError
    has_alpha, frames, orientation = kind in PNG_ALPHA, 1, 1
    at = 33
    for _ in range(MAX_CHUNKS):
        length, name = struct.unpack(">I4s", reader.get(at, 8))
        if name in (b"IDAT", b"IEND"):
            if name == b"IDAT" and reader.tail_holds(at, METADATA):
                raise _OddError  # EXIF or XMP behind the pixels
            return Header(width, height, orientation, has_alpha, frames > 1)
        if name == b"tRNS":
            has_alpha = has_alpha or kind in PNG_KEYED
        elif name == b"eXIf":
            orientation = _exif_orientation(reader.get(at + 8, length)) or 1
        elif name == b"acTL":
            (frames,) = struct.unpack(">I", reader.get(at + 8, 4))
            if frames != 1 and not 2 <= frames < 2**31:
                raise _OddError
        elif name == b"fcTL" and frames == 1:
            raise _OddError
        elif name in (b"zTXt", b"iTXt", b"tEXt") and reader.get(at + 8, min(length, 32)).startswith(
            METADATA[1:]
        ):
            raise _OddError  # EXIF or XMP as text
        at += 12 + length
    raise _OddError


def _webp(reader: _Reader) -> Header:
    kind = reader.get(12, 4)
    if kind == b"VP8 ":
        start = reader.get(20, 10)
        if start[3:6] != b"\x9d\x01\x2a":
            raise _OddError
        width, height = struct.unpack("<HH", start[6:])
        return Header(width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L":
        start = reader.get(20, 5)
        (bits,) = struct.unpack("<I", start[1:])
        if start[0] != 0x2F:
            raise _OddError
        return Header((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, has_alpha=bool(bits >> 28 & 1))
    if kind != b"VP8X":
        raise _OddError
    block = reader.get(20, 10)
    flags = block[0]
    if flags & 0x04 and not flags & 0x08:
        raise _OddError  # XMP can hold an orientation, too
    width = int.from_bytes(block[4:7], "little") + 1
    height = int.from_bytes(block[7:10], "little") + 1
    orientation = _webp_exif(reader) if flags & 0x08 else 1
    return Header(width, height, orientation, bool(flags & 0x10), bool(flags & 0x02))


def _webp_exif(reader: _Reader) -> int:
    at = 30
    for _ in range(MAX_CHUNKS):
        name, length = struct.unpack("<4sI", reader.get(at, 8))
        if name == b"EXIF":
            data = reader.get(at + 8, length)
            return _exif_orientation(data.removeprefix(EXIF)) or 1
        at += 8 + length + length % 2
    raise _OddError


def _exif_orientation(data: bytes) -> int:
    """Return the orientation in the first directory of a TIFF structure; 0 where it has none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    try:
        if order is None:
            raise _OddError
        (directory,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, directory)
        for number in range(count):
            tag, kind, values = struct.unpack_from(order + "HHI", data, directory + 2 + 12 * number)
            if tag == ORIENTATION:
                (value,) = struct.unpack_from(order + "H", data, directory + 10 + 12 * number)
                if kind != SHORT or values != 1 or not 1 <= value <= 8:
                    raise _OddError
                return int(value)
    except struct.error:
        raise _OddError from None
    return 0
