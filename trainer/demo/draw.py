"""Draw the scenes that the demo base model learns, and caption them: pure functions of a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]

# Eight colours far apart in RGB, so that a small model can learn them and a checker can tell them.
PALETTE: dict[str, Color] = {
    "red": (220, 40, 40),
    "yellow": (250, 215, 50),
    "green": (40, 155, 65),
    "cyan": (70, 205, 225),
    "blue": (40, 75, 215),
    "purple": (160, 60, 200),
    "white": (245, 245, 245),
    "black": (25, 25, 28),
}
COLORS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": 0.54, "large": 0.76}
ROWS = ("top", "", "bottom")
COLS = ("left", "", "right")
SIZES_PX = ((64, 64), (48, 80), (80, 48), (56, 72), (72, 56))
BIG_SIZES_PX = ((96, 96), (128, 128), (64, 96), (96, 64), (128, 96), (96, 128))

SUPERSAMPLE = 4
_MARGIN = 0.04


@dataclass(frozen=True)
class Scene:
    """One shape on a plain background; offsets are in [0, 1] of the room that the shape leaves."""

    shape: str
    color: str
    background: str
    texture: str = "plain"
    size: str = "large"
    row: int = 1
    col: int = 1
    jitter: tuple[float, float] = (0.5, 0.5)
    height: int = 64
    width: int = 64

    @property
    def position(self) -> str:
        """Name the place as captions do: "top left", "left", "center"."""
        return f"{ROWS[self.row]} {COLS[self.col]}".strip() or "center"


def combo_is_held_out(shape: str, color: str, background: str) -> bool:
    """Tell the one in six (shape, colour, background) combinations that training never sees."""
    index = SHAPES.index(shape) + 5 * COLORS.index(color) + 2 * COLORS.index(background)
    return index % 6 == 0


def all_combos(held_out: bool) -> list[tuple[str, str, str]]:
    """List the combinations of one side of the split; shape and background colour always differ."""
    return [
        (shape, color, background)
        for shape in SHAPES
        for color in COLORS
        for background in COLORS
        if color != background and combo_is_held_out(shape, color, background) == held_out
    ]


def random_scene(
    rng: np.random.Generator,
    size_px: tuple[int, int] = (64, 64),
    combos: Sequence[tuple[str, str, str]] | None = None,
) -> Scene:
    """Choose a scene of (height, width) `size_px`, its colours and shape from `combos` if given."""
    if combos is None:
        shape, color = SHAPES[rng.integers(len(SHAPES))], COLORS[rng.integers(len(COLORS))]
        background = COLORS[(COLORS.index(color) + rng.integers(1, len(COLORS))) % len(COLORS)]
    else:
        shape, color, background = combos[int(rng.integers(len(combos)))]
    return Scene(
        shape,
        color,
        background,
        TEXTURES[rng.integers(len(TEXTURES))],
        tuple(SIZES)[rng.integers(len(SIZES))],
        int(rng.integers(3)),
        int(rng.integers(3)),
        (float(rng.random()), float(rng.random())),
        *size_px,
    )


def blend(color: Color, other: Color, share: float) -> Color:
    """Mix two colours, `share` in [0, 1] of the second."""
    mixed = [round(a + (b - a) * share) for a, b in zip(color, other, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def second_tone(color: str) -> Color:
    """Give the tone of stripes and dots: darker, or lighter where the colour is black."""
    if color == "black":
        return blend(PALETTE[color], (255, 255, 255), 0.2)
    return blend(PALETTE[color], (0, 0, 0), 0.2 if color == "white" else 0.3)


def fill_shape(
    draw: ImageDraw.ImageDraw, shape: str, box: tuple[float, float, float, float], ink: int
) -> None:
    """Draw one shape touching all four sides of `box` (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    if shape == "circle":
        draw.ellipse(box, fill=ink)
    elif shape == "square":
        draw.rectangle(box, fill=ink)
    elif shape == "triangle":
        draw.polygon([(x0 + w / 2, y0), (x1, y1), (x0, y1)], fill=ink)
    elif shape == "cross":
        a, b = 0.32, 0.68
        draw.rectangle((x0 + a * w, y0, x0 + b * w, y1), fill=ink)
        draw.rectangle((x0, y0 + a * h, x1, y0 + b * h), fill=ink)
    elif shape == "ring":
        draw.ellipse(box, fill=ink)
        draw.ellipse((x0 + 0.27 * w, y0 + 0.27 * h, x1 - 0.27 * w, y1 - 0.27 * h), fill=0)
    elif shape == "star":
        angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
        radii = [1.0 if k % 2 == 0 else 0.36 for k in range(10)]
        points = [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
        left, right = min(p[0] for p in points), max(p[0] for p in points)
        top, bottom = min(p[1] for p in points), max(p[1] for p in points)
        draw.polygon(
            [(x0 + w * (x - left) / (right - left), y0 + h * (y - top) / (bottom - top)) for x, y in points],
            fill=ink,
        )
    else:
        raise ValueError(f"shape: got {shape!r}, expected one of {', '.join(SHAPES)}")


def shape_mask(shape: str, box: tuple[float, float, float, float], size_px: tuple[int, int]) -> np.ndarray:
    """Render a shape's coverage, (height, width) float32 in [0, 1]; `box` in pixels, x first."""
    height, width = size_px
    image = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    x0, y0, x1, y1 = (v * SUPERSAMPLE for v in box)
    fill_shape(ImageDraw.Draw(image), shape, (x0, y0, x1 - 1, y1 - 1), 255)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX), np.float32) / 255


