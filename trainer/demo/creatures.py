"""Draw little creatures, each assembled from parts by a seed, and clutter: what the base never learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .draw import COLS, PALETTE, ROWS, SUPERSAMPLE, Color

# Tones outside the scene palette, so that no background hides a creature.
TONES: dict[str, Color] = {
    "orange": (242, 132, 30),
    "pink": (246, 140, 185),
    "brown": (128, 78, 42),
    "teal": (0, 122, 125),
    "lime": (165, 222, 60),
    "lavender": (185, 165, 240),
    "slate": (112, 122, 140),
    "peach": (250, 200, 155),
}
BODIES = ("round", "tall", "wide", "pear", "box", "drop")
TOPS = ("round ears", "pointed ears", "long ears", "horns", "antennae", "spikes")
EYES = ("one", "two", "wide", "three")
BELLIES = ("oval", "band", "spot")
FEET = ("two", "three", "long")
EXTENTS = {"small": 0.72, "large": 0.92}

Point = tuple[float, float]


@dataclass(frozen=True)
class Creature:
    """The parts and the three colours of one character."""

    seed: int
    name: str
    body: str
    top: str
    eyes: str
    belly: str
    feet: str
    tail: bool
    tones: tuple[str, str, str]


@dataclass(frozen=True)
class Pose:
    """Where and how a creature stands in an image of (height, width) pixels."""

    background: str
    size: str = "large"
    row: int = 1
    col: int = 1
    jitter: tuple[float, float] = (0.5, 0.5)
    mirrored: bool = False
    height: int = 64
    width: int = 64

    @property
    def position(self) -> str:
        """Name the place as captions do: "top left", "left", "center"."""
        return f"{ROWS[self.row]} {COLS[self.col]}".strip() or "center"


HERO_SEED = 7
OTHER_SEEDS = (2, 6, 11, 12, 26, 34, 38, 43, 48, 56)
MORE_SEEDS = (9, 21, 33)


def creature(seed: int) -> Creature:
    """Assemble the creature of a seed; the seed's digits spread parts so that neighbours differ."""
    rng = np.random.default_rng([seed, 4242])
    tones = rng.permutation(len(TONES))[:3]
    names = tuple(TONES)
    syllables = [c + v for c in "bdfgkmnpvz" for v in "aeiou"]
    return Creature(
        seed=seed,
        name="".join(syllables[i] for i in rng.integers(0, len(syllables), 2)),
        body=BODIES[(seed + int(rng.integers(2))) % len(BODIES)],
        top=TOPS[rng.integers(len(TOPS))],
        eyes=EYES[rng.integers(len(EYES))],
        belly=BELLIES[rng.integers(len(BELLIES))],
        feet=FEET[rng.integers(len(FEET))],
        tail=bool(rng.integers(2)),
        tones=(names[tones[0]], names[tones[1]], names[tones[2]]),
    )


def random_pose(
    rng: np.random.Generator, size_px: tuple[int, int] = (64, 64), background: str | None = None
) -> Pose:
    """Choose size, place and side at random, and the background where none is given."""
    return Pose(
        background or tuple(PALETTE)[rng.integers(len(PALETTE))],
        tuple(EXTENTS)[rng.integers(len(EXTENTS))],
        int(rng.integers(3)),
        int(rng.integers(3)),
        (float(rng.random()), float(rng.random())),
        bool(rng.integers(2)),
        *size_px,
    )


class _Pen:
    """Draw in a creature's unit square, mapped to a box of the canvas, mirrored or not."""

    def __init__(self, image: Image.Image, corner: Point, extent: float, mirrored: bool) -> None:
        self.draw, self.corner, self.extent, self.mirrored = ImageDraw.Draw(image), corner, extent, mirrored

    def at(self, x: float, y: float) -> Point:
        x = 1 - x if self.mirrored else x
        return self.corner[0] + x * self.extent, self.corner[1] + y * self.extent

    def oval(self, x: float, y: float, rx: float, ry: float, ink: Color) -> None:
        cx, cy = self.at(x, y)
        rx, ry = rx * self.extent, ry * self.extent
        self.draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=ink)

    def poly(self, points: Sequence[Point], ink: Color) -> None:
        self.draw.polygon([self.at(*p) for p in points], fill=ink)

    def line(self, a: Point, b: Point, thickness: float, ink: Color) -> None:
        self.draw.line([self.at(*a), self.at(*b)], fill=ink, width=max(1, round(thickness * self.extent)))


