"""Widgets of the picture nodes out of their settings' tables; the order given is fixed for ever."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .widgets import Widget

KINDS = {bool: "bool", int: "int", float: "float", str: "text"}
STEPS = {
    "every_n_seconds": 0.1,
    "scene_threshold": 0.01,
    "start": 1.0,
    "end": 1.0,
    "min_sharpness": 5.0,
    "width": 8,
    "height": 8,
    "max_aspect": 0.1,
    "margin": 0.05,
    "min_side": 64,
}


def widgets_of(settings: type, names: Sequence[str]) -> list[Widget]:
    """Return the widgets of these settings in this order; advanced ones are optional inputs."""
    fields = {item.name: item for item in dataclasses.fields(settings)}
    return [_widget(fields[name]) for name in names]


def settings_of(settings: type, values: Mapping[str, Any]) -> Any:
    """Return the settings that widget values mean; other values are left out."""
    names = {item.name for item in dataclasses.fields(settings)}
    return settings(**{name: value for name, value in values.items() if name in names})


def _widget(item: Any) -> Widget:
    info, default = item.metadata["info"], item.default
    kind = "choice" if info.choices else KINDS[type(default)]
    number = type(default) if kind in ("int", "float") else None
    return Widget(
        item.name,
        kind,
        default,
        info.help,
        info.advanced,
        minimum=None if number is None else number(info.minimum),
        maximum=None if number is None else number(info.maximum),
        step=STEPS.get(item.name, 1) if number is not None else None,
        choices=info.choices,
    )
