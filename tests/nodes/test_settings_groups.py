"""Settings nodes: each setting has one place, values are checked, and what is linked counts and is told."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from loragraft.nodes import ahead, widgets
from loragraft.nodes import settings_groups as groups
from loragraft.trainer import api
from loragraft.trainer.config import TrainConfig, info_of
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.sweep import read_sweep, sweep_runs

GROUPS = list(groups.GROUPS.values())


def defaults(group: groups.Group) -> dict[str, Any]:
    """Return every widget of a node at its default, whatever the choice shows."""
    return {w.name: w.default for w in widgets.widgets_of(TrainConfig, group.names)}


def test_no_setting_stands_on_two_settings_nodes() -> None:
    counts = Counter(name for group in GROUPS for name in group.names)
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.title)
def test_a_choice_shows_something_for_each_of_its_values(group: groups.Group) -> None:
    if group.choice:
        assert set(group.options) == set(info_of(TrainConfig, group.choice).choices)
        assert next(iter(group.options)) == getattr(TrainConfig(), group.choice), "a new node has the first"
    assert not set(group.always) & {name for names in group.options.values() for name in names}


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.title)
def test_a_node_left_as_it_is_changes_nothing(group: groups.Group) -> None:
    linked = groups.values_of(group, defaults(group))
    assert widgets.train_config({}, linked) == api.make(TrainConfig, {})


def test_what_a_choice_shows_comes_nested() -> None:
    given = {"loss_type": {"loss_type": "huber", "huber_schedule": "snr", "huber_c": 0.2}, "min_timestep": 5}
    values = groups.values_of(groups.LOSS, given)
    assert values == {"loss_type": "huber", "huber_schedule": "snr", "huber_c": 0.2, "min_timestep": 5}


def test_an_impossible_value_names_the_node() -> None:
    with pytest.raises(LoraGraftError, match="LG-CFG-003") as error:
        groups.values_of(groups.LOSS, {"huber_c": 7.0})
    assert "Loss and Noise" in str(error.value)


def test_two_nodes_of_a_kind_in_a_row_are_refused() -> None:
    first = groups.Linked(groups.values_of(groups.SAVING, {"sample_at_first": True}))
    with pytest.raises(LoraGraftError, match="LG-NODE-030"):
        groups.joined(first, groups.Linked({"sample_at_first": False}), "Saving")
    both = groups.joined(first, groups.Linked({"algo": "loha"}), "Network")
    assert both.values == {"sample_at_first": True, "algo": "loha"}


@pytest.mark.parametrize("config_first", [True, False])
def test_what_a_config_leaves_out_gives_way_to_a_node(config_first: bool) -> None:
    config = groups.Linked({"network_dim": 8}, {"lr_warmup_steps": 0, "learning_rate": 2e-6})
    node = groups.Linked({"lr_warmup_steps": 0.1})
    row = [config, node] if config_first else [node, config]
    both = groups.joined(row[0], row[1], "second")
    assert both.values == {"network_dim": 8, "lr_warmup_steps": 0.1, "learning_rate": 2e-6}


def test_linked_settings_count_and_are_told() -> None:
    on_node = widgets.settings(TrainConfig, {w.name: w.default for w in widgets.train_widgets()})
    linked = {"optimizer_type": "Lion", "conv_dim": None, "algo": "loha"}
    assert widgets.train_config(on_node, {**linked, "optimizer_type": "AdamW"}).algo == "loha"
    assert groups.told(linked, on_node) == [
        "optimizer_type = 'Lion' from the linked settings, instead of 'AdamW'"
    ]


def test_a_file_that_a_sweep_names_is_looked_for_by_its_name() -> None:
    axes = read_sweep("network_weights: ../a.safetensors, b.safetensors")
    named = [run.config for run in sweep_runs(axes, TrainConfig(network_weights="/loras/b.safetensors"))]
    asked: list[str] = []

    def find(name: str) -> Path:
        asked.append(name)
        return Path("/loras") / Path(name).name

    found = [groups.found_weights(run, "/loras/b.safetensors", find).network_weights for run in named]
    assert asked == [run.network_weights for run in named]
    assert all(Path(path).parent == Path("/loras") for path in found)
    plain = TrainConfig(network_weights="/loras/b.safetensors")
    assert groups.found_weights(plain, "/loras/b.safetensors", find) is plain
    assert groups.found_weights(TrainConfig(), "", find) == TrainConfig()


def ask(node: str, values: Any, steps: Any = 100, **beside: Any) -> dict[str, Any]:
    return ahead.answer(json.dumps({"node": node, "values": values, "steps": steps, "beside": beside}))


def test_the_schedule_is_drawn_with_the_functions_that_train() -> None:
    answer = ask("LoraGraftSchedule", {"lr_scheduler": "linear", "lr_warmup_steps": 10})
    curve = answer["curve"]
    assert answer["steps"] == 100 and curve[0] == 0.0 and max(curve) == pytest.approx(1e-4, rel=0.02)
    assert len(ask("LoraGraftSchedule", {}, steps=100_000)["curve"]) == ahead.POINTS
    assert curve[-1] < 0.02 * max(curve)


def test_the_curve_has_the_rates_and_the_optimizer_of_the_other_nodes() -> None:
    plain = {"learning_rate": 3e-4, "unet_lr": -1, "text_encoder_lr": -1, "sample_prompts": "x"}
    assert max(ask("LoraGraftSchedule", {}, **plain)["curve"]) == 3e-4
    assert max(ask("LoraGraftSchedule", {}, **plain | {"unet_lr": 5e-4})["curve"]) == 5e-4
    one = plain | {"learning_rate": 1.0}
    assert "far too high" in ask("LoraGraftSchedule", {}, **one)["error"]
    assert max(ask("LoraGraftSchedule", {}, **one, optimizer_type="Prodigy")["curve"]) == 1.0
    own = {"optimizer_type": "Adafactor"}
    assert max(ask("LoraGraftSchedule", {"lr_scheduler": "adafactor"}, **own)["curve"]) == 1e-2
    assert ask("LoraGraftBlocks", {}, **plain | {"learning_rate": 0.0})["bars"]["SDXL"][0][1] == 1


def test_a_nested_widget_counts() -> None:
    once = ask("LoraGraftSchedule", {"lr_scheduler": "cosine_with_restarts"})
    often = ask(
        "LoraGraftSchedule",
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler.lr_scheduler_num_cycles": 4},
    )
    assert once["curve"] != often["curve"]


def test_blocks_are_drawn_as_bars() -> None:
    found = ask("LoraGraftBlocks", {"down_lr_weight": "linear", "mid_lr_weight": "0.5"})["bars"]
    bars, sdxl = found["SD1.x, SD2.x"], found["SDXL"]
    assert len(bars) == 25 and bars[0][1] == 0 and bars[12][1] == 0.5 and bars[24][1] == 1
    assert len(sdxl) == 23 and sdxl[0][1] == 1 and sdxl[1][1] == 0 and sdxl[10][1] == 0.5 and sdxl[22][1] == 1


def test_a_contradiction_is_told_in_words() -> None:
    answer = ask("LoraGraftSchedule", {"lr_scheduler": "constant", "lr_warmup_steps": 10})
    assert "LG-CFG-004" in answer["error"]


def test_presets_say_what_to_fill_in_where() -> None:
    parts = ahead.answer(json.dumps({"presets": []}))["parts"]
    assert {"character", "style", "concept"} <= set(parts["kind"])
    found = ahead.answer(json.dumps({"presets": ["character", "loha", "8gb"]}))
    assert found["train"]["network_dim"] == 6 and found["train"]["learning_rate"] == 5e-5
    assert found["train"]["train_batch_size"] == 1 and found["dataset"]["keep_tokens"] == 1
    assert found["nodes"]["LoraGraftNetwork"]["algo"] == "loha"
    assert set(found["nodes"]["LoraGraftNetwork"]) >= {"conv_dim", "conv_alpha"}, "else its own would count"
    assert found["sources"]["keep_tokens"].startswith("S4")
    plain = ahead.answer(json.dumps({"presets": ["style"]}))
    assert plain["nodes"] == {}


def test_every_preset_fills_in_what_widgets_can_hold() -> None:
    parts = ahead.answer(json.dumps({"presets": []}))["parts"]
    for kind in parts["kind"]:
        for network in ("", *parts["network"]):
            found = ahead.answer(json.dumps({"presets": [n for n in (kind, network) if n]}))
            data = widgets.dataset_config(found["dataset"])
            assert data == api.make(api.DatasetConfig, found["dataset"])
            linked = {}
            for node, values in found["nodes"].items():
                linked |= groups.values_of(groups.GROUPS[node], values)
            wanted = api.preset([n for n in (kind, network) if n]).settings
            made = widgets.train_config(found["train"], linked)
            for name, value in wanted.items():
                if hasattr(made, name):
                    assert getattr(made, name) == value, name


@pytest.mark.parametrize("names", [["nothing"], ["character", "style"], "loha", {"a": 1}])
def test_impossible_presets_are_told(names: Any) -> None:
    assert "error" in ahead.answer(json.dumps({"presets": names}))


@pytest.mark.parametrize(
    "question",
    [
        "",
        "[]",
        "{",
        "7",
        "null",
        "[" * 5000,
        "x" * 30_000,
        json.dumps({"node": "LoraGraftTrainLoRA", "values": {}, "steps": 1}),
        json.dumps({"node": "LoraGraftSchedule", "values": [], "steps": 1}),
        json.dumps({"node": "LoraGraftSchedule", "values": {}, "steps": "many"}),
        json.dumps({"node": "LoraGraftSchedule", "values": {}, "steps": float("inf")}),
        json.dumps({"node": ["LoraGraftSchedule"], "values": {}, "steps": 1}),
    ],
)
def test_nonsense_is_answered_with_an_error(question: str) -> None:
    assert set(ahead.answer(question)) == {"error"}


def test_every_setting_of_the_nodes_is_one_of_a_run() -> None:
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    assert {name for group in GROUPS for name in group.names} <= known
