"""The words of `train_embeddings`: where their embeddings begin, and how they are kept.

Gal et al. 2022, "An image is worth one word" (textual inversion), along with a LoRA as in HCP-Diffusion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from ..config import TrainConfig
from ..contradictions.refusals import contradiction
from ..data.train_set import TrainSet
from ..engine.precision import Precision
from ..families.opening import Base
from ..families.text.clip_tokens import has_word
from ..families.text.words import add_words, word_rows
from ..objective import generator
from ..parts import Parts
from ..settings.words import Word, parse_words

STATE = "embedding."


class Words:
    """The trained embeddings of a run, (vectors, D) float32 a word; none where no word is named.

    Raises LG-CFG-004 for a word that no caption has.
    """

    def __init__(
        self, base: Base, parts: Parts, train_set: TrainSet, config: TrainConfig, precision: Precision
    ) -> None:
        found = parse_words(config.train_embeddings)
        self.vectors: dict[str, nn.Parameter] = {}
        for word in found:
            _check_used(word.word, train_set)
            rows = _first_rows(base, parts, word, config.seed)
            self.vectors[word.word] = nn.Parameter(rows.to(precision.device))
        if found:
            add_words(parts, self.vectors)

    def parameters(self) -> list[nn.Parameter]:
        """Return all trained embeddings."""
        return list(self.vectors.values())

    def state(self) -> dict[str, torch.Tensor]:
        """Return a copy of the embeddings as a training state holds them."""
        return {STATE + word: rows.detach().clone().cpu() for word, rows in self.vectors.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the embeddings from a training state; raises KeyError, RuntimeError if they are not there."""
        with torch.no_grad():
            for word, rows in self.vectors.items():
                rows.copy_(state[STATE + word])

    def saved(self) -> dict[str, list[list[float]]]:
        """Return the embeddings as JSON holds them; float32 keeps every bit."""
        return {word: rows.detach().cpu().tolist() for word, rows in self.vectors.items()}

    def lines(self, name: str) -> list[str]:
        """Say what is trained and how it is used; ``name`` is the LoRA's."""
        return [
            f"trains the embedding of '{word}' with {len(rows)} vectors as {name}-{word}.safetensors; "
            f"ComfyUI finds it in models/embeddings{_use(f'{name}-{word}')}"
            for word, rows in self.vectors.items()
        ]


def _use(file: str) -> str:
    """Say how a prompt has the embedding; ComfyUI takes its name up to the first space or bracket."""
    called = re.sub(r"[\s<\[]+", "_", file)
    renamed = "" if called == file else f" as {called}.safetensors"
    return f"{renamed}, where a prompt calls it embedding:{called}"


def _first_rows(base: Base, parts: Parts, word: Word, seed: int) -> torch.Tensor:
    """Return where a word's embedding begins: at the tokens of its text, over and over, or at random."""
    rows = word_rows(parts, word.init)
    if word.init:
        count = word.vectors or len(rows)
        return rows[torch.arange(count) % len(rows)].clone()
    shape = word.vectors or 1, rows.shape[1]
    noise = torch.randn(shape, generator=generator(seed, "embedding", word.word))
    return noise * rows.std(dim=0) + rows.mean(dim=0)


def _check_used(word: str, train_set: TrainSet) -> None:
    for record, data in zip(train_set.records, train_set.configs, strict=True):
        texts = record.caption, data.caption_prefix, data.caption_suffix, data.caption_template
        if any(has_word(text, word) for text in texts):
            return
    raise contradiction(
        f"train_embeddings names '{word}', but no caption has this word.",
        "train_embeddings",
        why="its embedding would never change.",
        fix=f"write {word} into the captions, for instance with caption_prefix, or name a word of theirs",
    )
