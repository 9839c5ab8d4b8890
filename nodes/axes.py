"""A preview's axes: which LoRA files, strengths, prompts and seeds make which cells. No host needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..trainer import api
from ..trainer.errors import LoraGraftError
from ..trainer.sweep import shared_start

MAX_CELLS = 400
SAME = "same"
FINAL = "final"
WILDCARDS = ("all", "by seed", "off")  # what {a|b} in a prompt stands for
LONG = 20  # letters of a file's name that a row's label shows whole even beside small cells


@dataclass(frozen=True)
class Weights:
    """One LoRA file to test; ``label`` names its row ("step 200")."""

    path: Path
    label: str


@dataclass(frozen=True)
class Row:
    """One grid row: a LoRA at two strengths; ``weights`` is None for the base model alone."""

    weights: Weights | None
    strength_model: float
    strength_clip: float

    @property
    def label(self) -> str:
        if self.weights is None:
            return "without LoRA"
        if self.strength_model == self.strength_clip:
            return f"{self.weights.label}\nstrength {self.strength_model:g}"
        return f"{self.weights.label}\nmodel {self.strength_model:g}\nCLIP {self.strength_clip:g}"


@dataclass(frozen=True)
class Column:
    """One prompt with one seed; ``untriggered`` where its trigger words were taken out."""

    prompt: str
    seed: int
    untriggered: bool = False

    @property
    def label(self) -> str:
        aside = "\nwithout trigger" if self.untriggered else ""
        return f"{self.prompt}{aside}\nseed {self.seed}"


@dataclass(frozen=True)
class Settings:
    """What all cells share; width and height in pixels."""

    negative: str
    sampler_name: str
    scheduler: str
    steps: int
    cfg: float
    width: int
    height: int
    batch_size: int

    @property
    def title(self) -> str:
        """One line that tells how the cells were drawn."""
        return (
            f"{self.sampler_name} {self.scheduler}, {self.steps} steps, cfg {self.cfg:g}, "
            f"{self.width} x {self.height}"
        )


def labels(columns: Sequence[Column], batch_size: int) -> list[str]:
    """Return one label per image of a row; images of a batch are numbered."""
    if batch_size == 1:
        return [c.label for c in columns]
    return [f"{c.label} #{b + 1}" for c in columns for b in range(batch_size)]


def rows(files: Sequence[Weights], strengths: str, clip_strengths: str) -> list[Row]:
    """List the rows: the base model once if any strength is 0, then every file at every strength.

    ``strengths`` and ``clip_strengths`` are ranges ("0, 0.7-1.5 [5]"); the latter may be "same".
    """
    models = api.parse_range(strengths)
    if clip_strengths.strip().lower() == SAME:
        pairs = [(s, s) for s in models]
    else:
        pairs = [(m, c) for m in models for c in api.parse_range(clip_strengths)]
    base = [Row(None, 0.0, 0.0)] if (0.0, 0.0) in pairs else []
    return base + [Row(f, m, c) for f in files for m, c in pairs if (m, c) != (0.0, 0.0)]


def finished(files: Sequence[Path]) -> list[Weights]:
    """Label finished files: one is "final"; several have their names, less a long one's common beginning."""
    if len(files) == 1:
        return [Weights(files[0], FINAL)]
    names = [file.stem for file in files]
    cut = shared_start(names) if max(map(len, names), default=0) > LONG else 0
    return [Weights(file, name[cut:]) for file, name in zip(files, names, strict=True)]


def columns(prompts: str, seeds: str, wildcards: str = "off", trigger: str = "") -> list[Column]:
    """List the columns: every prompt (one per line) with every seed; an empty text is one empty prompt.

    {a|b} stands for a column each ("all"), for one that the seed picks ("by seed"), or for itself ("off").
    A prompt that holds ``trigger`` words gets columns without them as well. Raises LG-TOOL-017.
    """
    lines = [line.strip() for line in prompts.splitlines() if line.strip()] or [""]
    if wildcards == "all":
        lines = list(dict.fromkeys(text for line in lines for text in api.expand_wildcards(line)))
    numbers = parse_seeds(seeds)
    result = []
    for line in lines:
        picked = [api.pick_wildcards(line, s) if wildcards == "by seed" else line for s in numbers]
        result += [Column(prompt, seed) for prompt, seed in zip(picked, numbers, strict=True)]
        bare = [api.without_words(prompt, trigger) if trigger.strip() else prompt for prompt in picked]
        both = zip(picked, bare, numbers, strict=True)
        result += [Column(plain, seed, True) for prompt, plain, seed in both if plain != prompt]
    return result


def parse_seeds(text: str) -> list[int]:
    """Read seeds: whole numbers and ranges separated by commas, "1, 2, 5-8"; each 0 to 2**64-1."""
    seeds: list[int] = []
    for part in text.replace("\n", ",").split(","):
        if not part.strip():
            continue
        match = re.fullmatch(r"\s*([0-9]{1,20})\s*(?:-\s*([0-9]{1,20})\s*)?", part)
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if not match or not first <= last < 2**64 or last - first >= MAX_CELLS:
            raise LoraGraftError(
                "LG-NODE-011",
                f"Seeds {text.strip()[:60]!r} cannot be read.",
                where=f"Preview with LoRA: seeds, at {part.strip()[:40]!r}",
                why=f"seeds are whole numbers from 0 to 2**64-1 or rising ranges of at most {MAX_CELLS}.",
                fix="write for instance 1, 2, 5-8",
            )
        seeds.extend(range(first, last + 1))
    if not seeds:
        raise LoraGraftError(
            "LG-NODE-011",
            "No seed is given.",
            where="Preview with LoRA: seeds",
            why="every cell is drawn from a seed.",
            fix="write for instance 1, 2, 5-8",
        )
    return list(dict.fromkeys(seeds))


def check_size(num_rows: int, num_columns: int, batch: int) -> None:
    """Refuse a grid of more than MAX_CELLS images."""
    count = num_rows * num_columns * batch
    if count > MAX_CELLS:
        raise LoraGraftError(
            "LG-NODE-015",
            f"The grid would have {count} images; {MAX_CELLS} is the most.",
            where=f"Preview with LoRA: {num_rows} rows, {num_columns} columns, batch {batch}",
            why="it would take hours, and no viewer shows such an image.",
            fix="use fewer seeds, prompts, strengths or checkpoints",
        )


def spread(files: Sequence[Weights], most: int) -> list[Weights]:
    """Pick at most ``most`` files evenly, the last one always among them."""
    if len(files) <= most:
        return list(files)
    if most == 1:
        return [files[-1]]
    return [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]