def _place(scene: Scene) -> tuple[float, float, float, float]:
    side = min(scene.height, scene.width)
    extent, margin = SIZES[scene.size] * side, _MARGIN * side
    corner = []
    for length, third, jitter in (
        (scene.width, scene.col, scene.jitter[0]),
        (scene.height, scene.row, scene.jitter[1]),
    ):
        corner.append(margin + (length - 2 * margin - extent) * (0.4 * third + 0.2 * jitter))
    return corner[0], corner[1], corner[0] + extent, corner[1] + extent


def draw_scene(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of its own size."""
    s = SUPERSAMPLE
    width, height = scene.width * s, scene.height * s
    x0, y0, x1, y1 = (v * s for v in _place(scene))
    fill = Image.new("RGB", (width, height), PALETTE[scene.color])
    draw, step = ImageDraw.Draw(fill), (x1 - x0) / (3.2 if scene.size == "small" else 4.4)
    tone = second_tone(scene.color)
    if scene.texture == "striped":
        y = y0 + 0.6 * step
        while y < y1:
            draw.rectangle((x0, y, x1, y + 0.45 * step), fill=tone)
            y += step
    elif scene.texture == "dotted":
        radius = 0.3 * step
        for i in range(6):
            for j in range(6):
                cx, cy = x0 + (i + 0.5) * step, y0 + (j + 0.5) * step
                draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=tone)
    mask = Image.new("L", (width, height))
    fill_shape(ImageDraw.Draw(mask), scene.shape, (x0, y0, x1 - 1, y1 - 1), 255)
    image = Image.composite(fill, Image.new("RGB", (width, height), PALETTE[scene.background]), mask)
    return image.resize((scene.width, scene.height), Image.Resampling.BOX)


def tag_caption(scene: Scene) -> str:
    """Caption in tags: "large red circle, striped, top left, blue background"."""
    tags = (f"{scene.size} {scene.color} {scene.shape}", scene.texture, scene.position)
    return f"{', '.join(tags)}, {scene.background} background"


def sentence_caption(scene: Scene, form: int = 0) -> str:
    """Caption in a sentence: "a large striped red circle at the top left on a blue background"."""
    texture = "" if scene.texture == "plain" else f" {scene.texture}"
    what = f"a {scene.size}{texture} {scene.color} {scene.shape}"
    where = "in the center" if scene.position == "center" else f"at the {scene.position}"
    if form == 1:
        return f"a {scene.background} background with {what} {where}"
    return f"{what} {where} on a {scene.background} background"


def _noise_word(rng: np.random.Generator) -> str:
    return "".join(chr(97 + c) for c in rng.integers(0, 26, int(rng.integers(2, 7))))


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Caption as training sees it: both styles, some tags left out, now and then a meaningless word.

    A LoRA's captions name only what varies and add a word the base never met; both must leave the base calm.
    """
    if rng.random() < 0.4:
        caption = sentence_caption(scene, int(rng.random() < 0.4))
    else:
        kept = rng.random(5)
        first = f"{scene.size} " if kept[0] < 0.8 else ""
        tags = [f"{first}{scene.color} {scene.shape}"] if kept[1] < 0.92 else [scene.size]
        tags += [scene.texture] if kept[2] < 0.75 else []
        tags += [scene.position] if kept[3] < 0.75 else []
        tags += [f"{scene.background} background"] if kept[4] < 0.95 else []
        if rng.random() < 0.25:
            tags = [tags[i] for i in rng.permutation(len(tags))]
        caption = ", ".join(tags)
    if rng.random() < 0.12:
        word = _noise_word(rng)
        caption = f"{word}, {caption}" if rng.random() < 0.6 else f"{caption}, {word}"
    return caption


def caption_words() -> list[str]:
    """List every word that captions of scenes use, in a fixed order."""
    glue = ("a", "at", "the", "in", "on", "with", "background", "center")
    places = (*(r for r in ROWS if r), *(c for c in COLS if c))
    return list(dict.fromkeys((*glue, *COLORS, *SHAPES, *TEXTURES, *SIZES, *places)))
