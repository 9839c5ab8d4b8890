"""A sweep: the values that settings shall take, and the runs which all combinations of them make.

    learning_rate: 1e-4, 3e-4
    network_dim: 8, 32 / network_alpha: 4, 16

is four runs: each line is tried with each other line, and settings joined by "/" change together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .checks import make
from .config import DatasetConfig, TrainConfig, info_of
from .errors import LoraGraftError, listed, nearest, one_line
from .literals import literal
from .paths import safe_name

MAX_RUNS = 64
MAX_TEXT = 4000
MAX_NAME = 100  # bytes of a run's file name; room is left for "_2" and the like
EMPTY = "none"
SHARED_WHY = "the runs train side by side on one base model and one engine."
# Settings that all runs of a sweep have in common, and why.
NOT_SWEPT = {
    "output_name": "each run gets a name of its own, made of output_name and its values.",
    "mixed_precision": SHARED_WHY,
    "engine": SHARED_WHY,
    "deterministic": SHARED_WHY,
    "gradient_checkpointing": SHARED_WHY,
    "attention": SHARED_WHY,
    "base_storage": SHARED_WHY,
    "memory": SHARED_WHY,
    "blocks_to_swap": SHARED_WHY,
    "fused_backward_pass": SHARED_WHY,
}
SETTINGS = {f.name: f for f in dataclasses.fields(TrainConfig)}
HINTS = typing.get_type_hints(TrainConfig)
OPENERS = ("", ":", ",", "[")  # before these a quote begins a text; elsewhere it is an apostrophe
NEXT = re.compile(r"\s*[A-Za-z_]+\s*:")  # what follows a "/" that joins settings


@dataclass(frozen=True)
class Axis:
    """Settings that change together, and the choices of values that they take."""

    names: tuple[str, ...]
    choices: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep; ``label`` says what sets it apart ("network_dim 8, seed 2")."""

    config: TrainConfig
    label: str


def read_sweep(text: str, *, where: str = "sweep") -> tuple[Axis, ...]:
    """Read lines of "setting: value, value"; empty lines and those that begin with # do not count.

    Text with commas is quoted, and "none" empties a setting that may be empty. Raises LG-SWEEP-001 to
    -004, and what trainer.checks raises for a value on its own.
    """
    if len(text) > MAX_TEXT:
        raise _unreadable(f"it is longer than {MAX_TEXT} characters", where)
    lines = (line.strip() for line in text.splitlines())
    return _checked((_axis(line, where) for line in lines if line and not line.startswith("#")), where)


def sweep_from_table(table: Mapping[str, Any], *, where: str = "sweep") -> tuple[Axis, ...]:
    """Read a config file's table: "setting" = [values], "setting/setting" = [[values], [values]]."""
    return _checked((_table_axis(key, values, where) for key, values in table.items()), where)


def sweep_runs(axes: Sequence[Axis], config: TrainConfig) -> list[SweepRun]:
    """Combine all choices over one config; the last line changes fastest. Each is checked as a whole."""
    names = [name for axis in axes for name in axis.names]
    runs = []
    for chosen in itertools.product(*(axis.choices for axis in axes)):
        values = dict(zip(names, itertools.chain.from_iterable(chosen), strict=True))
        label = ", ".join(f"{name} {_written(value)}" for name, value in values.items())
        changed = {**vars(config), **values, "output_name": _file_name(config.output_name, values)}
        runs.append(SweepRun(make(TrainConfig, changed, where=f"sweep: {label}"), label))
    return runs


def shared_start(names: Sequence[str]) -> int:
    """Return how many letters these file names have in common up to a setting or a word; 0 for one name."""
    if len(names) < 2:
        return 0
    low, high = min(names), max(names)
    same = next((i for i, pair in enumerate(zip(low, high, strict=False)) if len(set(pair)) > 1), len(low))
    ends = [i + 1 for i in range(same) if low[i] == "_"]
    return next((i for i in reversed(ends) if low.startswith(tuple(SETTINGS), i)), ends[-1] if ends else 0)


# ---- reading ----


def _axis(line: str, where: str) -> Axis:
    columns: dict[str, list[Any]] = {}
    for part in _split(line, "/", NEXT):
        name, colon, values = part.partition(":")
        name = name.strip()
        if not colon or not name:
            raise _unreadable("a line is 'setting: value, value'", f"{where}: {one_line(line, 60)}")
        _check_name(name, where)
        if name in columns:
            raise _unreadable(f"{name} is there twice", where)
        columns[name] = [_read(name, value.strip()) for value in _split(values, ",")]
    return _zipped(columns, where)


def _table_axis(key: str, values: Any, where: str) -> Axis:
    names = [name.strip() for name in key.split("/")]
    for name in names:
        _check_name(name, where)
    wanted = "a list of values" if len(names) == 1 else f"a list of lists of {len(names)} values"
    if not isinstance(values, list):
        raise _unreadable(f"{key} is no {wanted.removeprefix('a ')}", where)
    rows = [[value] for value in values] if len(names) == 1 else values
    if len(set(names)) < len(names) or not all(isinstance(r, list) and len(r) == len(names) for r in rows):
        raise _unreadable(f"{key} is not {wanted}", where)
    return _zipped({n: [_emptied(n, row[i]) for row in rows] for i, n in enumerate(names)}, where)


