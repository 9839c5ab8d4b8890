"""A sweep's text and table, the runs they make, and the names by which these are told apart."""

from __future__ import annotations

from typing import Any

import pytest

from loragraft.trainer import api, opened
from loragraft.trainer.config import TrainConfig
from loragraft.trainer.literals import literal
from loragraft.trainer.sweep import (
    MAX_NAME,
    NOT_SWEPT,
    Axis,
    read_sweep,
    shared_start,
    sweep_from_table,
    sweep_runs,
)
from loragraft_tests.trainer.data_folders import Refusal

CONFIG = api.make(TrainConfig, {"output_name": "cat", "max_train_steps": 9})


def values(text: str, *names: str, config: TrainConfig = CONFIG) -> list[tuple[Any, ...]]:
    """Return these settings of each run that the text makes."""
    return [tuple(getattr(r.config, n) for n in names) for r in sweep_runs(read_sweep(text), config)]


def test_every_value_is_combined_with_every_other_and_the_last_line_changes_fastest() -> None:
    text = "learning_rate: 1e-4, 3e-4\n\n  # ranks\nnetwork_dim: 8, 32 / network_alpha: 4, 16\n"
    assert values(text, "learning_rate", "network_dim", "network_alpha", "max_train_steps") == [
        (1e-4, 8, 4.0, 9),
        (1e-4, 32, 16.0, 9),
        (3e-4, 8, 4.0, 9),
        (3e-4, 32, 16.0, 9),
    ]


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("seed: 1,2 , 3", "seed", [1, 2, 3]),
        ("learning_rate: .05, 1e-3, 0.1", "learning_rate", [0.05, 1e-3, 0.1]),
        ("network_train_unet_only: true, false", "network_train_unet_only", [True, False]),
        ("lr_scheduler: cosine, constant", "lr_scheduler", ["cosine", "constant"]),
        ("min_snr_gamma: none, 5", "min_snr_gamma", [None, 5.0]),
        ("metadata_title: 2024, 'a, b', c/d, 'c/d: e'", "metadata_title", ["2024", "a, b", "c/d", "c/d: e"]),
        ("training_comment: Ann's, Bob's", "training_comment", ["Ann's", "Bob's"]),
        ("optimizer_args: eps=1e-9, ['weight_decay=0.1', 'betas=.9,.99']", "optimizer_args",
         [("eps=1e-9",), ("weight_decay=0.1", "betas=.9,.99")]),
        ("max_token_length: 75, 150", "max_token_length", [75, 150]),
    ],
)  # fmt: skip
def test_values_are_read_as_the_command_line_reads_them(text: str, name: str, expected: list[Any]) -> None:
    assert [v for (v,) in values(text, name)] == expected


def test_a_table_means_the_same_as_lines() -> None:
    table = {"learning_rate": [1e-4, 3e-4], "network_dim/network_alpha": [[8, 4], [32, 16]]}
    lines = "learning_rate: 1e-4, 3e-4\nnetwork_dim: 8, 32 / network_alpha: 4, 16"
    assert sweep_from_table(table) == read_sweep(lines)
    assert sweep_from_table({"min_snr_gamma": ["none", 5]}) == read_sweep("min_snr_gamma: none, 5")
    assert read_sweep(lines)[1] == Axis(("network_dim", "network_alpha"), ((8, 4.0), (32, 16.0)))


def names(text: str, output_name: str = "cat") -> list[str]:
    config = api.make(TrainConfig, {"output_name": output_name})
    return [r.config.output_name for r in sweep_runs(read_sweep(text), config)]


def test_files_are_named_after_their_values() -> None:
    assert names("learning_rate: 0.0001, 3e-4\nnetwork_dim: 8, 32") == [
        "cat_learning_rate1e-4_network_dim8",
        "cat_learning_rate1e-4_network_dim32",
        "cat_learning_rate3e-4_network_dim8",
        "cat_learning_rate3e-4_network_dim32",
    ]
    assert names("network_alpha: 8, 0.5\nmin_snr_gamma: none, 1.5") == [
        "cat_network_alpha8_min_snr_gammanone",
        "cat_network_alpha8_min_snr_gamma1.5",
        "cat_network_alpha0.5_min_snr_gammanone",
        "cat_network_alpha0.5_min_snr_gamma1.5",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "training_comment: a, A, a?, a/, '', ' '",
        "training_comment: " + ", ".join("x" * 50 + str(i) for i in range(20)),
        "sample_prompts: ['\u732b'], ['\u72ac'], ['../..']",
        "learning_rate: 1.00000001e-4, 1.00000002e-4, 1e-4",
        "\n".join(
            f"{n}: 1, 2" for n in ("seed", "network_dim", "sample_steps", "gradient_accumulation_steps")
        ),
    ],
)
@pytest.mark.parametrize("output_name", ["cat", "\u732b" * 40])
def test_names_are_safe_short_and_never_the_same(text: str, output_name: str) -> None:
    found = names(text, output_name)
    assert len({name.casefold() for name in found}) == len(found) > 2
    for name in found:
        assert api.safe_name(name) and len(name.encode()) <= MAX_NAME
    assert found == names(text, output_name)


def test_another_value_changes_no_other_runs_name() -> None:
    few, many = names("training_comment: a?, b"), names("training_comment: a/, a?, b, c")
    assert set(few) < set(many)


