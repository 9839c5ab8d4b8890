"""Write settings as TOML: only what kohya's and this project's config files need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import DatasetConfig, as_dict
from ..safefile import write_text


def toml_lines(values: Mapping[str, Any]) -> list[str]:
    """Return one ``key = value`` line for each: numbers, text, switches and lists of them."""
    return [f"{key} = {_toml(value)}" for key, value in values.items()]


def save_settings(config: DatasetConfig, batch_size: int | None, file: Path) -> None:
    """Write the settings that differ from their defaults, and the batch size, as a file for --config."""
    defaults = as_dict(DatasetConfig())
    values = {key: value for key, value in as_dict(config).items() if value != defaults[key]}
    if batch_size is not None:
        values["train_batch_size"] = batch_size
    write_text(file, "\n".join([*toml_lines(values), ""]))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        # TOML's basic strings are JSON's, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
