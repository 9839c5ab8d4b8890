"""Block weights: factors on the denoiser's learning rate, one for each block, written as kohya does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .config import TrainConfig
from .errors import listed

# Position i of n blocks -> weight. Down and up blocks are counted as the data passes through them.
CURVES: Mapping[str, Callable[[int, int], float]] = {
    "sine": lambda i, n: math.sin(math.pi * (i / (n - 1)) / 2),
    "cosine": lambda i, n: math.sin(math.pi * ((n - 1 - i) / (n - 1)) / 2),
    "linear": lambda i, n: i / (n - 1),
    "reverse_linear": lambda i, n: (n - 1 - i) / (n - 1),
    "zeros": lambda i, n: 0.0,
}
WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
_PRESET = re.compile(r"([a-z_]+)\s*([+-]\s*[0-9.]+(?:e[+-]?[0-9]+)?)?")


@dataclass(frozen=True)
class Blocks:
    """How many blocks a denoiser has; ``before`` and ``after`` are layers around them, of weight 1."""

    down: int
    mid: int
    up: int
    before: int = 0
    after: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Name every block, in the order of its index."""
        counts = (("before", self.before), ("down", self.down), ("mid", self.mid), ("up", self.up))
        named = [f"{kind} {i}" for kind, count in counts for i in range(count)]
        return (*named, *(f"after {i}" for i in range(self.after)))

    @property
    def counts(self) -> tuple[int, int, int]:
        """The numbers of down, middle and up blocks."""
        return self.down, self.mid, self.up


SD1 = Blocks(12, 1, 12)
SDXL = Blocks(9, 3, 9, before=1, after=1)  # embeddings, and the output layers


def block_lr_weights(config: TrainConfig, blocks: Blocks) -> tuple[float, ...] | None:
    """Return the weight of every block, by its index; None where no weight is set.

    A list that is too short is filled up with 1, the rest of one that is too long is left out (`notes`
    says so); what is not above block_lr_zero_threshold becomes 0. Raises ValueError for other text.
    """
    texts = [getattr(config, name) for name in WEIGHTS]
    if not any(texts):
        return None
    inside: list[float] = []
    for name, text, count in zip(WEIGHTS, texts, blocks.counts, strict=True):
        weights = parsed(text, count, single=name == "mid_lr_weight") if text else [1.0] * count
        weights = (weights + [1.0] * count)[:count]
        lowest = config.block_lr_zero_threshold
        inside += [w if w > lowest or not text else 0.0 for w in weights]
    return (*[1.0] * blocks.before, *inside, *[1.0] * blocks.after)


def zero_blocks(config: TrainConfig, blocks: Blocks) -> frozenset[int]:
    """Return the indices of the blocks that are not trained."""
    weights = block_lr_weights(config, blocks) or ()
    return frozenset(index for index, weight in enumerate(weights) if weight == 0)


def parsed(text: str, count: int, *, single: bool = False) -> list[float]:
    """Read one setting for ``count`` blocks: a preset with an offset, a list, or one number.

    A number stands for all blocks, or where ``single`` for the first. Raises ValueError with the reason.
    """
    text = text.strip()
    if "," in text:  # an empty item is 0, as in the reference
        return [_number(item.strip() or "0") for item in text.split(",")]
    found = _PRESET.fullmatch(text)
    if found and found[1] in CURVES and not single:
        offset = _number(found[2].replace(" ", "")) if found[2] else 0.0
        return [CURVES[found[1]](i, count) + offset for i in range(count)]
    value = _number(text)
    return [value] if single else [value] * count


def notes(config: TrainConfig, blocks: Blocks) -> Iterator[str]:
    """Say which lists are shorter or longer than there are blocks, and which blocks stand still."""
    for name, count in zip(WEIGHTS, blocks.counts, strict=True):
        text = getattr(config, name)
        if not text or ("," not in text and name != "mid_lr_weight"):
            continue
        given = len(parsed(text, count, single=name == "mid_lr_weight"))
        if given < count:
            yield f"{name} has {given} of {count} values; the other blocks have weight 1"
        if given > count:
            yield f"{name} has {given} values for {count} blocks; the last {given - count} are not used"
    if still := zero_blocks(config, blocks):
        names = listed((blocks.names[index] for index in sorted(still)), limit=25)
        yield f"not trained, as their weight is not above {config.block_lr_zero_threshold:g}: {names}"


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"'{text[:40]}' is neither a number nor one of {', '.join(CURVES)}") from None
    if not math.isfinite(value) or abs(value) > 1000:
        raise ValueError(f"{text[:40]} is no number between -1000 and 1000")
    return value
