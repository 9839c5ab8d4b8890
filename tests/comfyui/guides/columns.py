"""Columns of nodes, each in a frame, and the settings that suit the tiny base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loragraft.trainer.demo import run as demo_run
from loragraft.trainer.demo.creatures import HERO_SEED, creature
from loragraft_tests.comfyui.sheet import Sheet

TRIGGER = creature(HERO_SEED).name
PROMPT = f"{TRIGGER}, large, blue background"
DATASET = {
    key: value for key, value in demo_run.DATASET.items() if key not in ("shuffle_caption", "keep_tokens")
}
TAGS = {**DATASET, "shuffle_caption": True, "keep_tokens": 1}
TRAINING = {**demo_run.TRAINING, "lr_warmup_steps": 0.05}
DRAWING = {
    "steps": demo_run.DRAWING.steps,
    "cfg": demo_run.DRAWING.cfg,
    "width": demo_run.DRAWING.size[1],
    "height": demo_run.DRAWING.size[0],
}
TOP, WIDE, SPACE = 40, 380, 80  # where columns begin, how wide they are, and what lies between them


class Columns:
    """Columns of nodes from left to right, each in a frame."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet
        self.left, self.width, self.ids = 40, 0, list[int]()

    def begin(self, width: int = WIDE) -> None:
        """Begin the next column."""
        self.left += self.width + SPACE if self.width else 0
        self.width, self.ids = width, []

    def _top(self) -> int:
        return self.sheet.below(self.ids[-1]) if self.ids else TOP

    def note(self, text: str, height: int, title: str = "From the guide") -> None:
        """Add a note below the column's last node; the first of all says what the workflow is about."""
        title = title if self.sheet.nodes else "About"
        self.ids.append(self.sheet.note(text, (self.left, self._top()), (self.width, height), title))

    def add(
        self,
        kind: str,
        height: int,
        values: Mapping[str, Any] | None = None,
        *,
        title: str = "",
        mode: int = 0,
    ) -> int:
        """Add a node below the column's last one; return its id."""
        pos, size = (self.left, self._top()), (self.width, height)
        self.ids.append(self.sheet.add(kind, pos, size, values, title=title, mode=mode))
        return self.ids[-1]

    def frame(self, title: str) -> None:
        """Frame the column."""
        self.sheet.frame(title, self.ids)


def link_base(sheet: Sheet, base: int, *targets: int) -> None:
    """Link the base's MODEL, CLIP and VAE to each of the nodes."""
    for target in targets:
        for slot, name in enumerate(("model", "clip", "vae")):
            sheet.link(base, slot, target, name)
