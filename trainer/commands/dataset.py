"""``loragraft dataset ...``: every step from raw files to a training set, one subcommand each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import api
from ..config import DatasetConfig
from .settings import add_config_flags, read_settings


def add(commands: Any) -> None:
    """Add the command and its subcommands to the parser."""
    command = commands.add_parser("dataset", help="prepare and inspect training images")
    steps = command.add_subparsers(required=True, metavar="STEP")
    for add_step in STEPS:
        add_step(steps)


def add_source(command: argparse.ArgumentParser) -> None:
    """Give a step the flags that `open_dataset` reads."""
    command.add_argument("--class_tokens", default="", help="class words where the folder name gives none")
    command.add_argument(
        "--on_bad", choices=("stop", "skip"), default="stop", help="what to do about unreadable images"
    )


def open_dataset(path: str, arguments: argparse.Namespace) -> api.Dataset:
    """Open the image folder that a command names; 'demo' is the embedded one."""
    folder = api.demo_dataset() if path == "demo" else Path(path)
    return api.scan_folder(folder, on_bad=arguments.on_bad, class_tokens=arguments.class_tokens)


def _add_report(steps: Any) -> None:
    command = steps.add_parser(
        "report",
        help="show what a folder would be trained as",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=report)
    command.add_argument("--config", help="TOML file of settings; flags win over it")
    command.add_argument("--train_data_dir", help="image folder, or 'demo'")
    add_source(command)
    add_config_flags(command, DatasetConfig)


def report(arguments: argparse.Namespace) -> int:
    """Print images, buckets and captions; returns 0."""
    settings, (path,) = read_settings(arguments, "train_data_dir")
    config, _ = api.make_both(settings, where=str(arguments.config or "command line"))
    dataset = open_dataset(path, arguments)
    print("\n".join((*dataset.lines, *api.build_train_set(dataset, config).lines)))
    return 0


STEPS: tuple[Callable[[Any], None], ...] = (_add_report,)
