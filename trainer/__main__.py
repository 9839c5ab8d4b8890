"""The command line: ``loragraft`` or ``python -m loragraft.trainer``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .commands import dataset, preview, sample, tools_checkpoint, tools_lora, train
from .errors import LoraGraftError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 refused with a message, 130 stopped."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except LoraGraftError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(_unreachable(error), file=sys.stderr)
    return 1


def _unreachable(error: OSError) -> LoraGraftError:
    return LoraGraftError(
        "LG-CLI-003",
        "A file cannot be read or written.",
        where=str(error.filename or "unknown file"),
        why=f"{error.strerror or error}.",
        fix="check the path, the free space and the rights on its folder",
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser("loragraft", description="Train LoRAs without a graph.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, dataset, preview, sample, tools_lora, tools_checkpoint):
        command.add(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
