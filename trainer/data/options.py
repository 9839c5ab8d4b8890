"""Settings of a dataset step as one table: default, help, range, choices; for nodes, flags and checks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

from ..config import Info
from ..errors import LoraGraftError
from .images import shown

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    advanced: bool = False,
) -> Any:
    """Return a dataclass field that carries its entry of the table (see config.Info)."""
    info = Info(help, minimum, maximum, choices, advanced)
    return dataclasses.field(default=default, metadata={"info": info})


def checked(settings: T) -> T:
    """Return the settings if each has its kind, range or choice; else raises LG-CFG-003."""
    for item in dataclasses.fields(settings):  # type: ignore[arg-type]
        value, info = getattr(settings, item.name), item.metadata["info"]
        if info.choices:
            if value not in info.choices:
                raise bad_option(item.name, value, f"one of {', '.join(info.choices)}")
        elif isinstance(item.default, bool) or isinstance(value, bool):
            if type(value) is not type(item.default):
                raise bad_option(item.name, value, f"a value like {item.default!r}")
        elif isinstance(item.default, (int, float)):
            numbers = (int, float) if isinstance(item.default, float) else int
            low = -math.inf if info.minimum is None else info.minimum
            high = math.inf if info.maximum is None else info.maximum
            if not isinstance(value, numbers) or not low <= value <= high:
                kind = "" if isinstance(item.default, float) else "a whole number, "
                raise bad_option(item.name, value, f"{kind}{low:g} to {high:g}")
        elif not isinstance(value, type(item.default)):
            raise bad_option(item.name, value, f"a value like {item.default!r}")
    return settings


def bad_option(name: str, value: object, expected: str) -> LoraGraftError:
    """Return the refusal of a setting's value."""
    return LoraGraftError(
        "LG-CFG-003",
        f"Setting '{name}' is {shown(repr(value), 40)}, expected {shown(expected, 50)}.",
        where=name,
        why="the pictures would be made in another way than you asked for.",
        fix=f"set {name} to {expected}",
    )