def _zipped(columns: Mapping[str, list[Any]], where: str) -> Axis:
    """Put the values of joined settings together, checked; as many of each are needed."""
    counts = {name: len(values) for name, values in columns.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise _unreadable(f"settings joined by / need equally many values, and there are {found}", where)
    valid = [[_valid(name, value, where) for value in values] for name, values in columns.items()]
    choices = tuple(zip(*valid, strict=True))
    for number, choice in enumerate(choices):
        if choice in choices[:number]:
            raise LoraGraftError(
                "LG-SWEEP-004",
                f"{listed(columns)} is to be {listed(_written(v) for v in choice)} twice.",
                where=f"{where}: {listed(columns)}",
                why="both runs would be one and the same.",
                fix="take one of the two out; for the same settings again, sweep the seed",
            )
    return Axis(tuple(columns), choices)


def _checked(axes: Iterable[Axis], where: str) -> tuple[Axis, ...]:
    found = tuple(axes)
    names = [name for axis in found for name in axis.names]
    for name in names:
        if names.count(name) > 1:
            raise _unreadable(f"{name} is on two lines", where)
    count = math.prod(len(axis.choices) for axis in found)
    if not 2 <= count <= MAX_RUNS:
        raise LoraGraftError(
            "LG-SWEEP-003",
            f"The sweep makes {count} runs; it can be 2 to {MAX_RUNS}.",
            where=where,
            why="every value of a line is tried with every value of each other line.",
            fix="give a setting a second value, for instance learning_rate: 1e-4, 3e-4"
            if count < 2
            else "take values or lines out, or join settings that belong together with /",
        )
    return found


def _check_name(name: str, where: str) -> None:
    if name in NOT_SWEPT:
        raise _not_swept(name, where, NOT_SWEPT[name], "set it once, for all runs")
    if name in SETTINGS:
        return
    if name in {f.name for f in dataclasses.fields(DatasetConfig)}:
        why = "it belongs to the dataset, which all runs of a sweep share."
        raise _not_swept(name, where, why, "sweep settings of Train LoRA; train another dataset on its own")
    known = [n for n in SETTINGS if n not in NOT_SWEPT]
    guess = nearest(name, known)
    raise LoraGraftError(
        "LG-CFG-001",
        f"Unknown setting {one_line(name, 60)!r}.",
        where=where,
        why="a misspelt setting would be trained without, and nobody would notice.",
        fix=f"did you mean '{guess[0]}'?" if guess else f"known settings: {listed(sorted(known), limit=80)}",
    )


def _not_swept(name: str, where: str, why: str, fix: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-SWEEP-002", f"'{name}' cannot be swept.", where=f"{where}: {name}", why=why, fix=fix
    )


def _read(name: str, text: str) -> Any:
    """Read a value as the command line's flags do: a text setting's is taken as it stands."""
    if HINTS[name] is str and not text.startswith(('"', "'")):
        return text
    value = _emptied(name, literal(text) if text else text)
    return [value] if HINTS[name] == tuple[str, ...] and isinstance(value, str) else value


def _emptied(name: str, value: Any) -> Any:
    optional = type(None) in typing.get_args(HINTS[name])
    return None if optional and isinstance(value, str) and value.lower() == EMPTY else value


def _valid(name: str, value: Any, where: str) -> Any:
    """Check the value on its own; a contradiction (LG-CFG-004) may be resolved by the other settings."""
    try:
        return getattr(make(TrainConfig, {name: value}, where=where), name)
    except LoraGraftError as error:
        if error.code != "LG-CFG-004":
            raise
        return value


def _split(text: str, separator: str, followed_by: re.Pattern[str] | None = None) -> Iterator[str]:
    """Split at separators outside of quotes and brackets, where ``followed_by`` matches behind them."""
    start, depth, quote = 0, 0, ""
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and text[:i].rstrip()[-1:] in OPENERS:
            quote = letter
        elif letter in "[]":
            depth += 1 if letter == "[" else -1
        elif letter == separator and depth == 0 and (not followed_by or followed_by.match(text, i + 1)):
            yield text[start:i]
            start = i + 1
    yield text[start:]


def _unreadable(why: str, where: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-SWEEP-001",
        "The sweep cannot be read.",
        where=where,
        why=f"{why}.",
        fix="write for instance learning_rate: 1e-4, 3e-4 on one line and network_dim: 8, 32 on the next",
    )


# ---- naming ----


def _written(value: Any) -> str:
    """Write a value as briefly as it can be read again: 1e-4, 8, true, none."""
    if value is None:
        return EMPTY
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        number = Decimal(repr(value)).normalize()
        plain, (digits, exponent) = format(number, "f"), format(number, "e").split("e")
        short = f"{digits}e{int(exponent)}"
        return short if value < 1 and len(short) < len(plain) else plain
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _file_name(output_name: str, values: Mapping[str, Any]) -> str:
    """Name a run's file after its values alone, so that it is found again when others join the sweep."""
    safe_name(output_name, what="output_name")
    whole = "_".join([output_name, *(f"{name}{_written(value)}" for name, value in values.items())])
    parts, told = [output_name], True
    for name, value in values.items():
        text = _written(value)
        plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-. ")
        # Two names must not differ in case only, which some file systems do not see.
        told = told and (bool(info_of(TrainConfig, name).choices) or text == text.lower())
        parts.append(f"{name}{plain[:40]}")
    name = "_".join(parts)
    if told and name == whole and len(name.encode()) <= MAX_NAME:
        return name
    mark = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    cut = name.encode()[: MAX_NAME - len(mark) - 1].decode(errors="ignore").rstrip(" ._-")
    return f"{cut}-{mark}"
