"""One value as a user writes it on a line: the literals of TOML, which config files have too."""

from __future__ import annotations

import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib


def literal(text: str) -> Any:
    """Read a value as TOML does (512, 1e-4, true, [512, 768]), or as a number (.5), else as text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        pass
    try:
        return float(text)
    except ValueError:
        return text
