"""What becomes of a caption each time it is used: kohya's steps in kohya's order, then a template.

Prefix and suffix, dropout, wildcards and line, kept tags, token warm-up, shuffle, tag dropout, join,
secondary separator. Two things differ where the reference loses text without a word: prefix and
suffix stand at the line that is used (there: at the first and at the last of several), and the mark
of ``keep_tokens_separator`` never stays in a caption (there: it does where nothing is shuffled).
"""

from __future__ import annotations

import dataclasses
import math
import random
import re

from ..config import DatasetConfig

# kohya joins with this whatever separates the tags.
JOINED_BY = ", "
WILDCARD = re.compile(r"\{([^}]+)\}")
PLACE = "{caption}"


def tags_of(caption: str, separator: str) -> list[str]:
    """Split a caption into its tags; empty ones (a trailing comma) are dropped."""
    parts = caption.split(separator) if separator else [caption]
    return [tag for part in parts if (tag := part.strip())]


def vary_caption(
    caption: str,
    config: DatasetConfig,
    rng: random.Random,
    *,
    epoch: int = 0,
    step: int = 0,
    total_steps: int = 1,
) -> str:
    """Return the caption as one training step sees it; ``epoch`` and ``step`` count from 0.

    Draws from ``rng`` only for settings that are on, so that switching one on does not change what
    another one draws before it. ``total_steps`` serves a ``token_warmup_step`` below 1.
    """
    if config.caption_dropout_rate > 0 and rng.random() < config.caption_dropout_rate:
        return ""
    if drops_epoch(config, epoch):
        return ""
    caption = _line(caption, config, rng)
    if config.enable_wildcard:
        caption = _pick_wildcards(caption, rng)
    before, free, after = split_kept(caption, config)
    if _is_tagwise(config):
        free = free[: _num_warm(len(free), config, step, total_steps)]
        if config.shuffle_caption:
            rng.shuffle(free)
        if config.caption_tag_dropout_rate > 0:
            free = [tag for tag in free if rng.random() >= config.caption_tag_dropout_rate]
        caption = JOINED_BY.join(before + free + after)
    elif _is_marked(caption, config):
        caption = JOINED_BY.join(before + free + after)
    if config.secondary_separator:
        caption = caption.replace(config.secondary_separator, config.caption_separator)
    return _framed(caption, config, rng)


def is_varied(config: DatasetConfig) -> bool:
    """Say whether a caption can differ from use to use, so that its embedding cannot be computed once."""
    return _is_dropped(config) or _is_tagwise(config) or _picks(config)


def fixed_captions(caption: str, config: DatasetConfig) -> tuple[str, ...] | None:
    """Return every text that `vary_caption` can give, or None where its tags or words change at random.

    These can be encoded once: the caption itself, and "" where it may be dropped.
    """
    if _is_tagwise(config) or _picks(config):
        return None
    plain = vary_caption(caption, as_static(config), random.Random(0))
    return (plain, "") if _is_dropped(config) and plain else (plain,)


def as_static(config: DatasetConfig) -> DatasetConfig:
    """Return the settings without what changes a sample from use to use, for validation and reports.

    Wildcards still pick: give `vary_caption` a generator of a fixed seed.
    """
    template = config.caption_template.splitlines()[0] if config.caption_template else ""
    return dataclasses.replace(
        config,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        shuffle_caption=False,
        token_warmup_step=0,
        flip_aug=False,
        caption_template=template,
    )


def drops_epoch(config: DatasetConfig, epoch: int) -> bool:
    """Say whether epoch ``epoch`` (from 0; kohya counts from 1) goes without captions."""
    every = config.caption_dropout_every_n_epochs
    return every > 0 and (epoch + 1) % every == 0


def split_kept(caption: str, config: DatasetConfig) -> tuple[list[str], list[str], list[str]]:
    """Return the tags that stay in front, those that may move or go, and those that stay behind."""
    if _is_marked(caption, config):
        front, *rest = caption.split(config.keep_tokens_separator, 2)
        parts = [tags_of(part, config.caption_separator) for part in (front, *rest)]
        return parts[0], parts[1], parts[2] if len(parts) > 2 else []
    tags = tags_of(caption, config.caption_separator)
    return tags[: config.keep_tokens], tags[config.keep_tokens :], []


# ---- the steps ----


def _line(caption: str, config: DatasetConfig, rng: random.Random) -> str:
    """Return the line that counts, with prefix and suffix: the first, or any where wildcards are on."""
    lines = caption.split("\n")
    line = rng.choice(lines) if config.enable_wildcard and len(lines) > 1 else lines[0]
    if config.caption_prefix:
        line = f"{config.caption_prefix} {line}"
    return f"{line} {config.caption_suffix}" if config.caption_suffix else line


def _pick_wildcards(caption: str, rng: random.Random) -> str:
    """Replace each {a|b} by one of its words; {{ and }} stand for braces."""
    left, right = "\ue000", "\ue001"
    while left in caption or right in caption:  # a caption may hold any character
        left, right = left + "\ue000", right + "\ue001"
    caption = caption.replace("{{", left).replace("}}", right)
    caption = WILDCARD.sub(lambda match: rng.choice(match[1].split("|")), caption)
    return caption.replace(left, "{").replace(right, "}")


def _num_warm(num_tags: int, config: DatasetConfig, step: int, total_steps: int) -> int:
    """Return how many of the free tags the token warm-up lets through at this step."""
    warmup = config.token_warmup_step
    if warmup < 1:
        warmup = math.floor(warmup * total_steps)
    if not warmup or step >= warmup:
        return num_tags
    grown = math.floor(step * ((num_tags - config.token_warmup_min) / warmup)) + config.token_warmup_min
    return max(0, min(num_tags, grown))


def _framed(caption: str, config: DatasetConfig, rng: random.Random) -> str:
    if not config.caption_template:
        return caption
    lines = [line for line in config.caption_template.splitlines() if line.strip()]
    line = rng.choice(lines) if len(lines) > 1 else lines[0]
    return line.replace(PLACE, caption)


def _is_marked(caption: str, config: DatasetConfig) -> bool:
    return bool(config.keep_tokens_separator) and config.keep_tokens_separator in caption


def _is_tagwise(config: DatasetConfig) -> bool:
    return config.shuffle_caption or config.caption_tag_dropout_rate > 0 or config.token_warmup_step > 0


def _is_dropped(config: DatasetConfig) -> bool:
    return config.caption_dropout_rate > 0 or config.caption_dropout_every_n_epochs > 0


def _picks(config: DatasetConfig) -> bool:
    return config.enable_wildcard or len(config.caption_template.splitlines()) > 1
