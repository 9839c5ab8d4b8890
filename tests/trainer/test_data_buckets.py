"""Buckets equal the reference's, and their rules hold for any image."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.buckets import cover, make_buckets, nearest_bucket, select_bucket
from loragraft_tests.trainer.data_folders import golden

CASES = golden("buckets")
SETTINGS = ("resolution", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")


def config_of(case: dict[str, Any]) -> DatasetConfig:
    values = {name: case[name] for name in SETTINGS}
    return DatasetConfig(**values | {"resolution": tuple(case["resolution"])})


@pytest.mark.parametrize("case", CASES, ids=[str([c[name] for name in SETTINGS]) for c in CASES])
def test_equal_to_the_reference(case: dict[str, Any]) -> None:
    config = config_of(case)
    if case["predefined"] is not None:
        assert make_buckets(
            tuple(case["resolution"]),
            case["min_bucket_reso"],
            case["max_bucket_reso"],
            case["bucket_reso_steps"],
        ) == [tuple(size) for size in case["predefined"]]
    assert len(case["rows"]) == 200
    for image, bucket, resized, aspect_error in case["rows"]:
        choice = select_bucket(tuple(image), config)
        assert (choice.bucket, choice.resized) == (tuple(bucket), tuple(resized)), image
        assert choice.aspect_error == pytest.approx(aspect_error, abs=1e-12), image


def test_without_buckets_every_image_gets_the_resolution() -> None:
    config = DatasetConfig(resolution=(512, 768), enable_bucket=False, bucket_no_upscale=True)
    for image in [(512, 768), (10, 4000), (3000, 100)]:
        choice = select_bucket(image, config)
        assert choice.bucket == (512, 768)
        assert choice.resized == cover(image, (512, 768))


def test_the_images_own_size_wins_over_an_equal_aspect() -> None:
    buckets = ((256, 256), (512, 512), (512, 640))
    assert nearest_bucket((512, 512), buckets).bucket == (512, 512)
    assert nearest_bucket((513, 513), buckets).bucket == (256, 256), "else the first of the nearest"


def test_crop_share() -> None:
    assert select_bucket((512, 512), DatasetConfig()).cropped == 0
    choice = select_bucket((600, 300), DatasetConfig(enable_bucket=False))
    assert (choice.resized, choice.cropped) == ((1024, 512), 0.5)


def test_an_image_below_one_step_is_told_by_a_side_of_zero() -> None:
    config = DatasetConfig(bucket_no_upscale=True)
    assert select_bucket((63, 500), config).bucket == (0, 448)
    assert select_bucket((100_000, 10), config).bucket[1] == 0
    assert select_bucket((10, 100_000), config).bucket[0] == 0


SIDES = st.integers(1, 8192)
GRIDS = st.sampled_from([(256, 1024, 64), (128, 1536, 64), (256, 1024, 32), (64, 512, 8)])
AREAS = st.sampled_from([(512, 512), (768, 512), (256, 512), (448, 448), (320, 512)])


@given(image=st.tuples(SIDES, SIDES), grid=GRIDS, resolution=AREAS, no_upscale=st.booleans())
def any_image(
    image: tuple[int, int], grid: tuple[int, int, int], resolution: tuple[int, int], no_upscale: bool
) -> None:
    low, high, steps = grid
    config = DatasetConfig(
        resolution=resolution,
        min_bucket_reso=low,
        max_bucket_reso=high,
        bucket_reso_steps=steps,
        bucket_no_upscale=no_upscale,
    )
    choice = select_bucket(image, config)
    area = resolution[0] * resolution[1]
    (width, height), (wide, high_) = choice.bucket, choice.resized
    assert width % steps == height % steps == 0
    assert 0 <= width <= wide and 0 <= height <= high_, "the crop lies inside the resized image"
    assert select_bucket(image, config) == choice
    if no_upscale:
        # The reference rounds the long side to the nearest step, so it may exceed the area a little.
        assert width * height <= area + steps * max(width, height)
        assert wide <= image[0] or image[0] * image[1] > area
        return
    buckets = make_buckets(resolution, *grid)
    assert choice.bucket in buckets
    assert width * height <= area
    aspect = image[0] / image[1]
    best = min(abs(w / h - aspect) for w, h in buckets)
    assert abs(choice.aspect_error) == pytest.approx(best)
    assert width == wide or height == high_, "scaled to cover, not further"
    assert 0 <= choice.cropped < 1


@given(side=st.integers(1, 40).map(lambda n: n * 64), grid=GRIDS)
def any_grid(side: int, grid: tuple[int, int, int]) -> None:
    buckets = make_buckets((side, 512), *grid)
    assert buckets == sorted(set(buckets))
    assert {(h, w) for w, h in buckets} == set(buckets)
    assert all(w * h <= side * 512 for w, h in buckets)
    square = int(math.sqrt(side * 512) // grid[2]) * grid[2]
    assert (square, square) in buckets
    others = [size for size in buckets if size != (square, square)]
    assert all(grid[0] <= min(size) and max(size) <= grid[1] for size in others)


NUM_EXAMPLES = [150, pytest.param(5000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
def test_rules_hold_for_any_image(num_examples: int) -> None:
    settings(max_examples=num_examples, deadline=None, derandomize=num_examples < 1000)(any_image)()


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
def test_rules_hold_for_any_grid(num_examples: int) -> None:
    settings(max_examples=num_examples, deadline=None, derandomize=num_examples < 1000)(any_grid)()
