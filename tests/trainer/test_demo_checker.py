"""The checker and the recogniser of the embedded demo, on drawings they have not met."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from loragraft.trainer.demo import creatures, draw
from loragraft.trainer.demo.checker import read_scene
from loragraft.trainer.demo.recogniser import is_creature

SIZES = (*draw.SIZES_PX, *draw.BIG_SIZES_PX)


@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_checker_reads_fresh_drawings(blur: float) -> None:
    rng = np.random.default_rng(20260101)
    hits = []
    for _ in range(300):
        scene = draw.random_scene(rng, SIZES[rng.integers(len(SIZES))])
        image = draw.draw_scene(scene).filter(ImageFilter.GaussianBlur(blur))
        hits.append(all(read_scene(image).agrees(scene)))
    assert np.mean(hits) >= (0.98 if blur == 0 else 0.9)


def test_checker_sees_nothing_in_a_bare_background() -> None:
    reading = read_scene(Image.new("RGB", (64, 64), draw.PALETTE["green"]))
    assert (reading.shape, reading.color, reading.background) == ("", "", "green")


@pytest.mark.parametrize("seed", [creatures.HERO_SEED, *creatures.MORE_SEEDS])
@pytest.mark.slow
def test_recogniser_tells_a_creature_from_ten_others(seed: int) -> None:
    rng = np.random.default_rng([seed, 5])
    hits = []
    for index in range(40):
        shown = seed if index % 2 else creatures.OTHER_SEEDS[index // 2 % 10]
        pose = creatures.random_pose(rng, SIZES[rng.integers(len(SIZES))])
        hits.append(
            is_creature(creatures.draw_creature(creatures.creature(shown), pose), seed) == (shown == seed)
        )
    assert np.mean(hits) >= 0.98


def test_recogniser_refuses_plain_shapes() -> None:
    rng = np.random.default_rng(8)
    images = [draw.draw_scene(draw.random_scene(rng)) for _ in range(40)]
    assert not any(is_creature(image, creatures.HERO_SEED) for image in images)
