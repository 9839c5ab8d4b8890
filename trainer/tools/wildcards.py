"""Prompts that stand for several: {red|blue} for each of both, and a prompt without its trigger words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import torch

from ..errors import LoraGraftError
from ..objective import generator

CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")  # braces without a bar are text
MOST = 100


def expand_wildcards(prompt: str) -> list[str]:
    """Return every combination of a prompt's choices, the last one changing fastest; raises LG-TOOL-017."""
    texts, choices = _parts(prompt)
    count = 1
    for options in choices:
        count *= len(options)
    if count > MOST:
        raise LoraGraftError(
            "LG-TOOL-017",
            f"A prompt stands for {count} prompts; {MOST} is the most.",
            where=f"{prompt[:80]!r}",
            why="every combination of its choices is drawn.",
            fix="write fewer choices, or let each seed pick one",
        )
    return [_joined(texts, picked) for picked in itertools.product(*choices)]


def pick_wildcards(prompt: str, seed: int) -> str:
    """Return one combination of a prompt's choices: the same for the same seed."""
    texts, choices = _parts(prompt)
    rng = generator(seed, "wildcards")
    picked = [options[int(torch.randint(len(options), (), generator=rng))] for options in choices]
    return _joined(texts, picked)


def without_words(prompt: str, words: str) -> str:
    """Return a prompt without trigger words: ``words`` are separated by commas, each taken out where it
    stands whole.

    Commas that a word leaves behind go too.
    """
    for word in (w.strip() for w in words.split(",")):
        if word:
            prompt = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "", prompt, flags=re.IGNORECASE)
    kept = (" ".join(part.split()) for part in prompt.split(","))
    return ", ".join(part for part in kept if part)


def _parts(prompt: str) -> tuple[list[str], list[list[str]]]:
    """Return the texts between the choices, and each choice's options."""
    pieces = CHOICE.split(prompt)
    return pieces[::2], [[option.strip() for option in piece.split("|")] for piece in pieces[1::2]]


def _joined(texts: Sequence[str], picked: Sequence[str]) -> str:
    whole = "".join(itertools.chain(*itertools.zip_longest(texts, picked, fillvalue="")))
    return " ".join(whole.split())
