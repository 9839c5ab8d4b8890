"""A setting's table entry: what it means and which values it takes."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Info:
    """What a setting means and which values it takes; ``minimum`` and ``maximum`` are inclusive.

    ``open``: other values than the choices are possible; the group's contradictions decide.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    advanced: bool = False
    open: bool = False


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    advanced: bool = False,
    open: bool = False,
) -> Any:
    """Return a dataclass field with this table entry."""
    return field(default=default, metadata={"info": Info(help, minimum, maximum, choices, advanced, open)})


def info_of(cls: type, name: str) -> Info:
    """Return the table entry of one setting."""
    return typing.cast(Info, cls.__dataclass_fields__[name].metadata["info"])  # type: ignore[attr-defined]
