"""Measures of a frame: how sharp it is, how like another it is, and whether a new scene begins.

All work on small grey pictures, so that a figure means the same for every resolution.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

# The longer side of the picture that is measured. A figure of sharpness belongs to this size.
MEASURED_PX = 512
SCENE_PX = 64
HASH_WIDTH, HASH_HEIGHT = 9, 8


def sharpness(gray: np.ndarray) -> float:
    """Return the variance of the Laplacian of a grey picture, (H, W) uint8; 0 where nothing has an edge.

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (2000).
    """
    if min(gray.shape) < 3:
        return 0.0
    g = gray.astype(np.float32)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    return float(laplacian.var(dtype=np.float64))


def dhash(gray: np.ndarray) -> int:
    """Return the 64-bit difference hash of a grey picture: in each of 8 rows, which neighbour is brighter."""
    small = Image.fromarray(gray).resize((HASH_WIDTH, HASH_HEIGHT), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.int16)
    bits = np.packbits(values[:, 1:] > values[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def hamming(a: int, b: int) -> int:
    """Return in how many bits two hashes differ."""
    return (a ^ b).bit_count()


class SceneDetector:
    """Tell at which frame a new scene begins; feed it every frame in order.

    The score is min(change, how much the change itself grew) of the grey values, 0 to 1: steady motion
    changes much in every frame and scores low, a cut changes much once. After ffmpeg's select=scene.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._previous: np.ndarray | None = None
        self._change = 0.0

    def is_new(self, gray: np.ndarray) -> bool:
        """Say whether a scene begins with this frame, (H, W) uint8; the first frame always begins one."""
        current, previous = gray.astype(np.int16), self._previous
        self._previous = current
        if previous is None or previous.shape != current.shape:
            self._change = 0.0
            return True
        change = float(np.abs(current - previous).mean()) / 255
        score = min(change, abs(change - self._change))
        self._change = change
        return score >= self._threshold
