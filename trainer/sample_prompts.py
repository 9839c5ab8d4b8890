"""Prompts of sample images as kohya's trainer writes them: words, then --w --h --d --s --l --n.

A prompt is one line of text wherever it is kept; files of several prompts become such lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LoraGraftError, nearest, one_line

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib

MAX_FILE_BYTES = 2**20
MAX_PROMPTS = 1000
SIDE_PX, SIDE_STEP = (64, 4096), 8


@dataclass(frozen=True)
class SamplePrompt:
    """What one sample image is drawn from; None leaves a value to the run's settings."""

    prompt: str
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    cfg: float | None = None
    negative: str = ""


def _side(text: str) -> int:
    value = _whole(*SIDE_PX)(text)
    if value % SIDE_STEP:
        raise ValueError(f"expected a multiple of {SIDE_STEP}")
    return value


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and low <= int(text) <= high):
            raise ValueError(f"expected a whole number from {low} to {high}")
        return int(text)

    return read


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise ValueError("expected a number from 0 to 100")
    return value


def _words(text: str) -> str:
    return text


# kohya's flag, its key in a file of tables, our field, how its value is read.
FLAGS: tuple[tuple[str, str, str, Callable[[str], Any]], ...] = (
    ("w", "width", "width", _side),
    ("h", "height", "height", _side),
    ("d", "seed", "seed", _whole(0, 2**63 - 1)),
    ("s", "sample_steps", "steps", _whole(1, 1000)),
    ("l", "scale", "cfg", _scale),
    ("n", "negative_prompt", "negative", _words),
)
# kohya's flags for which there is nothing here, and why.
ELSEWHERE = {
    "ss": "samples are drawn by Euler's method",
    "g": "distilled guidance belongs to other model families; --l is the guidance scale",
    "cn": "there are no ControlNets here",
    "ctr": "it belongs to other model families",
    "rcfg": "it belongs to other model families",
    "fs": "it belongs to other model families",
}


def parse_prompt(line: str) -> SamplePrompt:
    """Read one line; raises ValueError that names the flag and what was expected."""
    words, *parts = line.split(" --")
    readers = {flag: (field, read) for flag, _, field, read in FLAGS}
    values: dict[str, Any] = {}
    for part in parts:
        flag, _, text = part.strip().partition(" ")
        if flag.lower() not in readers:
            known = ", ".join(f"--{name}" for name in readers)
            why = ELSEWHERE.get(flag.lower(), f"known are {known}")
            raise ValueError(f"'--{one_line(flag, 30)}' is not known: {why}")
        field, read = readers[flag.lower()]
        if field in values:
            raise ValueError(f"'--{flag}' is given twice")
        try:
            values[field] = read(text.strip())
        except ValueError as error:
            raise ValueError(f"'--{flag} {one_line(text, 30)}': {error}") from None
    return SamplePrompt(words.strip(), **values)


def read_prompts(file: Path) -> tuple[str, ...]:
    """Read kohya's prompt file as lines for the setting `sample_prompts`.

    .txt holds a prompt a line ("#" begins a comment line); .json a list of lines or tables; .toml a table
    [prompt] of common values with [[prompt.subset]]. Raises LG-CFG-018 for a file that cannot be read so.
    """
    readers = {".txt": _from_text, ".json": _from_json, ".toml": _from_toml}
    try:
        if file.suffix.lower() not in readers:
            raise ValueError("its name must end in .txt, .json or .toml")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_FILE_BYTES // 2**20} MiB")
        lines = readers[file.suffix.lower()](file.read_text(encoding="utf-8-sig"))
        if len(lines) > MAX_PROMPTS:
            raise ValueError(f"it has more than {MAX_PROMPTS} prompts")
        for line in lines:
            parse_prompt(line)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoraGraftError(
            "LG-CFG-018",
            "The file of sample prompts cannot be read.",
            where=str(file),
            why=f"{one_line(str(error), 200)}.",
            fix="write a prompt a line, with --w --h --d --s --l --n behind it where they should differ",
        ) from None
    return tuple(lines)


def _from_text(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _from_json(text: str) -> list[str]:
    items = json.loads(text)
    if not isinstance(items, list):
        raise ValueError("expected a list of prompts")
    return [item if isinstance(item, str) else _line_of(item) for item in items]


def _from_toml(text: str) -> list[str]:
    table = tomllib.loads(text)["prompt"]
    common = {key: value for key, value in table.items() if key != "subset"}
    return [_line_of({**common, **subset}) for subset in table["subset"]]


def _line_of(item: Any) -> str:
    """Write a table of kohya's keys as a line, flags in the order of FLAGS."""
    if not isinstance(item, Mapping):
        raise ValueError(f"expected a prompt or a table, got {one_line(repr(item), 30)}")
    known = ["prompt", *(key for _, key, _, _ in FLAGS)]
    for key in item:
        if key not in known:
            guess = nearest(str(key), known)
            raise ValueError(
                f"'{one_line(str(key), 30)}' is not known" + (f"; did you mean {guess[0]}?" if guess else "")
            )
    parts = [_plain("prompt", item.get("prompt", ""))]
    parts += [f"--{flag} {_plain(key, item[key])}" for flag, key, _, _ in FLAGS if key in item]
    return " ".join(parts)


def _plain(key: str, value: Any) -> str:
    """Return a value as it stands in a line; numbers and text without line ends or flags of its own."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{key} is neither text nor a number")
    text = str(value)
    if "\n" in text or "\r" in text or f" {text}".find(" --") >= 0:
        raise ValueError(f"{key} holds a line end or ' --'")
    return text
