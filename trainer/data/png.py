"""Write PNG outside Python's lock, so that several cores write several pictures at once.

Pillow compresses PNG while it holds the lock for much of the time. Here numpy filters the rows and zlib
compresses them, both without it. Format: https://www.w3.org/TR/png-3/.
"""

from __future__ import annotations

import struct
import zlib
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOR_TYPES = {"L": 0, "RGB": 2}
SUB, UP = 1, 2  # filter types
BAND_BYTES = 2**20
LEVEL = 3


def write_png(image: Image.Image, file: IO[bytes], *, level: int = LEVEL) -> None:
    """Write an L or RGB image; each row is filtered by its left or its upper neighbours, whichever suits."""
    width, height = image.size
    pixels = np.asarray(image).reshape(height, -1)  # (H, W * C) uint8
    channels = len(image.getbands())
    file.write(SIGNATURE)
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8, COLOR_TYPES[image.mode], 0, 0, 0))
    packer = zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_FILTERED)
    rows = max(1, BAND_BYTES // (pixels.shape[1] + 1))
    for start in range(0, height, rows):
        packed = packer.compress(_filtered(pixels, start, min(height, start + rows), channels))
        if packed:
            _chunk(file, b"IDAT", packed)
    _chunk(file, b"IDAT", packer.flush())
    _chunk(file, b"IEND", b"")


def _filtered(pixels: Bytes, start: int, stop: int, channels: int) -> bytes:
    """Return the rows from ``start`` to ``stop`` with their filter bytes in front."""
    rows = pixels[start:stop]
    sub = rows.copy()
    sub[:, channels:] -= rows[:, :-channels]
    above = np.zeros_like(rows)
    above[0 if start else 1 :] = pixels[start - 1 if start else 0 : stop - 1]
    up = rows - above
    # The usual heuristic: the filter whose differences are smallest, seen as signed numbers.
    is_up = _weight(up) < _weight(sub)
    out = np.empty((len(rows), rows.shape[1] + 1), dtype=np.uint8)
    out[:, 0] = np.where(is_up, UP, SUB)
    out[:, 1:] = sub
    out[is_up, 1:] = up[is_up]
    return out.tobytes()


def _weight(differences: Bytes) -> NDArray[np.int64]:
    return np.minimum(differences, -differences).sum(axis=1, dtype=np.int64)  # modulo 256: min(d, 256 - d)


def _chunk(file: IO[bytes], name: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + name)
    file.write(data)
    file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(name))))
