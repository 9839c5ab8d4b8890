"""What becomes of a caption each time it is used: dropout, shuffle, tag dropout, in kohya's order."""

from __future__ import annotations

import random

from ..config import DatasetConfig

# kohya joins with this whatever separates the tags.
JOINED_BY = ", "


def tags_of(caption: str, separator: str) -> list[str]:
    """Split a caption into its tags; empty ones (a trailing comma) are dropped."""
    parts = caption.split(separator) if separator else [caption]
    return [tag for part in parts if (tag := part.strip())]


def vary_caption(caption: str, config: DatasetConfig, rng: random.Random) -> str:
    """Return the caption as one training step sees it.

    Draws from ``rng`` only for settings that are on, so that switching one on does not change what
    another one draws before it. Only the first line counts.
    """
    if config.caption_dropout_rate > 0 and rng.random() < config.caption_dropout_rate:
        return ""
    caption = caption.split("\n", 1)[0]
    if not config.shuffle_caption and config.caption_tag_dropout_rate <= 0:
        return caption
    tags = tags_of(caption, config.caption_separator)
    kept, free = tags[: config.keep_tokens], tags[config.keep_tokens :]
    if config.shuffle_caption:
        rng.shuffle(free)
    if config.caption_tag_dropout_rate > 0:
        free = [tag for tag in free if rng.random() >= config.caption_tag_dropout_rate]
    return JOINED_BY.join(kept + free)


def is_varied(config: DatasetConfig) -> bool:
    """Say whether a caption can differ from use to use, so that its embedding cannot be computed once."""
    return config.caption_dropout_rate > 0 or config.shuffle_caption or config.caption_tag_dropout_rate > 0
