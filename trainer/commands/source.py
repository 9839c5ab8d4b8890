"""Where a command's dataset comes from: an image folder, read as its flags say, or a dataset file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

from .. import api
from ..errors import LoraGraftError
from .help_text import default_text

SUFFIX = ".json"


def add_source(command: argparse.ArgumentParser) -> None:
    """Give a command the flags that say how an image folder is read."""
    group = command.add_argument_group("reading a folder")
    hints = typing.get_type_hints(api.ScanOptions)
    for item in dataclasses.fields(api.ScanOptions):
        info, hint = item.metadata["info"], hints[item.name]
        initial: Any = item.default
        default = " ".join(map(str, initial)) if isinstance(initial, tuple) else initial
        common: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{info.help}{default_text(default)}".replace("%", "%%"),
        }
        if hint is bool:
            group.add_argument(f"--{item.name}", action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(hint) is tuple:
            kind = typing.get_args(hint)[0]
            count = "+" if ... in typing.get_args(hint) else len(initial)
            group.add_argument(f"--{item.name}", type=kind, nargs=count, **common)
        else:
            group.add_argument(f"--{item.name}", type=hint, choices=info.choices or None, **common)


def open_dataset(path: str, arguments: argparse.Namespace) -> api.Dataset:
    """Open the image folder or dataset file that a command names; 'demo' is the embedded folder.

    Raises LG-DATA-028 where flags about reading a folder are given for a dataset file.
    """
    given: dict[str, Any] = {}
    for item in dataclasses.fields(api.ScanOptions):
        value = getattr(arguments, item.name, None)
        if value is not None and value != item.default:
            given[item.name] = tuple(value) if isinstance(value, list) else value
    if path.casefold().endswith(SUFFIX) and not Path(path).is_dir():
        if given:
            raise LoraGraftError(
                "LG-DATA-028",
                "Flags about reading a folder do nothing for a dataset file.",
                where=", ".join(f"--{name}" for name in given),
                why=f"{Path(path).name} holds the records as they were when it was written.",
                fix="leave these flags out, or give the image folder",
            )
        return api.load_dataset(path)
    folder = api.demo_dataset() if path == "demo" else Path(path)
    with Counter("images") as counter:
        return api.scan_folder(folder, progress=counter, **given)


class Counter:
    """A line on the terminal that counts what is done; silent where the output is no terminal."""

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._shown = False

    def __enter__(self) -> Counter:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is."""
        if sys.stderr.isatty() and (done == total or done % 10 == 0):
            print(f"\r{done} of {total} {self._noun}", end="", file=sys.stderr, flush=True)
            self._shown = True

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print(file=sys.stderr)
