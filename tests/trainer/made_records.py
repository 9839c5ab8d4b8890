"""Datasets that exist on no disk, folders that do, and what a train set says of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from loragraft.trainer.data.records import Dataset, Record
from loragraft.trainer.data.train_set import TrainSet

S = (48, 32)
FILES: dict[str, Any] = {
    "3_x/a.png": S,
    "3_x/a.txt": "one, two",
    "3_x/b.png": S,
    "c.png": S,
    "c.txt": "three",
}


def records(*sizes: tuple[int, int], repeats: int = 1, caption: str = "a, b") -> Dataset:
    """Return a dataset of images (width, height) that exist on no disk."""
    made = tuple(
        Record(Path(f"/set/{i}.png"), f"{i}.png", (h, w), caption, "thing", repeats, f"{i:064x}")
        for i, (w, h) in enumerate(sizes)
    )
    return Dataset(Path("/set"), made, ())


def said(train_set: TrainSet, *texts: str) -> bool:
    return any(all(text in line for text in texts) for line in train_set.lines)


def edited(dataset: Dataset, number: int, **changes: Any) -> Dataset:
    made = list(dataset.records)
    made[number] = dataclasses.replace(made[number], **changes)
    return dataset.replaced(made)
