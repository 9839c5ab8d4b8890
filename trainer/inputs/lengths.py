"""How long a run's captions are: what is cut of them, and how many places they take."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

from ..config import TrainConfig
from ..data.captions import as_static, fixed_captions, vary_caption
from ..data.train_set import TrainSet
from ..families.base import Family, Reading, Room
from ..parts import Parts

REPEATS, MOST_REPEATS = "tokenizer_repeats", 10  # max_token_length in other words, counted in chunks


def cut_line(
    family: Family, parts: Parts, sets: Iterable[TrainSet], config: TrainConfig, reading: Reading
) -> str | None:
    """Return a line on captions that are longer than the base model reads, None where there are none.

    What varies of a caption is counted as it is before it varies.
    """
    texts = [
        (record.name, vary_caption(record.caption, as_static(data), random.Random(0)))
        for data_set in sets
        for record, data in zip(data_set.records, data_set.configs, strict=True)
    ]
    different = sorted({text for _, text in texts})
    room = family.room(parts, different, reading) if texts else None
    if room is None:
        return None
    lengths = dict(zip(different, room.lengths, strict=True))
    cut = [(name, lengths[text]) for name, text in texts if lengths[text] > room.limit]
    if not cut:
        return None
    count, longest = len(cut), max(length for _, length in cut)
    several = f"{count} of {len(texts)} captions are longer than the base model reads, and their ends are cut"
    one = f"1 of {len(texts)} captions is longer than the base model reads, and its end is cut"
    return (
        f"Warning: {several if count > 1 else one}: up to {longest} tokens, of which {room.limit} are read; "
        f"the first is of {cut[0][0]}; {_remedy(room, longest, config)}"
    )


def fitted(family: Family, parts: Parts, train_set: TrainSet, reading: Reading) -> Reading:
    """Return the reading with the fewest places that hold all captions, where further ones change nothing.

    A function of captions and settings alone, whatever the number of steps, and so the same for all steps of
    a run and when it is continued: captions that change from use to use leave the reading as it is.
    """
    texts: set[str] = set()
    for record, data in zip(train_set.records, train_set.configs, strict=True):
        forms = fixed_captions(record.caption, data)
        if forms is None:
            return reading
        texts.update(forms)
    room = family.room(parts, sorted(texts), reading) if texts else None
    if room is None or room.padding is None:
        return reading
    return replace(reading, t5_length=min(room.limit, room.up(max(room.lengths) + room.padding)))


def _remedy(room: Room, longest: int, config: TrainConfig) -> str:
    """Say which setting reads more, and how much of it is needed, as far as it goes."""
    setting, enough, most, limit = room.setting, room.up(longest), room.most, room.limit
    if setting == "max_token_length" and config.tokenizer_repeats is not None:
        setting, limit = REPEATS, config.tokenizer_repeats
        enough, most = enough // room.step, MOST_REPEATS
    if enough <= most:
        return f"set {setting} to {enough}, or shorten them"
    return f"set {setting} to {most} and shorten the longest" if limit < most else "shorten them"
