"""What values on a node will do, before anything is trained: numbers for pictures, and presets.

Questions come from the page. They name no path and no file; answering reads nothing and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ..trainer import api
from ..trainer.errors import LoraGraftError
from . import settings_groups as groups
from . import widgets

MAX_QUESTION = 20_000  # letters
MAX_STEPS = 200_000
MAX_STEPS_OF_CLASSES = 20_000  # these can only be walked through, step by step
POINTS = 400
# What a curve depends on and no Schedule node has.
RATES = ("learning_rate", "unet_lr", "text_encoder_lr", "network_train_unet_only")
BESIDE = (*RATES, "network_train_text_encoder_only", "optimizer_type", "optimizer_args", "scale_lr")
# Which base model is linked is not known before it runs, so blocks are drawn for each kind that has any.
WITH_BLOCKS = {"SD1.x, SD2.x": "sd15", "SDXL": "sdxl"}
UNREADABLE = {"error": "This question cannot be read."}


def answer(question: str) -> dict[str, Any]:
    """Answer a question in JSON; {"error"} in words where it cannot be.

    {"node", "values", "beside", "steps"} is about a settings node: {"curve", "steps"}, or {"bars"} by base
    model; "beside" holds what else a curve depends on, from Train LoRA and the nodes linked to it.
    {"presets": [names]} gives {"parts"} and, for the named ones, what to fill in where: see `_presets`.
    """
    try:
        if len(question) > MAX_QUESTION:
            raise ValueError("too long")
        asked = json.loads(question)
        if "presets" in asked:
            return _presets([str(name) for name in asked["presets"]])
        group, draw = groups.GROUPS[asked["node"]], PICTURES[asked["node"]]
        given, beside = (_flat(asked.get(key, {})) for key in ("values", "beside"))
        steps = max(1, int(asked["steps"]))
    except LoraGraftError as error:
        return {"error": str(error)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return UNREADABLE
    most = MAX_STEPS_OF_CLASSES if given.get("lr_scheduler_type") else MAX_STEPS
    if steps > most:
        return {"error": f"No picture of more than {most:,} steps."}
    try:
        values = groups.values_of(group, {name: v for name, v in given.items() if name in group.names})
        if group is groups.SCHEDULE:
            values |= widgets.settings(api.TrainConfig, {n: v for n, v in beside.items() if n in BESIDE})
        config = api.make(api.TrainConfig, {**values, "max_train_steps": steps}, where=group.title)
        return draw(config, steps)
    except LoraGraftError as error:
        return {"error": str(error)}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return widgets by their settings' names; a choice's own widgets are called "choice.name"."""
    return {str(name).split(".")[-1]: value for name, value in values.items()}


def _curve(config: api.TrainConfig, steps: int) -> dict[str, Any]:
    last, count = steps - 1, min(POINTS, steps)
    at = [i * last // max(1, count - 1) for i in range(count)]
    return {"curve": api.learning_rate_curve(config, steps, at), "steps": steps}


def _bars(config: api.TrainConfig, steps: int) -> dict[str, Any]:
    def of(family: str) -> list[tuple[str, float]]:
        bars = api.block_bars(config, api.FAMILIES[family].blocks)
        return [(name, rate / config.learning_rate) for name, rate in bars]

    return {"bars": {title: of(family) for title, family in WITH_BLOCKS.items()}}


PICTURES: Mapping[str, Callable[[api.TrainConfig, int], dict[str, Any]]] = {
    groups.SCHEDULE.node_id: _curve,
    groups.BLOCKS.node_id: _bars,
}


def _presets(names: list[str]) -> dict[str, Any]:
    """Return {"parts": {part: {name: title}}}, and for ``names`` what they set, as widget values.

    "train" and "dataset" are for the widgets of Train LoRA and Build Dataset, "nodes" for settings nodes that
    have to stand beside Train LoRA; "sources" says where each value is from.
    """
    parts: dict[str, dict[str, str]] = {}
    for name, found in api.presets().items():
        parts.setdefault(found.part, {})[name] = found.title
    if not names:
        return {"parts": parts}
    chosen = api.preset(names)
    _, train = api.make_both(dict(chosen.settings), where="preset")
    on_train, on_data = {w.name for w in widgets.train_widgets()}, {w.name for w in widgets.dataset_widgets()}
    values = {name: widgets.as_widget(name, value) for name, value in chosen.settings.items()}
    plain = api.TrainConfig()
    beside = {n for n in values if n not in on_train | on_data and getattr(train, n) != getattr(plain, n)}
    return {
        "parts": parts,
        "train": {n: v for n, v in values.items() if n in on_train},
        "dataset": {n: v for n, v in values.items() if n in on_data},
        "nodes": {
            group.node_id: {n: values[n] for n in group.names if n in values}
            for group in groups.GROUPS.values()
            if beside & set(group.names)
        },
        "sources": dict(chosen.sources),
    }
