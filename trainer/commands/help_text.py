"""How the help of a command reads: real defaults only, and a short usage line where flags are many."""

from __future__ import annotations

import argparse
from typing import Any

NO_WORDS = "none (no caption holds class words)"  # in the place of trigger words
NOTHING: tuple[Any, ...] = ("", [], ())


class Parser(argparse.ArgumentParser):
    """A parser, and that of each command below it, that takes flags by their whole name alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names a flag's default where it has one; none, off and empty go without saying."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in NOTHING:
            return action.help
        return super()._get_help_string(action)


def default_text(value: object) -> str:
    """Return the words on a setting's default behind its help; "" where there is nothing to say."""
    if value is None or value == "" or value == ():
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f" Default: {text}."
