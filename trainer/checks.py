"""Build configs from plain values, strictly.

Unknown keys raise with a suggestion; values out of range and settings that contradict each other
raise with got, expected and remedy. Nothing is repaired behind the user's back.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from .config import DatasetConfig, TrainConfig, info_of
from .contradictions import dataset, flow, learning, loss, network, saving, text
from .contradictions.refusals import bad_value
from .errors import LoraGraftError, listed, nearest
from .settings.optimizers import canonical

# kohya's spelling of a value -> ours; written down here so that no other code guesses.
VALUE_ALIASES: dict[tuple[str, Any], Any] = {
    ("mixed_precision", "no"): "fp32",
    ("save_precision", "float"): "fp32",
    ("algo", "diag-oft"): "oft",
    ("max_token_length", None): 75,
    ("clip_skip", None): 1,
}

SPELLING: Mapping[str, Callable[[str], str]] = {"optimizer_type": canonical}  # where case does not matter

Config = TypeVar("Config", DatasetConfig, TrainConfig)

# What no single setting's table entry can say: one check a group of settings.
CHECKS: Mapping[type, tuple[Callable[[Any, str], None], ...]] = {
    DatasetConfig: (dataset.check,),
    TrainConfig: (network.check, learning.check, loss.check, flow.check, text.check, saving.check),
}


def make(cls: type[Config], values: Mapping[str, Any], *, where: str = "settings") -> Config:
    """Build a config from plain values, strictly.

    ``where`` names the source (a file, a node) for messages. Raises LoraGraftError for an unknown
    key, a wrong type, a value out of range, or settings that contradict each other.
    """
    config = cls(**check_values(cls, values, where=where))
    for check in CHECKS[cls]:
        check(config, where)
    return config


def check_values(cls: type, values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return some settings of a config as it holds them; each is checked alone, none with the others."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    unknown = [key for key in values if key not in known]
    if unknown:
        guess = nearest(unknown[0], known)
        raise LoraGraftError(
            "LG-CFG-001",
            f"Unknown setting {listed(repr(k) for k in unknown)}.",
            where=where,
            why="a misspelt setting would be trained without, and nobody would notice.",
            fix=f"did you mean '{guess[0]}'?" if guess else "'loragraft train --help' lists all settings",
        )
    return {key: _checked(cls, key, hints[key], value, where) for key, value in values.items()}


def make_both(values: Mapping[str, Any], *, where: str = "settings") -> tuple[DatasetConfig, TrainConfig]:
    """Split one flat mapping into the two configs; an unknown key raises with a suggestion from both."""
    data_keys = {f.name for f in dataclasses.fields(DatasetConfig)}
    train_keys = {f.name for f in dataclasses.fields(TrainConfig)}
    for key in values:
        if key not in data_keys | train_keys:
            guess = nearest(key, data_keys | train_keys)
            raise LoraGraftError(
                "LG-CFG-001",
                f"Unknown setting '{key}'.",
                where=where,
                why="a misspelt setting would be trained without, and nobody would notice.",
                fix=f"did you mean '{guess[0]}'?" if guess else "'loragraft train --help' lists all settings",
            )
    data = make(DatasetConfig, {k: v for k, v in values.items() if k in data_keys}, where=where)
    return data, make(TrainConfig, {k: v for k, v in values.items() if k in train_keys}, where=where)


def _checked(cls: type, name: str, hint: Any, value: Any, where: str) -> Any:
    info = info_of(cls, name)
    value = VALUE_ALIASES.get((name, value), value) if _hashable(value) else value
    value = SPELLING[name](value) if name in SPELLING and isinstance(value, str) else value
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    coerced = _coerce(value, allowed)
    if coerced is _WRONG:
        expected = " or ".join(_type_name(t) for t in allowed)
        raise bad_value(name, value, expected, where)
    if info.choices and not info.open and str(coerced) not in info.choices:
        guess = nearest(str(coerced), info.choices)
        raise bad_value(name, value, f"one of {', '.join(info.choices)}", where, guess[0] if guess else None)
    for item in coerced if isinstance(coerced, tuple) else (coerced,):
        if isinstance(item, str) and not _is_writable(item):
            raise bad_value(name, value, "text that a UTF-8 file can hold", where)
        if isinstance(item, float) and not math.isfinite(item):
            raise bad_value(name, value, "a finite number", where)
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            low = -math.inf if info.minimum is None else info.minimum
            high = math.inf if info.maximum is None else info.maximum
            if not low <= item <= high:
                # A node's number cannot be empty, so that 0 or -1 stands for it there.
                empty = f", or empty ({item:g} stands for that on nodes alone)"
                may_be_empty = type(None) in allowed and item in (0, -1)
                raise bad_value(name, value, f"{low:g} to {high:g}{empty if may_be_empty else ''}", where)
    return coerced


_WRONG = object()
# The types of values that can stand for one of a kind; True and False are no numbers here.
TYPES: Mapping[Any, tuple[type, ...]] = {
    type(None): (type(None),),
    bool: (bool,),
    str: (str,),
    int: (int,),
    float: (int, float),
}


def _coerce(value: Any, allowed: Iterable[Any]) -> Any:
    """Return ``value`` as one of the allowed types without losing anything, else _WRONG."""
    for kind in allowed:
        if typing.get_origin(kind) is tuple:
            if _fits(value, *typing.get_args(kind)):
                return tuple(value)
        elif type(value) in TYPES.get(kind, ()):
            return float(value) if kind is float else value
    return _WRONG


def _fits(value: Any, *kinds: Any) -> bool:
    """Say whether a list holds items of the first kind: as many as there are kinds, or any number (...)."""
    if not isinstance(value, (list, tuple)) or not all(type(item) is kinds[0] for item in value):
        return False
    return kinds[-1] is Ellipsis or len(value) == len(kinds)


def _type_name(kind: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "empty",
    }
    return names.get(kind) or f"a list of {_type_name(typing.get_args(kind)[0])}"


def _hashable(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def _is_writable(text: str) -> bool:
    """Say whether the text is whole: half of a surrogate pair, from broken JSON, fits into no file."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
