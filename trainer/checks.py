"""Build configs from plain values, strictly.

Unknown keys raise with a suggestion; values out of range and settings that contradict each other
raise with got, expected and remedy. Nothing is repaired behind the user's back.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from .config import (
    DatasetConfig,
    TrainConfig,
    denoiser_lr,
    encoder_lr,
    info_of,
    optimizer_kwargs,
    resolution_wh,
)
from .errors import LoraGraftError, listed, nearest, one_line

# kohya's spelling of a value -> ours; written down here so that no other code guesses.
VALUE_ALIASES: dict[tuple[str, Any], Any] = {
    ("mixed_precision", "no"): "fp32",
    ("save_precision", "float"): "fp32",
    ("optimizer_type", "adamw"): "AdamW",
    ("max_token_length", None): 75,
    ("clip_skip", None): 1,
}

Config = TypeVar("Config", DatasetConfig, TrainConfig)


def make(cls: type[Config], values: Mapping[str, Any], *, where: str = "settings") -> Config:
    """Build a config from plain values, strictly.

    ``where`` names the source (a file, a node) for messages. Raises LoraGraftError for an unknown
    key, a wrong type, a value out of range, or settings that contradict each other.
    """
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
            fix=f"did you mean '{guess[0]}'?"
            if guess
            else f"known settings: {listed(sorted(known), limit=80)}",
        )
    clean = {key: _checked(cls, key, hints[key], value, where) for key, value in values.items()}
    config = cls(**clean)
    _cross_checks(config, where)
    return config


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
                fix=f"did you mean '{guess[0]}'?"
                if guess
                else f"known settings: {listed(sorted(data_keys | train_keys), limit=80)}",
            )
    data = make(DatasetConfig, {k: v for k, v in values.items() if k in data_keys}, where=where)
    return data, make(TrainConfig, {k: v for k, v in values.items() if k in train_keys}, where=where)


def _checked(cls: type, name: str, hint: Any, value: Any, where: str) -> Any:
    info = info_of(cls, name)
    value = VALUE_ALIASES.get((name, value), value) if _hashable(value) else value
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    coerced = _coerce(value, allowed)
    if coerced is _WRONG:
        expected = " or ".join(_type_name(t) for t in allowed)
        raise _bad(name, value, expected, where)
    if info.choices and str(coerced) not in info.choices:
        guess = nearest(str(coerced), info.choices)
        raise _bad(name, value, f"one of {', '.join(info.choices)}", where, guess[0] if guess else None)
    for item in coerced if isinstance(coerced, tuple) else (coerced,):
        if isinstance(item, str) and not _is_writable(item):
            raise _bad(name, value, "text that a UTF-8 file can hold", where)
        if isinstance(item, float) and not math.isfinite(item):
            raise _bad(name, value, "a finite number", where)
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            low = -math.inf if info.minimum is None else info.minimum
            high = math.inf if info.maximum is None else info.maximum
            if not low <= item <= high:
                raise _bad(name, value, f"{low:g} to {high:g}", where)
    return coerced


_WRONG = object()


def _coerce(value: Any, allowed: Iterable[Any]) -> Any:
    """Return ``value`` as one of the allowed types without losing anything, else _WRONG."""
    for kind in allowed:
        if kind is type(None):
            if value is None:
                return None
        elif typing.get_origin(kind) is tuple:
            if isinstance(value, (list, tuple)):
                parts = typing.get_args(kind)
                inner, length = parts[0], None if parts[-1] is Ellipsis else len(parts)
                if (length is None or len(value) == length) and all(type(v) is inner for v in value):
                    return tuple(value)
        elif kind is bool or kind is str:
            if type(value) is kind:
                return value
        elif kind is int:
            if type(value) is int:
                return value
        elif kind is float and type(value) in (int, float):
            return float(value)
    return _WRONG


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


def _bad(name: str, value: Any, expected: str, where: str, guess: str | None = None) -> LoraGraftError:
    return LoraGraftError(
        "LG-CFG-003",
        f"Setting '{name}' cannot be {one_line(repr(value), 60)}.",
        where=f"{where}: {name}",
        why=f"expected {expected}.",
        fix=f"did you mean '{guess}'?" if guess else f"set {name} to {expected}",
    )


def _cross_checks(config: DatasetConfig | TrainConfig, where: str) -> None:
    if isinstance(config, DatasetConfig):
        _check_resolution(config, where)
        _check_dataset(config, where)
        return
    if config.network_train_unet_only and config.text_encoder_lr:
        raise LoraGraftError(
            "LG-CFG-004",
            "network_train_unet_only is on, but text_encoder_lr is given.",
            where=where,
            why="the text encoder would not be trained at that rate.",
            fix="clear text_encoder_lr, or switch network_train_unet_only off",
        )
    if config.conv_alpha is not None and config.conv_dim is None:
        raise LoraGraftError(
            "LG-CFG-004",
            "conv_alpha is given, but conv_dim is not.",
            where=where,
            why="without conv_dim no convolution is trained and conv_alpha has no effect.",
            fix="set conv_dim (usually a half to a quarter of network_dim), or clear conv_alpha",
        )
    if denoiser_lr(config) == 0 and encoder_lr(config) == 0:
        raise LoraGraftError(
            "LG-CFG-004",
            "Every learning rate is 0.",
            where=where,
            why="nothing would be trained.",
            fix="give learning_rate, unet_lr or text_encoder_lr a value above 0",
        )
    if config.lr_scheduler == "constant" and config.lr_warmup_steps:
        raise LoraGraftError(
            "LG-CFG-004",
            "lr_scheduler is 'constant', but lr_warmup_steps is given.",
            where=where,
            why="a constant schedule has no warm-up.",
            fix="choose constant_with_warmup, or set lr_warmup_steps to 0",
        )
    optimizer_kwargs(config)


def _check_dataset(config: DatasetConfig, where: str) -> None:
    if config.num_bucket and (config.bucket_no_upscale or not config.enable_bucket):
        other = "bucket_no_upscale" if config.bucket_no_upscale else "enable_bucket = false"
        raise LoraGraftError(
            "LG-CFG-004",
            f"num_bucket is given together with {other}.",
            where=where,
            why="num_bucket makes buckets of one area from the images' aspect ratios.",
            fix=f"set num_bucket to 0, or take {other} back",
        )
    if config.caption_template and not config.caption_template.strip():
        raise _bad("caption_template", config.caption_template, "empty or text with {caption} in it", where)


def _check_resolution(config: DatasetConfig, where: str) -> None:
    width, height = resolution_wh(config)
    step = config.bucket_reso_steps
    if step % 8:
        raise _bad("bucket_reso_steps", step, "a multiple of 8 (one latent pixel is 8 image pixels)", where)
    for side in (width, height):
        if side % step:
            near = max(step, round(side / step) * step)
            raise LoraGraftError(
                "LG-CFG-005",
                f"resolution {width}x{height} is not a multiple of {step}.",
                where=f"{where}: resolution",
                why=f"the base model works on whole blocks; bucket_reso_steps is {step}.",
                fix=f"use {near} instead of {side}, or another bucket_reso_steps",
            )
    if (
        config.enable_bucket
        and not config.min_bucket_reso <= min(width, height) <= max(width, height) <= config.max_bucket_reso
    ):
        raise LoraGraftError(
            "LG-CFG-006",
            f"resolution {width}x{height} lies outside the bucket limits "
            f"{config.min_bucket_reso} to {config.max_bucket_reso}.",
            where=f"{where}: min_bucket_reso, max_bucket_reso",
            why="no bucket of the wanted area could exist.",
            fix=f"for instance {min(width, height) // 2} and {max(width, height) * 2}",
        )
