"""The one error class that users see: what happened, where, why, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraGraftError(ValueError):
    """A refusal in plain words.

    ``code`` is stable and documented in docs/errors.md; ``what`` is one line that fits 120
    characters with its code; ``where`` names the file, setting or widget; ``fix`` is something the
    user can do. Each is kept to one line, whatever file names and values it quotes.
    """

    def __init__(self, code: str, what: str, *, where: str, why: str, fix: str) -> None:
        self.code, self.what = code, one_line(what, MAX_HEADLINE - len(code) - 2)
        self.where, self.why, self.fix = (one_line(text, MAX_LINE) for text in (where, why, fix))
        super().__init__(f"{code}  {self.what}\nWhere: {self.where}\nWhy:   {self.why}\nFix:   {self.fix}")


MAX_HEADLINE = 120
MAX_LINE = 4000


def one_line(text: str, limit: int) -> str:
    """Return ``text`` on one line of at most ``limit`` characters; line breaks become spaces."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[: limit - 3]}..."


def nearest(name: str, known: Iterable[str], *, limit: int = 1) -> list[str]:
    """Return the ``limit`` known names most like ``name`` (possibly none)."""
    return difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)


def listed(items: Iterable[str], *, limit: int = 20) -> str:
    """Join names for a message, at most ``limit`` of them and a count of the rest."""
    names = list(items)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
