"""Block weights equal the reference's vectors, and reach the learning rates of the right modules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.block_weights import SD1, SDXL, block_lr_weights, notes, zero_blocks
from loragraft.trainer.families.modules.unet import block_of
from loragraft.trainer.optim.curve import block_bars
from loragraft.trainer.optim.groups import group_tensors
from loragraft.trainer.parts import Target
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal, golden

CASES = golden("block_lr_weight")
SINE = [math.sin(math.pi * i / 22) for i in range(12)]


def settings(**changes: Any) -> api.TrainConfig:
    changes = {k: float(v) if k == "block_lr_zero_threshold" else v for k, v in changes.items()}
    return runs.settings(**changes)


@pytest.mark.parametrize("case", CASES, ids=[f"{c['is_sdxl']} {c['args']}" for c in CASES])
def test_every_vector_equals_the_references(case: dict[str, Any]) -> None:
    found = block_lr_weights(settings(**case["args"]), SDXL if case["is_sdxl"] else SD1)
    assert found is not None and len(found) == (23 if case["is_sdxl"] else 25)
    assert list(found) == pytest.approx(case["weights"], rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "threshold", "expected"),
    [
        ("sine-.5", 0.1, [0.0] * 5 + [s - 0.5 for s in SINE[5:]]),
        ("sine - 0.5", 0.1, [0.0] * 5 + [s - 0.5 for s in SINE[5:]]),
        ("linear", 0.1, [0.0, 0.0] + [i / 11 for i in range(2, 12)]),
        ("cosine", 0.1, [*reversed(SINE[1:]), 0.0]),
        ("zeros+.3", 0.3, [0.0] * 12),
        ("0.5", 0.0, [0.5] * 12),
        ("0,,1", 0.0, [0.0, 0.0] + [1.0] * 10),
        ("1e-1", 0.0, [0.1] * 12),
    ],
)
def test_what_the_reference_cannot_read_means_what_it_says(
    text: str, threshold: float, expected: list[float]
) -> None:
    found = block_lr_weights(settings(down_lr_weight=text, block_lr_zero_threshold=threshold), SD1)
    assert found is not None
    assert list(found[:12]) == pytest.approx(expected, abs=1e-12)
    assert found[12:] == (1.0,) * 13


def test_without_weights_there_are_none() -> None:
    assert block_lr_weights(runs.settings(), SD1) is None
    assert zero_blocks(runs.settings(), SD1) == frozenset()
    assert zero_blocks(settings(down_lr_weight="linear", up_lr_weight="cosine"), SD1) == {0, 24}


def test_lists_of_another_length_are_told() -> None:
    config = settings(down_lr_weight="1,2", mid_lr_weight="2", up_lr_weight=",".join(["1"] * 12))
    assert list(notes(config, SD1)) == ["down_lr_weight has 2 of 12 values; the other blocks have weight 1"]
    assert [line.split()[0] for line in notes(config, SDXL)] == [
        "down_lr_weight",
        "mid_lr_weight",
        "up_lr_weight",
    ]
    assert not list(notes(settings(down_lr_weight="sine+.1"), SDXL))


def test_blocks_that_stand_still_are_told() -> None:
    config = settings(down_lr_weight="sine-.5", up_lr_weight="-1", block_lr_zero_threshold=0.1)
    (line,) = notes(config, SD1)
    told = [f"down {i}" for i in range(5)] + [f"up {i}" for i in range(12)]
    assert line == "not trained, as their weight is not above 0.1: " + ", ".join(told)


@pytest.mark.parametrize(
    "text", ["sines", "sine+", "sine+x", "sine+.5+1", "1,x", "nan", "inf,1", "1e9", "0x1", "sine,1", "+", " "]
)
def test_other_texts_are_refused(text: str) -> None:
    with Refusal("LG-CFG-003", "down_lr_weight"):
        settings(down_lr_weight=text)


def test_a_preset_for_the_middle_is_refused() -> None:
    with Refusal("LG-CFG-003", "mid_lr_weight"):
        settings(mid_lr_weight="sine")


@pytest.mark.parametrize(
    ("path", "index"),
    [
        ("conv_in", None),
        ("time_embedding.linear_1", None),
        ("down_blocks.0.attentions.0.proj_in", 1),
        ("down_blocks.0.resnets.1.conv1", 2),
        ("down_blocks.0.downsamplers.0.conv", 3),
        ("down_blocks.3.resnets.1.conv2", 11),
        ("mid_block.attentions.0.proj_in", 12),
        ("mid_block.resnets.1.conv1", 12),
        ("up_blocks.0.resnets.0.conv1", 13),
        ("up_blocks.0.upsamplers.0.conv", 15),
        ("up_blocks.3.attentions.2.proj_out", 24),
    ],
)
def test_modules_are_counted_as_the_reference_counts(path: str, index: int | None) -> None:
    assert block_of(path) == index


def test_every_target_of_the_denoiser_lies_in_a_block(base: api.Base) -> None:
    targets = base.family.targets(base.load(), convolutions=True)
    assert {t.block is None for t in targets if t.part == "denoiser"} == {False}
    assert {t.block for t in targets if t.part == "text_encoder"} == {None}
    assert base.family.blocks == SD1 and len(SD1.names) == 25 and SD1.names[12] == "mid 0"


# ---- groups ----


def modules() -> list[tuple[Target, dict[str, nn.Parameter]]]:
    """Return a module of the text encoder and one of each of three blocks."""
    targets = [Target("text_encoder", "t", "lora_te_t", "linear")] + [
        Target("denoiser", f"down_blocks.{n}.attn.to_q", f"lora_unet_down_blocks_{n}_to_q", "linear", block)
        for n, block in enumerate((0, 1, 11))
    ]
    names = ("lora_down.weight", "lora_up.weight")
    return [(target, {name: nn.Parameter(torch.zeros(1)) for name in names}) for target in targets]


def found(config: api.TrainConfig) -> dict[str, float]:
    return {group.label: group.lr for group in group_tensors(config, modules(), SD1)}


def test_rates_are_those_of_the_part_times_the_blocks_weight() -> None:
    assert found(runs.settings(learning_rate=1e-3)) == {"text_encoder": 1e-3, "denoiser": 1e-3}
    weighed = settings(learning_rate=1e-3, unet_lr=2e-3, down_lr_weight="linear+1")
    assert found(weighed) == pytest.approx(
        {"text_encoder": 1e-3, "denoiser down 0": 2e-3, "denoiser down 1": 2e-3 * 12 / 11,
         "denoiser down 11": 4e-3}
    )  # fmt: skip


def test_a_block_of_weight_0_learns_nothing() -> None:
    assert "denoiser down 0" not in found(settings(down_lr_weight="sine"))
    with Refusal("LG-CFG-004", "block_lr_zero_threshold"):
        found(settings(down_lr_weight="zeros", text_encoder_lr=0.0))


def test_lora_plus_speeds_up_the_up_matrices() -> None:
    config = settings(learning_rate=1e-3, loraplus_lr_ratio=16.0, loraplus_text_encoder_lr_ratio=4.0)
    assert found(config) == pytest.approx(
        {"text_encoder": 1e-3, "text_encoder up": 4e-3, "denoiser": 1e-3, "denoiser up": 16e-3}
    )
    groups = group_tensors(config, given := modules(), SD1)
    assert groups[1].tensors == [given[0][1]["lora_up.weight"]]


def test_patterns_give_modules_rates_of_their_own() -> None:
    config = settings(
        learning_rate=1e-3,
        down_lr_weight="0.5",
        loraplus_unet_lr_ratio=2.0,
        network_reg_lrs=[r"re:.*blocks\.1.*to_q$=1e-5", "down_blocks=3e-5"],
    )
    first, second = r"denoiser .*blocks\.1.*to_q$", "denoiser down_blocks"
    assert found(config) == pytest.approx(
        {"text_encoder": 1e-3, second: 3e-5, f"{second} up": 6e-5, first: 1e-5, f"{first} up": 2e-5}
    )


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with Refusal("LG-CFG-004", "up_blocks_9", "lora_te_t"):
        found(settings(network_reg_lrs=["up_blocks_9=1e-4"]))


@pytest.mark.parametrize(
    "pattern",
    ["to_q", "=1e-4", "a=x", "a=nan", "a=11", "a=-1", "(a=1", "(a+)+b=1", "(a|a)*b=1", r"(a)\1=1", "(?=a)=1",
     "a*a*a*a*b=1", "x" * 300 + "=1", "a{2,99}b{1,}c+d*e=1"],
)  # fmt: skip
def test_patterns_that_cannot_be_read_or_take_for_ever_are_refused(pattern: str) -> None:
    with Refusal("LG-CFG-003", "network_reg_lrs"):
        settings(network_reg_lrs=[pattern])


def test_a_family_without_blocks_refuses_their_weights() -> None:
    with Refusal("LG-CFG-004", "network_reg_lrs"):
        group_tensors(settings(mid_lr_weight="2"), modules(), None)
    assert len(group_tensors(runs.settings(), modules(), None)) == 2


def test_all_rates_grow_with_the_batch_where_that_is_wanted() -> None:
    config = settings(learning_rate=1e-3, scale_lr=True, train_batch_size=3, gradient_accumulation_steps=2)
    assert found(config) == pytest.approx({"text_encoder": 6e-3, "denoiser": 6e-3})


def test_bars_show_every_blocks_rate() -> None:
    bars = block_bars(settings(unet_lr=2e-3, up_lr_weight="zeros+.5"), SD1)
    assert bars[0] == ("down 0", 2e-3) and bars[24] == ("up 11", 1e-3) and len(bars) == 25
    assert block_bars(runs.settings(), None) == []
    assert dict(block_bars(runs.settings(unet_lr=1e-3), SDXL))["after 0"] == 1e-3
