"""A command line that somebody pasted becomes arguments: tokens only, nothing is run or looked up.

Known are the ways in which kohya's guides write one: a line of bash, cmd or PowerShell with continuations,
and scripts that collect their arguments in a variable (cmd="$cmd --learning_rate 1e-4").
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from .imported import not_readable

CONTINUATION = re.compile(r"[ \t]*[\\^`][ \t]*\r?\n")
COMMENT = re.compile(r"^\s*(#|::|rem\b).*$", re.IGNORECASE | re.MULTILINE)
# cmd="$cmd --name value" of bash, set "cmd=!cmd! --name value" of a batch file.
COLLECTED = re.compile(r"""^\s*(?:set\s+)?"?(\w+)\s*=\s*"?[$!%{]+\1[}!%]*\s+(?P<rest>.*?)"?\s*$""")
WINDOWS = re.compile(r"""(^|[\s"'=])([A-Za-z]:\\|\.{1,2}\\|\\\\)|[\^`]\r?\n""")
VARIABLE = re.compile(r"\$\w|\$\{|\$\(|%\w+%|!\w+!")
OPTION = re.compile(r"--?[A-Za-z]")

Options = tuple[tuple[str, tuple[str, ...]], ...]  # (name without dashes, its values as written)


@dataclass(frozen=True)
class Command:
    """A program's arguments; ``program`` is the script or module that they are for, "" if none is named."""

    program: str
    options: Options
    before: tuple[str, ...]  # what stood before the program: accelerate and its own options


def read_command(text: str, where: str) -> Command:
    """Split a pasted command line; raises LG-IMP-001 for what cannot be split without running it."""
    # A backslash is a part of a path on Windows, and an escape elsewhere.
    tokens = _tokens(_joined(text), where, escape="" if WINDOWS.search(text) else "\\")
    start = next((i for i, token in enumerate(tokens) if token.casefold().endswith(".py")), None)
    if start is None and "-m" in tokens and tokens.index("-m") + 1 < len(tokens):
        start = tokens.index("-m") + 1
    program = "" if start is None else re.split(r"[\\/]", tokens[start])[-1]
    before = () if start is None else tuple(tokens[:start])
    options = read_options(tokens if start is None else tokens[start + 1 :], where)
    if not options:
        raise not_readable(where, "it holds no --argument.")
    return Command(program, options, before)


def read_options(tokens: Iterable[str], where: str) -> Options:
    """Return the arguments that a command line's words are; raises LG-IMP-001 for words before the first."""
    options: list[tuple[str, tuple[str, ...]]] = []
    for token in tokens:
        if OPTION.match(token):
            name, equals, value = token.lstrip("-").partition("=")
            options.append((name, (value,) if equals else ()))
        elif options:
            name, values = options[-1]
            options[-1] = (name, (*values, token))
        else:
            raise not_readable(where, f"{token[:60]!r} stands before the first --argument.")
    return tuple(options)


def _joined(text: str) -> str:
    """Return the lines that hold arguments as one; where a script collects them, only those count."""
    lines = CONTINUATION.sub(" ", COMMENT.sub("", text)).splitlines()
    collected = [found for line in lines if (found := COLLECTED.match(line))]
    if not collected:
        return " ".join(lines)
    name = collected[0][1]
    begun = re.compile(rf"""^\s*(?:set\s+)?"?{name}\s*=\s*"?(?P<rest>[^$!%].*?)"?\s*$""")
    first = [found["rest"] for line in lines if (found := begun.match(line))][:1]
    return " ".join([*first, *(found["rest"] for found in collected)])


def _tokens(text: str, where: str, *, escape: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", escape
    try:
        tokens = list(lexer)
    except ValueError as error:
        raise not_readable(where, f"{error}.") from None
    for token in tokens:
        if VARIABLE.search(token):
            raise not_readable(where, f"{token[:60]!r} is a variable of a shell; write the value itself.")
    return tokens
