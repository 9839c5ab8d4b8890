"""Settings that the data gives nothing to work on: refused, or said before step 1."""

from __future__ import annotations

from ..config import TrainConfig
from ..contradictions.refusals import contradiction
from ..data.train_set import TrainSet


def check_used(train_set: TrainSet, config: TrainConfig) -> list[str]:
    """Return warnings on settings without effect on this data; raises LG-CFG-004 for a scale of no mask."""
    if config.mask_range != "kohya" and not any(record.mask for record in train_set.records):
        raise contradiction(
            f"mask_range is '{config.mask_range}', but no picture has a mask.",
            "mask_range",
            why="there are no greys that it could give a meaning.",
            fix="give Load Image Folder the folder of masks, or set mask_range to 'kohya'",
        )
    if config.weighted_captions and not any(_has_brackets(train_set)):
        return ["Warning: weighted_captions is on, but no caption has brackets, so nothing is weighed"]
    return []


def _has_brackets(train_set: TrainSet) -> list[bool]:
    found = []
    for record, data in zip(train_set.records, train_set.configs, strict=True):
        texts = record.caption, data.caption_prefix, data.caption_suffix, data.caption_template
        found.append(any(mark in text for text in texts for mark in "(["))
    return found
