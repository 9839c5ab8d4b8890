"""How a setting is refused: a value that it cannot have, and two that cannot be together."""

from __future__ import annotations

from typing import Any

from ..errors import LoraGraftError, one_line


def bad_value(name: str, value: Any, expected: str, where: str, guess: str | None = None) -> LoraGraftError:
    """Return the refusal of one setting's value; ``guess`` is the nearest valid one."""
    return LoraGraftError(
        "LG-CFG-003",
        f"Setting '{name}' cannot be {one_line(repr(value), 60)}.",
        where=f"{where}: {name}",
        why=f"expected {expected}.",
        fix=f"did you mean '{guess}'?" if guess else f"set {name} to {expected}",
    )


def contradiction(what: str, where: str, *, why: str, fix: str) -> LoraGraftError:
    """Return the refusal of settings that cannot be together."""
    return LoraGraftError("LG-CFG-004", what, where=where, why=why, fix=fix)