def test_labels_say_what_sets_a_run_apart() -> None:
    runs = sweep_runs(read_sweep("learning_rate: 1e-4, 3e-4 / seed: 1, 2"), CONFIG)
    assert [r.label for r in runs] == ["learning_rate 1e-4, seed 1", "learning_rate 3e-4, seed 2"]


@pytest.mark.parametrize(
    ("found", "rest"),
    [
        (["my_cat_learning_rate1e-4_seed1", "my_cat_learning_rate3e-4_seed1"], "learning_rate1e-4_seed1"),
        (["my_cat_v1", "my_cat_v2"], "v1"),
        (["cat", "car"], "cat"),
        (["one_file"], "one_file"),
        (["same_a", "same_a_2"], "a"),
    ],
)
def test_what_names_have_in_common_ends_before_a_setting_or_word(found: list[str], rest: str) -> None:
    assert found[0][shared_start(found) :] == rest


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("learning_rat: 1, 2", "LG-CFG-001", "'learning_rate'"),
        ("colour: 1, 2", "LG-CFG-001", "did you mean"),
        ("resolution: 512, 768", "LG-SWEEP-002", "dataset"),
        ("output_name: a, b", "LG-SWEEP-002", "name of its own"),
        ("seed 1, 2", "LG-SWEEP-001", "setting: value"),
        (": 1, 2", "LG-SWEEP-001", "setting: value"),
        ("seed: 1, 2\nseed: 3, 4", "LG-SWEEP-001", "two lines"),
        ("seed: 1, 2 / seed: 3, 4", "LG-SWEEP-001", "twice"),
        ("network_dim: 8, 32 / network_alpha: 4", "LG-SWEEP-001", "2 of network_dim, 1 of network_alpha"),
        ("x" * 5000, "LG-SWEEP-001", "longer"),
        ("", "LG-SWEEP-003", "2 to 64"),
        ("# seed: 1, 2", "LG-SWEEP-003", "2 to 64"),
        ("seed: 1", "LG-SWEEP-003", "1 runs"),
        ("seed: " + ", ".join(map(str, range(65))), "LG-SWEEP-003", "65 runs"),
        ("seed: 1, 2, 3\nnetwork_dim: 1, 2, 3\nsample_steps: 1, 2, 3, 4, 5, 6, 7, 8", "LG-SWEEP-003", "72"),
        ("learning_rate: 1e-4, 0.0001", "LG-SWEEP-004", "learning_rate"),
        ("optimizer_type: AdamW, adamw", "LG-SWEEP-004", "AdamW"),
        ("seed: 1, 1 / network_dim: 8, 8", "LG-SWEEP-004", "seed, network_dim"),
        ("network_dim: 8, 0", "LG-CFG-003", "1 to 1024"),
        ("network_dim: 8, many", "LG-CFG-003", "many"),
        ("network_dim: 8,", "LG-CFG-003", "network_dim"),
        ("network_dim: 8, none", "LG-CFG-003", "none"),
        ("lr_scheduler: cosine, linar", "LG-CFG-003", "'linear'"),
        ("optimizer_args: eps, eps=1", "LG-CFG-002", "eps"),
        ("seed: 1, " + "[" * 3000, "LG-CFG-003", "seed"),
    ],
)
def test_what_makes_no_sweep_is_refused(text: str, code: str, named: str) -> None:
    with Refusal(code, named):
        read_sweep(text)


@pytest.mark.parametrize(
    "table",
    [
        {"seed": 1},
        {"network_dim/network_alpha": [8, 32]},
        {"network_dim/network_alpha": [[8, 4], [32]]},
        {"seed/seed": [[1, 2], [3, 4]]},
    ],
)
def test_a_table_of_another_shape_is_refused(table: dict[str, Any]) -> None:
    with Refusal("LG-SWEEP-001", "list"):
        sweep_from_table(table)


def test_settings_that_contradict_each_other_are_refused_for_the_run_that_has_them() -> None:
    axes = read_sweep("conv_alpha: 1, 2")  # a contradiction only where conv_dim is not set
    with Refusal("LG-CFG-004", "conv_alpha 1"):
        sweep_runs(axes, CONFIG)
    with_convolutions = api.make(TrainConfig, {"conv_dim": 4})
    assert [r.config.conv_alpha for r in sweep_runs(axes, with_convolutions)] == [1.0, 2.0]
    with Refusal("LG-PATH-001", "output_name"):
        sweep_runs(axes, api.make(TrainConfig, {"conv_dim": 4, "output_name": "a/b"}))


@pytest.mark.parametrize("name", NOT_SWEPT)
def test_what_runs_share_cannot_be_swept(name: str) -> None:
    with Refusal("LG-SWEEP-002", NOT_SWEPT[name][:-1]):
        read_sweep(f"{name}: 1, 2")


def test_all_that_runs_side_by_side_share_is_listed() -> None:
    assert {*opened.SHARED, "mixed_precision", "output_name"} <= NOT_SWEPT.keys() <= vars(CONFIG).keys()


@pytest.mark.parametrize(
    ("text", "value"),
    [("512", 512), ("1e-4", 1e-4), (".5", 0.5), ("true", True), ("[1, 2]", [1, 2]), ("'x'", "x"), ("x", "x")],
)
def test_literals(text: str, value: Any) -> None:
    assert literal(text) == value and type(literal(text)) is type(value)
