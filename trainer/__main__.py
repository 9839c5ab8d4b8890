"""The command line: ``loragraft`` or ``python -m loragraft.trainer``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence

from . import pages as pages  # before anything that imports torch
from .commands import dataset, preview, sample, tools_checkpoint, tools_lora, train
from .commands.help_text import Parser
from .errors import LoraGraftError, listed, nearest
from .paths import of_other_system


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 refused with a message, 130 stopped."""
    arguments, unknown = parser().parse_known_args(argv)
    try:
        if unknown:
            raise _unknown(unknown, vars(arguments).keys() - {"run"})
        return int(arguments.run(arguments))
    except LoraGraftError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(_unreachable(error), file=sys.stderr)
    return 1


def _unknown(given: Sequence[str], known: Collection[str]) -> LoraGraftError:
    """Return the refusal of flags that the command does not have, and of words that belong to none."""
    flags = [word.partition("=")[0] for word in given if word.startswith("-")]
    names = [flag.lstrip("-").replace("-", "_") for flag in flags]
    near = dict.fromkeys(f"--{found}" for name in names for found in _near(name, known))
    return LoraGraftError(
        "LG-CLI-005",
        f"The command has no {listed(flags or given)}.",
        where="command line",
        why="a misspelt flag would be left out, and nobody would notice."
        if flags
        else "a text with spaces in it must stand in quotes.",
        fix=f"did you mean {listed(near)}?" if near else "see --help behind the command's name",
    )


def _near(name: str, known: Collection[str]) -> list[str]:
    """Return the flags that begin with a name, at most three, or the one most like it."""
    begun = sorted(flag for flag in known if name and flag.startswith(name))
    return begun if 0 < len(begun) <= 3 else nearest(name, known)


def _unreachable(error: OSError) -> LoraGraftError:
    return LoraGraftError(
        "LG-CLI-003",
        "A file cannot be read or written.",
        where=str(error.filename or "unknown file"),
        why=f"{error.strerror or error}{of_other_system(str(error.filename or ''))}.",
        fix="check the path, the free space and the rights on its folder",
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = Parser("loragraft", description="Train LoRAs without a graph.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, dataset, preview, sample, tools_lora, tools_checkpoint):
        command.add(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
