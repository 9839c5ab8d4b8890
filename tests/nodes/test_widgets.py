"""Node widgets and settings are the same thing: nothing missing, nothing invented, equal limits."""

from __future__ import annotations

import dataclasses
import typing
from types import SimpleNamespace
from typing import Any

import pytest

from loragraft.nodes import widgets
from loragraft.nodes.settings_groups import GROUPS
from loragraft.trainer.checks import make
from loragraft.trainer.config import DatasetConfig, TrainConfig, info_of
from loragraft.trainer.errors import LoraGraftError

BOTH = (
    (
        DatasetConfig,
        widgets.dataset_widgets,
        widgets.DATASET_COMMON,
        widgets.DATASET_ADVANCED,
        widgets.dataset_config,
    ),
    (TrainConfig, widgets.train_widgets, widgets.TRAIN_COMMON, widgets.TRAIN_ADVANCED, widgets.train_config),
)


ON_SETTINGS_NODES = [name for group in GROUPS.values() for name in group.names]


@pytest.mark.parametrize(("cls", "listed", "common", "advanced", "build"), BOTH)
class TestTables:
    def test_every_setting_has_one_widget_in_the_right_group(
        self, cls: Any, listed: Any, common: Any, advanced: Any, build: Any
    ) -> None:
        names = [w.name for w in listed()]
        elsewhere = set(ON_SETTINGS_NODES) - set(names) if cls is TrainConfig else set()
        assert sorted([*names, *elsewhere]) == sorted(f.name for f in dataclasses.fields(cls))
        assert names == [*common, *advanced]
        assert {n for n in names if info_of(cls, n).advanced} == set(advanced)
        assert {w.name for w in listed() if w.advanced} == set(advanced)

    def test_the_widgets_defaults_are_the_settings_defaults(
        self, cls: Any, listed: Any, common: Any, advanced: Any, build: Any
    ) -> None:
        assert build({w.name: w.default for w in listed()}) == make(cls, {})

    def test_limits_choices_and_help_come_from_the_settings(
        self, cls: Any, listed: Any, common: Any, advanced: Any, build: Any
    ) -> None:
        for w in listed():
            info = info_of(cls, w.name)
            assert w.tooltip == widgets.tooltip_of(w.name, info.help)
            assert w.choices == info.choices
            if w.kind in ("int", "float"):
                low = widgets.EMPTY.get(w.name, info.minimum)
                assert (w.minimum, w.maximum) == (low, widgets.MAXIMA.get(w.name, info.maximum))
                assert w.step and w.default is not None

    def test_a_setting_that_may_be_empty_has_a_value_for_it(
        self, cls: Any, listed: Any, common: Any, advanced: Any, build: Any
    ) -> None:
        hints = typing.get_type_hints(cls)
        optional = {n for n, h in hints.items() if type(None) in typing.get_args(h)}
        assert optional == {n for n in widgets.EMPTY if n in hints}
        for name in optional:
            assert getattr(build({name: widgets.EMPTY[name]}), name) is None
            tooltip = widgets.tooltip_of(name, info_of(cls, name).help)
            assert str(widgets.EMPTY[name]) in tooltip, "the tooltip says which value is empty"
            minimum = info_of(cls, name).minimum
            assert minimum is not None and (widgets.EMPTY[name] < minimum), "a real value must not mean empty"

    def test_numbers_a_browser_rounds_to_stay_on_the_settings_grid(
        self, cls: Any, listed: Any, common: Any, advanced: Any, build: Any
    ) -> None:
        # The frontend snaps integers to minimum + k * step, so defaults must lie on that grid.
        for w in listed():
            if w.kind == "int":
                assert (w.default - w.minimum) % w.step == 0, w.name


def test_zero_learning_rate_is_no_empty_value() -> None:
    assert widgets.train_config({"text_encoder_lr": 0.0}).text_encoder_lr == 0.0
    assert widgets.train_config({"text_encoder_lr": -1.0}).text_encoder_lr is None


def test_texts_become_lists() -> None:
    config = widgets.train_config(
        {
            "sample_prompts": "a cat, sitting\n\n  a dog \n",
            "optimizer_args": "weight_decay=0.02  betas=.9,.95",
        }
    )
    assert config.sample_prompts == ("a cat, sitting", "a dog")
    assert config.optimizer_args == ("weight_decay=0.02", "betas=.9,.95")


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0), (0.05, 0.05), (1.0, 1), (100.0, 100)])
def test_warm_up_is_a_share_below_one_and_a_number_above(value: float, expected: float) -> None:
    made = widgets.train_config({"lr_warmup_steps": value}).lr_warmup_steps
    assert made == expected and type(made) is type(expected)


def test_max_token_length_is_a_number_again() -> None:
    assert widgets.train_config({"max_token_length": "150"}).max_token_length == 150


@pytest.mark.parametrize(
    "values",
    [
        {"network_dim": 0},
        {"max_token_length": "80"},
        {"lr_scheduler": "sine"},
        {"unet_lr": -0.5},
        {"rank": 4},
        {"seed": -1},
    ],
)
def test_what_a_posted_prompt_may_hold_is_checked_again(values: dict[str, Any]) -> None:
    with pytest.raises(LoraGraftError, match="LG-CFG"):
        widgets.train_config(values)


def test_inputs_are_made_for_the_host() -> None:
    made: list[tuple[str, str, dict[str, Any]]] = []

    def kind(name: str) -> SimpleNamespace:
        return SimpleNamespace(Input=lambda widget, **given: made.append((name, widget, given)))

    io = SimpleNamespace(
        Int=kind("int"),
        Float=kind("float"),
        Boolean=kind("bool"),
        String=kind("text"),
        Combo=kind("choice"),
        ControlAfterGenerate=SimpleNamespace(fixed="fixed"),
    )
    widgets.inputs(io, widgets.train_widgets())
    by_name = {name: (k, given) for k, name, given in made}
    assert by_name["seed"][1]["control_after_generate"] == "fixed"
    assert by_name["network_dim"][1]["control_after_generate"] is None
    assert by_name["learning_rate"][1]["round"] is False
    assert by_name["sample_prompts"][1]["multiline"] is True
    assert by_name["lr_scheduler"][1]["options"][0] == "constant"
    advanced = {n for n, (_, given) in by_name.items() if given.get("advanced")}
    assert advanced == set(widgets.TRAIN_ADVANCED)
    assert all(by_name[n][1]["optional"] for n in advanced), "old prompts stay valid when a setting is added"
