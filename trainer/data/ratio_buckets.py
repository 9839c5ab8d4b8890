"""Buckets made from the images themselves: their aspect ratios fall into a few groups, each gets a size.

HCP-Diffusion's RatioBucket.from_files: k-means over log2(width / height), then the size of the wanted
area at each centre, sides rounded to whole steps. In one dimension the best grouping can be computed
exactly (Wang and Song, "Ckmeans.1d.dp", R Journal 2011), so nothing depends on a random start.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..config import DatasetConfig, resolution_wh
from ..errors import LoraGraftError
from .buckets import Choice, Size, cover

MAX_DISTINCT = 2048  # finer differences of aspect than this many over all images change nothing


def ratio_choices(images: Sequence[Size], config: DatasetConfig) -> list[Choice]:
    """Return the bucket of each image (width, height); ``config.num_bucket`` groups of the aspect ratio.

    Raises LG-DATA-086 where there are fewer images than buckets. Fewer different aspect ratios than
    buckets give fewer buckets.
    """
    if config.num_bucket > len(images):
        raise LoraGraftError(
            "LG-DATA-086",
            f"num_bucket is {config.num_bucket}, but there are only {len(images)} images.",
            where="num_bucket",
            why="a bucket without an image cannot be made from the images' aspect ratios.",
            fix=f"set num_bucket to {len(images)} or less; a few are enough for most folders",
        )
    width, height = resolution_wh(config)
    area, step = width * height, config.bucket_reso_steps
    logs = [round(math.log2(w / h), 6) for w, h in images]
    centres = group_centres(logs, config.num_bucket)
    buckets = [_size(2**centre, area, step) for centre in centres]
    spread = np.abs(np.array(centres)[None, :] - np.array(logs)[:, None])  # (images, buckets)
    chosen = [int(i) for i in spread.argmin(axis=1)]
    return [
        Choice(buckets[i], cover(image, buckets[i]), buckets[i][0] / buckets[i][1] - image[0] / image[1])
        for image, i in zip(images, chosen, strict=True)
    ]


def group_centres(values: Sequence[float], num_groups: int) -> list[float]:
    """Return the means of the best grouping of numbers: least sum of squared distances, in rising order."""
    counts = Counter(_coarse(values))
    points = np.array(sorted(counts))
    weights = np.array([counts[p] for p in points.tolist()], dtype=float)
    n, k = len(points), min(num_groups, len(points))
    w = np.concatenate([[0.0], np.cumsum(weights)])
    s = np.concatenate([[0.0], np.cumsum(weights * points)])
    q = np.concatenate([[0.0], np.cumsum(weights * points**2)])

    def costs(end: int) -> np.ndarray:  # of points[start:end] for every start < end
        total, mean_sum = w[end] - w[:end], s[end] - s[:end]
        return np.maximum(0.0, q[end] - q[:end] - mean_sum**2 / total)

    best = np.full((k + 1, n + 1), np.inf)
    cut = np.zeros((k + 1, n + 1), dtype=int)
    best[0, 0] = 0.0
    for end in range(1, n + 1):
        own = costs(end)
        for groups in range(1, min(k, end) + 1):
            sums = best[groups - 1, :end] + own
            cut[groups, end] = int(np.argmin(sums))
            best[groups, end] = sums[cut[groups, end]]
    centres, end = [], n
    for groups in range(k, 0, -1):
        start = int(cut[groups, end])
        centres.append(float((s[end] - s[start]) / (w[end] - w[start])))
        end = start
    return centres[::-1]


def _coarse(values: Sequence[float]) -> list[float]:
    """Round so that at most MAX_DISTINCT different values are left."""
    digits = 6
    rounded = list(values)
    while len(set(rounded)) > MAX_DISTINCT:
        digits -= 1
        rounded = [round(value, digits) for value in values]
    return rounded


def _size(ratio: float, area: int, step: int) -> Size:
    height = math.sqrt(area / ratio)
    sides = (max(step, round(side / step) * step) for side in (height * ratio, height))
    width, height_px = sides
    return width, height_px
