"""Tell images of one creature from those of other creatures and of plain shapes. numpy and Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .checker import border_color, bounding_box, contrast
from .creatures import OTHER_SEEDS, Pose, creature, draw_creature
from .draw import COLORS, PALETTE, SHAPES, SIZES, Scene, draw_scene

GRID = 24
# Fixed on drawn images and their VAE reconstructions, before any LoRA was trained.
THRESHOLD = 0.70
_CONTRAST = 45.0
_SCALES = (0.92, 1.0, 1.09)
_SHIFTS = (-0.06, 0.0, 0.06)


def _foreground(rgb: np.ndarray) -> np.ndarray:
    """Give the foreground (H, W) bool, holes filled: white eyes on white belong to the creature."""
    distance = contrast(rgb, border_color(rgb))
    mask = distance > min(_CONTRAST, 0.45 * float(distance.max()))
    padded = Image.fromarray(np.pad(mask, 1).astype(np.uint8) * 255).copy()
    ImageDraw.floodfill(padded, (0, 0), 128)
    filled: np.ndarray = np.asarray(padded)[1:-1, 1:-1] != 128
    return filled


def _views(image: Image.Image, search: bool) -> np.ndarray | None:
    """Crop the foreground, as seen from slightly moved boxes: (V, GRID * GRID * 4) unit vectors, or None."""
    rgb = np.asarray(image.convert("RGB"))
    mask = _foreground(rgb)
    box = bounding_box(mask)
    if box is None:
        return None
    # Neutral grey hides the background; the mask itself is the fourth channel and carries the outline.
    rgba = np.dstack([np.where(mask[..., None], rgb, 128), np.where(mask, 255, 0)]).astype(np.uint8)
    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0) * 1.04
    pad = int(side)
    canvas = Image.fromarray(np.pad(rgba, ((pad, pad), (pad, pad), (0, 0))))
    canvas.paste((128, 128, 128, 0), (0, 0, canvas.width, pad))
    grey = Image.new("RGBA", canvas.size, (128, 128, 128, 0))
    grey.paste(canvas.crop((pad, pad, canvas.width - pad, canvas.height - pad)), (pad, pad))
    cx, cy = (x0 + x1) / 2 + pad, (y0 + y1) / 2 + pad
    bands = [Image.fromarray(np.asarray(grey)[..., c]) for c in range(4)]
    views = []
    for scale in _SCALES if search else (1.0,):
        for dx in _SHIFTS if search else (0.0,):
            for dy in _SHIFTS if search else (0.0,):
                half, mx, my = side * scale / 2, cx + dx * side, cy + dy * side
                corners = (mx - half, my - half, mx + half, my + half)
                # Bands are resized apart: Pillow would weigh RGB by the mask in an RGBA image.
                grids = [b.resize((GRID, GRID), Image.Resampling.BOX, corners) for b in bands]
                view = np.dstack([np.asarray(g, np.float32) for g in grids]) / 127.5 - 1
                views.append(view.ravel() / np.linalg.norm(view))
    return np.stack(views)


@lru_cache(maxsize=64)
def _creature_templates(seed: int) -> np.ndarray:
    """Give (2, D) unit vectors of a creature and its mirror image."""
    views = []
    for mirrored in (False, True):
        pose = Pose("white", "large", mirrored=mirrored, height=128, width=128)
        image = _neutral(seed, pose)
        seen = _views(image, search=False)
        assert seen is not None
        views.append(seen[0])
    return np.stack(views)


def _neutral(seed: int, pose: Pose) -> Image.Image:
    """Draw the template on the background that hides least of the creature."""
    who = creature(seed)
    best, size = None, -1
    for background in PALETTE:
        image = draw_creature(who, Pose(background, pose.size, mirrored=pose.mirrored, height=128, width=128))
        count = int(_foreground(np.asarray(image)).sum())
        if count > size:
            best, size = image, count
    assert best is not None
    return best


@lru_cache(maxsize=1)
def _shape_templates() -> np.ndarray:
    views = []
    for shape in SHAPES:
        for color in COLORS:
            background = "black" if color == "white" else "white"
            for size in SIZES:
                seen = _views(
                    draw_scene(Scene(shape, color, background, size=size, height=96, width=96)), False
                )
                assert seen is not None
                views.append(seen[0])
    return np.stack(views)


def scores(image: Image.Image, seeds: Sequence[int]) -> dict[int, float]:
    """Give each creature's best correlation with the image in [-1, 1]; key -1 stands for plain shapes."""
    views = _views(image, search=True)
    if views is None:
        return {**dict.fromkeys(seeds, -1.0), -1: -1.0}
    found = {seed: float((views @ _creature_templates(seed).T).max()) for seed in seeds}
    found[-1] = float((views @ _shape_templates().T).max())
    return found


def is_creature(image: Image.Image, seed: int, others: Sequence[int] = OTHER_SEEDS) -> bool:
    """Tell whether the image shows this creature rather than one of the others, a shape or nothing known."""
    found = scores(image, [seed, *(s for s in others if s != seed)])
    best = max(found, key=lambda key: found[key])
    return best == seed and found[seed] >= THRESHOLD
