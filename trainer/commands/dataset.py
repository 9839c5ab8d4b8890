"""``loragraft dataset ...``: every step from raw files to a training set, one subcommand each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import dataset_build, dataset_captions, dataset_images, dataset_pictures


def add(commands: Any) -> None:
    """Add the command and its subcommands to the parser."""
    command = commands.add_parser("dataset", help="prepare and inspect training images")
    steps = command.add_subparsers(required=True, metavar="STEP")
    for add_step in STEPS:
        add_step(steps)


STEPS: tuple[Callable[[Any], None], ...] = (
    *dataset_images.STEPS,
    *dataset_pictures.STEPS,
    *dataset_captions.STEPS,
    *dataset_build.STEPS,
)