# Half width and half height of each body around (0.5, 0.57).
_HALF = {
    "round": (0.34, 0.31),
    "tall": (0.24, 0.34),
    "wide": (0.44, 0.26),
    "pear": (0.36, 0.33),
    "box": (0.32, 0.30),
    "drop": (0.34, 0.34),
}


def _draw_top(pen: _Pen, kind: str, y: float, half: float, ink: Color) -> None:
    for side in (-1.0, 1.0):
        x = 0.5 + side * 0.62 * half
        if kind == "round ears":
            pen.oval(0.5 + side * 0.8 * half, y + 0.06, 0.13, 0.13, ink)
        elif kind == "pointed ears":
            pen.poly([(x - 0.13, y + 0.16), (x + side * 0.08, y - 0.17), (x + 0.13, y + 0.16)], ink)
        elif kind == "long ears":
            pen.oval(0.5 + side * 0.5 * half, y - 0.04, 0.075, 0.22, ink)
        elif kind == "horns":
            pen.poly([(x - 0.06, y + 0.12), (x + side * 0.24, y - 0.10), (x + 0.06, y + 0.20)], ink)
        elif kind == "antennae":
            pen.line((x, y + 0.10), (x + side * 0.06, y - 0.12), 0.045, ink)
            pen.oval(x + side * 0.06, y - 0.13, 0.085, 0.085, ink)
    if kind == "spikes":
        for shift, tall in ((-0.17, 0.12), (0.0, 0.20), (0.17, 0.12)):
            pen.poly([(0.41 + shift, y + 0.12), (0.5 + shift, y - tall), (0.59 + shift, y + 0.12)], ink)


def _draw_feet(pen: _Pen, kind: str, y: float, half: float, ink: Color) -> None:
    if kind == "long":
        for x in (0.5 - 0.5 * half, 0.5 + 0.5 * half):
            pen.line((x, y - 0.1), (x, y + 0.09), 0.09, ink)
            pen.oval(x + 0.03, y + 0.08, 0.10, 0.045, ink)
        return
    for x in (-0.55, 0.55) if kind == "two" else (-0.7, 0.0, 0.7):
        pen.oval(0.5 + x * half, y, 0.15 if kind == "two" else 0.105, 0.09, ink)


def _draw_body(pen: _Pen, kind: str, rx: float, ry: float, ink: Color) -> None:
    y = 0.57
    if kind == "pear":
        pen.oval(0.5, y - 0.42 * ry, 0.62 * rx, 0.58 * ry, ink)
        pen.oval(0.5, y + 0.30 * ry, rx, 0.70 * ry, ink)
    elif kind == "box":
        for dx in (-1, 1):
            for dy in (-1, 1):
                pen.oval(0.5 + dx * (rx - 0.08), y + dy * (ry - 0.08), 0.08, 0.08, ink)
        pen.poly(
            [
                (0.5 - rx, y - ry + 0.08),
                (0.5 + rx, y - ry + 0.08),
                (0.5 + rx, y + ry - 0.08),
                (0.5 - rx, y + ry - 0.08),
            ],
            ink,
        )
        pen.poly([(0.58 - rx, y - ry), (0.42 + rx, y - ry), (0.42 + rx, y + ry), (0.58 - rx, y + ry)], ink)
    elif kind == "drop":
        pen.oval(0.5, y + 0.3 * ry, rx, 0.7 * ry, ink)
        pen.poly([(0.5, y - ry), (0.5 + 0.93 * rx, y + 0.08 * ry), (0.5 - 0.93 * rx, y + 0.08 * ry)], ink)
    else:
        pen.oval(0.5, y, rx, ry, ink)


def _draw_face(pen: _Pen, who: Creature, rx: float, ry: float, patch: Color) -> None:
    y = 0.57
    if who.belly == "oval":
        pen.oval(0.5, y + 0.52 * ry, 0.58 * rx, 0.38 * ry, patch)
    elif who.belly == "band":
        flat = [(0.5 - 0.86 * rx, y + 0.28 * ry), (0.5 + 0.86 * rx, y + 0.28 * ry)]
        pen.poly([*flat, (0.5 + 0.8 * rx, y + 0.62 * ry), (0.5 - 0.8 * rx, y + 0.62 * ry)], patch)
    else:
        pen.oval(0.5 + 0.35 * rx, y + 0.42 * ry, 0.30 * rx, 0.26 * ry, patch)
    spots = {"one": (0.0,), "two": (-0.36, 0.36), "wide": (-0.62, 0.62), "three": (-0.52, 0.0, 0.52)}[
        who.eyes
    ]
    radius = {"one": 0.145, "two": 0.10, "wide": 0.10, "three": 0.075}[who.eyes]
    height = y - (0.05 if who.body in ("drop", "pear") else 0.25) * ry
    for spot in spots:
        pen.oval(0.5 + spot * rx, height, radius, radius, (250, 250, 250))
        # The pupils look to one side, which tells a mirrored creature from the other.
        pen.oval(0.5 + spot * rx + 0.3 * radius, height, 0.58 * radius, 0.58 * radius, (20, 20, 25))


