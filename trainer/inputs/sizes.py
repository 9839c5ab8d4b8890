"""What SDXL is told of an image's sizes: before it was scaled, where it was cut, and what it became.

Podell et al. 2023, "SDXL", section 2.2, with the numbers that kohya's trainer gives.
"""

from __future__ import annotations

import torch

from ..data.batches import Batch
from ..data.train_set import TrainSet

Size = tuple[int, int]
Sizes = tuple[int, int, int, int, int, int]


def sizes_of(train_set: TrainSet, batch: Batch) -> torch.Tensor:
    """Return the sizes of a batch's pictures, (B, 6) float32; see `size_conditioning`."""
    flips = batch.flips or (False,) * len(batch.indices)
    rows = [
        size_conditioning(train_set.records[i].size[::-1], train_set.buckets[i], mirrored=flip)
        for i, flip in zip(batch.indices, flips, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32)


def size_conditioning(image: Size, bucket: Size, *, mirrored: bool = False) -> Sizes:
    """Return original height and width, the crop's top and left, target height and width, in pixels.

    ``image`` and ``bucket`` are (width, height); ``image`` is the picture after its edits, before it is
    scaled. The crop is the reference's: not what was cut off, but the place of the image when it is scaled
    to lie inside its bucket. A mirrored image's left side is what was its right.
    """
    crop_left, crop_top, crop_right = _placed(image, bucket)
    left = bucket[0] - crop_right if mirrored else crop_left
    return image[1], image[0], int(crop_top), int(left), bucket[1], bucket[0]


def _placed(image: Size, bucket: Size) -> tuple[float, float, float]:
    """Return left, top and right of the image inside its bucket; margins are rounded down."""
    ratio = image[0] / image[1]
    if bucket[0] / bucket[1] > ratio:
        width, height = bucket[1] * ratio, float(bucket[1])
    else:
        width, height = float(bucket[0]), bucket[0] / ratio
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width
