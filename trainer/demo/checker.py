"""Say what an image of the demo base shows: shape, its colour, the background's. numpy and Pillow only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from .draw import PALETTE, SHAPES, Scene, second_tone, shape_mask

# Share of the strongest contrast that counts as foreground: an edge blurred by the VAE is cut at its middle.
_EDGE = 0.45
_MIN_CONTRAST = 40.0


@dataclass(frozen=True)
class Reading:
    """What was read; `shape` and `color` are empty where nothing stands out from the background."""

    shape: str
    color: str
    background: str

    def agrees(self, scene: Scene) -> tuple[bool, bool]:
        """Tell whether the shape is right, and whether both colours are."""
        return self.shape == scene.shape, (self.color, self.background) == (scene.color, scene.background)


def border_color(rgb: np.ndarray) -> np.ndarray:
    """Give the border's most common colour (3,): the mean of the pixels nearest to its median."""
    border = np.concatenate([rgb[0], rgb[-1], rgb[1:-1, 0], rgb[1:-1, -1]]).astype(np.float32)
    distance = np.abs(border - np.median(border, 0)).sum(1)
    near: np.ndarray = border[distance <= np.median(distance) + 1].mean(0)
    return near


def contrast(rgb: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Give each pixel's distance (H, W) float32 from the background colour in RGB."""
    distance: np.ndarray = np.sqrt(np.square(rgb.astype(np.float32) - background).sum(-1))
    return distance


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Give the box (x0, y0, x1, y1) of rows and columns holding two or more pixels, or None."""
    rows, cols = np.flatnonzero(mask.sum(1) >= 2), np.flatnonzero(mask.sum(0) >= 2)
    if len(rows) < 4 or len(cols) < 4:
        return None
    return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1


def nearest_color(pixels: np.ndarray, with_tones: bool) -> str:
    """Vote over pixels (N, 3) for the nearest palette colour; textures' second tones count for theirs."""
    names, values = list(PALETTE), list(PALETTE.values())
    if with_tones:
        names, values = names + names, values + [second_tone(name) for name in names]
    distance = np.square(pixels[:, None].astype(np.float32) - np.array(values, np.float32)).sum(-1)
    votes = np.bincount(distance.argmin(1), minlength=len(names))
    return max(PALETTE, key=lambda name: sum(int(v) for n, v in zip(names, votes, strict=True) if n == name))


def _inner(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    inner: np.ndarray = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inner


@lru_cache(maxsize=4096)
def _outline(shape: str, box: tuple[float, ...], size_px: tuple[int, int]) -> np.ndarray:
    return shape_mask(shape, (box[0], box[1], box[2], box[3]), size_px) > 0.5


def best_shape(mask: np.ndarray, box: tuple[int, int, int, int]) -> str:
    """Give the shape whose outline, fitted to the box, overlaps the mask best (IoU)."""
    x0, y0, x1, y1 = box
    crop = mask[y0:y1, x0:x1]
    scores: dict[str, float] = {}
    for shape in SHAPES:
        for grow in (0.0, 0.6):
            fitted = (-grow, -grow, x1 - x0 + grow, y1 - y0 + grow)
            drawn = _outline(shape, fitted, crop.shape)
            score = (drawn & crop).sum() / max(1, (drawn | crop).sum())
            scores[shape] = max(scores.get(shape, 0.0), float(score))
    return max(scores, key=lambda shape: scores[shape])


def read_scene(image: Image.Image) -> Reading:
    """Read shape, shape colour and background colour of an image of any size, texture and position."""
    rgb = np.asarray(image.convert("RGB"))
    back = border_color(rgb)
    background = nearest_color(back[None], with_tones=False)
    distance = contrast(rgb, back)
    strongest = float(np.percentile(distance, 99))
    mask = distance > _EDGE * strongest
    box = bounding_box(mask)
    if strongest < _MIN_CONTRAST or box is None:
        return Reading("", "", background)
    inner = _inner(mask)
    color = nearest_color(rgb[inner if inner.sum() >= 12 else mask], with_tones=True)
    return Reading(best_shape(mask, box), color, background)
