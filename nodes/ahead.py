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
POINTS = 400
UNREADABLE = {"error": "This question cannot be read."}


def answer(question: str) -> dict[str, Any]:
    """Answer a question in JSON; {"error"} in words where it cannot be.

    {"node", "values", "steps"} is about a settings node: {"curve", "steps"} or {"bars"}. {"presets": [names]}
    gives {"parts"} and, for the named ones, what to fill in where: see `_presets`.
    """
    try:
        if len(question) > MAX_QUESTION:
            raise ValueError("too long")
        asked = json.loads(question)
        if "presets" in asked:
            return _presets([str(name) for name in asked["presets"]])
        group, draw = groups.GROUPS[asked["node"]], PICTURES[asked["node"]]
        given = {str(name).split(".")[-1]: value for name, value in asked["values"].items()}
        steps = max(1, int(asked["steps"]))
    except LoraGraftError as error:
        return {"error": str(error)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return UNREADABLE
    if steps > MAX_STEPS:
        return {"error": f"No picture of more than {MAX_STEPS:,} steps."}
    try:
        values = groups.values_of(group, {name: v for name, v in given.items() if name in group.names})
        config = api.make(api.TrainConfig, {**values, "max_train_steps": steps}, where=group.title)
        return draw(config, steps)
    except LoraGraftError as error:
        return {"error": str(error)}


def _curve(config: api.TrainConfig, steps: int) -> dict[str, Any]:
    rates = api.learning_rate_curve(config, steps)
    last, count = len(rates) - 1, min(POINTS, len(rates))
    return {"curve": [rates[i * last // max(1, count - 1)] for i in range(count)], "steps": steps}


def _bars(config: api.TrainConfig, steps: int) -> dict[str, Any]:
    bars = api.block_bars(config, api.FAMILIES["sd15"].blocks)
    return {"bars": [(name, rate / config.learning_rate) for name, rate in bars]}


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
