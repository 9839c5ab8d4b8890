"""Aspect-ratio buckets: which sizes there are, and which one an image goes into.

The rules are those of kohya's trainer, number for number, so that a dataset falls into the same
buckets there and here. Sizes in this file are (width, height), as its settings write them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ..config import DatasetConfig, resolution_wh

Size = tuple[int, int]


@dataclass(frozen=True)
class Choice:
    """Where one image goes: resize it to ``resized``, then cut ``bucket`` from its centre.

    ``aspect_error`` is the bucket's aspect minus the image's. A bucket side of 0 means that the
    image is smaller than one step and may not be enlarged.
    """

    bucket: Size
    resized: Size
    aspect_error: float

    @property
    def cropped(self) -> float:
        """Share of the resized image that the crop leaves out, 0 to 1."""
        return 1 - (self.bucket[0] * self.bucket[1]) / max(1, self.resized[0] * self.resized[1])


def make_buckets(resolution: Size, min_side: int, max_side: int, steps: int) -> list[Size]:
    """Return the buckets, sorted: sides are multiples of ``steps``, no area exceeds the resolution's.

    The largest square is always among them; the others have sides from ``min_side`` to ``max_side``.
    """
    area = resolution[0] * resolution[1]
    square = int(math.sqrt(area) // steps) * steps
    found = {(square, square)}
    for side in range(min_side, max_side + 1, steps):
        other = min(max_side, area // side // steps * steps)
        if other >= min_side:
            found |= {(side, other), (other, side)}
    return sorted(found)


def select_bucket(image: Size, config: DatasetConfig) -> Choice:
    """Return the bucket of an image; the config says which ones there are."""
    resolution = resolution_wh(config)
    if not config.enable_bucket:
        return nearest_bucket(image, (resolution,))
    if config.bucket_no_upscale:
        return own_bucket(image, resolution[0] * resolution[1], config.bucket_reso_steps)
    return nearest_bucket(image, _buckets(resolution, *bucket_limits(config), config.bucket_reso_steps))


def bucket_limits(config: DatasetConfig) -> tuple[int, int]:
    """Return the shortest and longest bucket side on whole steps: down and up, as kohya's trainer does."""
    step = config.bucket_reso_steps
    return max(step, config.min_bucket_reso // step * step), -(-config.max_bucket_reso // step) * step


def nearest_bucket(image: Size, buckets: tuple[Size, ...]) -> Choice:
    """Return the bucket of exactly the image's size, else the first of the nearest aspect ratio."""
    aspect = image[0] / image[1]
    bucket = image if image in buckets else min(buckets, key=lambda size: abs(size[0] / size[1] - aspect))
    return Choice(bucket, cover(image, bucket), bucket[0] / bucket[1] - aspect)


def own_bucket(image: Size, max_area: int, steps: int) -> Choice:
    """Return a bucket of the image's own size, shrunk to ``max_area`` if it is larger, cut to whole steps."""
    width, height = image
    aspect = width / height
    resized = image
    if width * height > max_area:
        ideal = math.sqrt(max_area * aspect)
        # Put the width or the height on a whole step, whichever keeps the aspect ratio better.
        by_width = _whole_steps(ideal, steps)
        by_height = _whole_steps(max_area / ideal, steps)
        width_aspect = _ratio(by_width, _whole_steps(by_width / aspect, steps))
        height_aspect = _ratio(_whole_steps(by_height * aspect, steps), by_height)
        if abs(width_aspect - aspect) < abs(height_aspect - aspect):
            resized = by_width, int(by_width / aspect + 0.5)
        else:
            resized = int(by_height * aspect + 0.5), by_height
    bucket = resized[0] - resized[0] % steps, resized[1] - resized[1] % steps
    return Choice(bucket, resized, _ratio(*bucket) - aspect)


def cover(image: Size, bucket: Size) -> Size:
    """Return the smallest size of the image's aspect that covers the bucket, sides rounded half up."""
    width, height = image
    scale = bucket[1] / height if width / height > bucket[0] / bucket[1] else bucket[0] / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


@functools.lru_cache(maxsize=16)
def _buckets(resolution: Size, min_side: int, max_side: int, steps: int) -> tuple[Size, ...]:
    return tuple(make_buckets(resolution, min_side, max_side, steps))


def _whole_steps(side: float, steps: int) -> int:
    rounded = int(side + 0.5)
    return rounded - rounded % steps


def _ratio(width: int, height: int) -> float:
    return width / height if height else math.inf
