"""Presets: every one builds a valid config, each number has its source, memory changes no result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.presets import BASES, KINDS, MEMORIES, MEMORY_SETTINGS, NETWORKS, PARTS
from loragraft_tests.trainer.data_folders import Refusal

# Settings that only decide how a step is computed, and in how many passes.
ONLY_MEMORY = {"train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}


def combinations() -> Iterator[tuple[str, ...]]:
    for parts in itertools.product((None, *KINDS), (None, *NETWORKS), (None, *BASES), (None, *MEMORIES)):
        names = tuple(name for name in parts if name)
        if not {"locon", "transformer"} <= set(names):
            yield names


@pytest.mark.parametrize("names", list(combinations()), ids=" ".join)
def test_every_combination_builds_a_valid_config_and_every_value_has_its_source(
    names: tuple[str, ...],
) -> None:
    preset = api.preset(names)
    api.make_both(preset.settings, where="preset")
    assert set(preset.sources) == set(preset.settings)
    assert all(len(source) > 8 for source in preset.sources.values())


@pytest.mark.parametrize(
    "part", [KINDS, {n: (t, rows) for n, (t, _, rows) in NETWORKS.items()}, BASES, MEMORIES]
)
def test_a_preset_leaves_nothing_of_another_one_of_its_part(part: dict[str, tuple[str, Any]]) -> None:
    assert len({frozenset(rows) for _, rows in part.values()}) == 1


def test_a_transformer_has_no_convolutions() -> None:
    assert not {"conv_dim", "conv_alpha"} & set(api.preset(["style", "loha", "transformer"]).settings)
    assert "conv_dim" in api.preset(["style", "loha", "sdxl"]).settings
    with Refusal("LG-CFG-003", "locon", "no convolutions"):
        api.preset(["locon", "transformer"])


def test_the_parts_are_named_once_each() -> None:
    presets = api.presets()
    assert len(presets) == len(KINDS) + len(NETWORKS) + len(BASES) + len(MEMORIES) == 11
    assert {preset.part for preset in presets.values()} == set(PARTS)
    for preset in presets.values():
        assert preset.title and set(preset.sources) == set(preset.settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # experience.md 3.4, with S1, S3 and S4
        (
            "character",
            {"network_dim": 32, "network_alpha": 16.0, "unet_lr": 1e-4, "text_encoder_lr": 5e-5,
             "lr_scheduler": "cosine", "min_snr_gamma": 5.0, "keep_tokens": 1, "max_train_steps": 1000},
        ),
        (
            "style",
            {"network_dim": 64, "network_alpha": 32.0, "lr_scheduler": "cosine_with_restarts",
             "lr_scheduler_num_cycles": 4, "keep_tokens": 0, "max_train_steps": 2500, "noise_offset": 0.0},
        ),
        ("concept", {"network_dim": 32, "network_alpha": 16.0, "max_train_steps": 3000}),
    ],
)  # fmt: skip
def test_the_guides_numbers(name: str, expected: dict[str, Any]) -> None:
    settings = api.presets()[name].settings
    assert {key: settings[key] for key in expected} == expected
    assert 0.05 <= settings["lr_warmup_steps"] <= 0.1  # S3
    assert settings["text_encoder_lr"] in (settings["unet_lr"] / 2, settings["unet_lr"] / 3)  # S4


@pytest.mark.parametrize(
    ("kind", "fewest", "most"),
    [("character", 2000, 7000), ("style", 8000, 12000)],
    ids=["character", "style"],
)
def test_steps_times_pictures_lie_in_what_the_other_guide_says(kind: str, fewest: int, most: int) -> None:
    """S3 counts steps, S4 pictures before they are divided by the batch: the presets keep both."""
    settings = api.presets()[kind].settings
    assert fewest <= settings["max_train_steps"] * settings["train_batch_size"] <= most


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_networks_follow_the_rule_of_their_guide(kind: str | None) -> None:
    start = [kind] if kind else []
    plain = api.preset([*start, "locon"]).settings
    locon, loha = (api.preset([*start, name]).settings for name in ("locon", "loha"))
    assert (locon["unet_lr"], loha["unet_lr"]) == (8e-5, 5e-5)
    assert [api.preset([*start, *name]).relative_time for name in ([], ["locon"], ["loha"])] == [1, 1.44, 2]
    assert locon["network_dim"] / 4 <= locon["conv_dim"] <= locon["network_dim"] / 2
    for rank in ("network_dim", "conv_dim"):
        assert loha[rank] == round(plain[rank] ** 0.5)
    for settings in (locon, loha):
        assert settings["network_alpha"] / settings["network_dim"] == 0.5
        assert settings["conv_alpha"] / settings["conv_dim"] == 0.5


def test_memory_touches_only_memory_and_leaves_the_pictures_of_a_step() -> None:
    assert set(MEMORY_SETTINGS) == ONLY_MEMORY
    for kind in KINDS:
        plain = api.presets()[kind].settings
        for memory in MEMORIES:
            settings = api.preset([kind, memory]).settings
            changed = {key for key in settings if settings[key] != plain.get(key)}
            assert changed <= ONLY_MEMORY
            step = settings["train_batch_size"] * settings["gradient_accumulation_steps"]
            assert step == plain["train_batch_size"]
    batches = [api.preset([name]).settings["train_batch_size"] for name in MEMORIES]
    assert batches == sorted(batches)


def test_the_order_of_names_does_not_matter() -> None:
    assert api.preset(["8gb", "loha", "style"]) == api.preset(["style", "loha", "8gb"])


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["caracter"], "'character'"),
        (["style", "concept"], "style, concept"),
        (["8gb", "24gb"], "one of 8gb"),
    ],
)
def test_refusals(names: list[str], named: str) -> None:
    with pytest.raises(LoraGraftError, match="LG-CFG-003") as caught:
        api.preset(names)
    assert named in caught.value.fix