def paint_creature(image: Image.Image, who: Creature, corner: Point, extent: float, mirrored: bool) -> None:
    """Paint a creature into the square of side `extent` whose top left is `corner`, in image pixels."""
    pen = _Pen(image, corner, extent, mirrored)
    main, accent, patch = (TONES[t] for t in who.tones)
    rx, ry = _HALF[who.body]
    if who.tail:
        pen.line((0.5 - 0.7 * rx, 0.57 + 0.5 * ry), (0.5 - rx - 0.08, 0.50), 0.085, accent)
        pen.oval(0.5 - rx - 0.08, 0.50, 0.075, 0.075, accent)
    _draw_feet(pen, who.feet, 0.57 + ry, rx, accent)
    _draw_top(pen, who.top, 0.57 - ry, rx, accent)
    _draw_body(pen, who.body, rx, ry, main)
    _draw_face(pen, who, rx, ry, patch)


def draw_creature(who: Creature, pose: Pose) -> Image.Image:
    """Draw a creature on a plain background as an RGB image of the pose's size."""
    s = SUPERSAMPLE
    image = Image.new("RGB", (pose.width * s, pose.height * s), PALETTE[pose.background])
    extent = EXTENTS[pose.size] * min(pose.height, pose.width)
    corner = [
        (length - extent) * (0.05 + 0.35 * third + 0.2 * jitter)
        for length, third, jitter in (
            (pose.width, pose.col, pose.jitter[0]),
            (pose.height, pose.row, pose.jitter[1]),
        )
    ]
    paint_creature(image, who, (corner[0] * s, corner[1] * s), extent * s, pose.mirrored)
    return image.resize((pose.width, pose.height), Image.Resampling.BOX)


def creature_caption(who: Creature, pose: Pose) -> str:
    """Name the creature first, then what varies: "zibo, large, top left, blue background"."""
    return f"{who.name}, {pose.size}, {pose.position}, {pose.background} background"


def _random_color(rng: np.random.Generator) -> Color:
    tones = (*TONES.values(), *PALETTE.values())
    if rng.random() < 0.6:
        return tones[rng.integers(len(tones))]
    r, g, b = (int(v) for v in rng.integers(0, 256, 3))
    return r, g, b


def draw_clutter(rng: np.random.Generator, size_px: tuple[int, int] = (64, 64)) -> Image.Image:
    """Draw overlapping ovals, polygons, lines and eye-like dots: practice for the VAE alone."""
    height, width = size_px
    s = SUPERSAMPLE // 2
    image = Image.new("RGB", (width * s, height * s), _random_color(rng))
    side = float(min(height, width) * s)
    pen = _Pen(image, (0.0, 0.0), side, False)
    across, down = width * s / side, height * s / side
    for _ in range(int(rng.integers(3, 12))):
        x, y = float(rng.random() * across), float(rng.random() * down)
        ink, r = _random_color(rng), float(rng.uniform(0.04, 0.35) ** 1.3)
        kind = rng.integers(5)
        if kind == 0:
            pen.oval(x, y, r, r * float(rng.uniform(0.5, 1.8)), ink)
        elif kind == 1:
            angles = np.sort(rng.random(int(rng.integers(3, 6)))) * 2 * math.pi
            pen.poly([(x + 1.3 * r * math.cos(a), y + 1.3 * r * math.sin(a)) for a in angles], ink)
        elif kind == 2:
            pen.line(
                (x, y), (x + float(rng.normal()) * 0.3, y + float(rng.normal()) * 0.3), r / 3 + 0.02, ink
            )
        elif kind == 3:
            pen.oval(x, y, r, r, ink)
            pen.oval(x, y, 0.5 * r, 0.5 * r, _random_color(rng))
        else:
            eye = min(r, 0.14) + 0.03
            pen.oval(x, y, eye, eye, (250, 250, 250))
            pen.oval(x + 0.3 * eye * float(rng.choice([-1, 1])), y, 0.58 * eye, 0.58 * eye, (20, 20, 25))
    return image.resize((width, height), Image.Resampling.BOX)
