"""Settings of rectified flow and of further text encoders: what contradicts itself, and what empty means."""

from __future__ import annotations

from typing import Any

import pytest

from loragraft.trainer.checks import make
from loragraft.trainer.config import TrainConfig, encoder_lr, trained_encoders, trains_encoders
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.objective import SAMPLINGS

SDXL = {"text_encoder": "clip", "text_encoder_2": "clip"}
FLUX = {"text_encoder": "clip", "text_encoder_2": "t5"}
SD3 = {"text_encoder": "clip", "text_encoder_2": "clip", "text_encoder_3": "t5"}
QWEN = {"text_encoder": "qwen"}


@pytest.mark.parametrize(
    ("number", "settings", "users"),
    [
        ({"sigmoid_scale": 1.5}, "uniform", "shift"),
        ({"logit_mean": 0.5}, "sigmoid", "logit_normal"),
        ({"logit_std": 0.5}, "shift", "logit_normal"),
        ({"mode_scale": 0.5}, "sigma", "mode"),
        ({"discrete_flow_shift": 3.0}, "uniform", "sigma"),
        ({"discrete_flow_shift": 3.0}, "flux_shift", "logit_normal"),
    ],
)
def test_a_number_that_a_distribution_does_not_use_is_refused(
    number: dict[str, float], settings: str, users: str
) -> None:
    name = next(iter(number))
    with pytest.raises(LoraGraftError, match="LG-CFG-004") as error:
        make(TrainConfig, {**number, "timestep_sampling": settings})
    assert name in str(error.value) and users in error.value.fix
    assert make(TrainConfig, {**number, "timestep_sampling": users}).timestep_sampling == users
    assert make(TrainConfig, number), "auto may stand for one that uses it"


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_each_distribution_alone_is_fine(sampling: str) -> None:
    assert make(TrainConfig, {"timestep_sampling": sampling}).timestep_sampling == sampling


@pytest.mark.parametrize(
    ("values", "kinds", "trained"),
    [
        ({}, SDXL, {"text_encoder", "text_encoder_2"}),
        ({}, FLUX, {"text_encoder"}),
        ({}, SD3, {"text_encoder", "text_encoder_2"}),
        ({}, QWEN, set()),
        ({"text_encoder_lr": 1e-5}, QWEN, {"text_encoder"}),
        ({"text_encoder_2_lr": 1e-5}, FLUX, {"text_encoder", "text_encoder_2"}),
        ({"text_encoder_3_lr": 1e-5}, SD3, set(SD3)),
        ({"text_encoder_3_lr": 1e-5, "text_encoder_lr": 0.0}, SD3, {"text_encoder_3"}),
        ({"text_encoder_2_lr": 0.0}, SDXL, {"text_encoder"}),
        ({"text_encoder_lr": 0.0}, SDXL, set()),
        ({"text_encoder_lr": 0.0, "text_encoder_2_lr": 1e-5}, SDXL, {"text_encoder_2"}),
        ({"network_train_unet_only": True}, SDXL, set()),
    ],
)
def test_which_encoders_are_trained(values: dict[str, Any], kinds: dict[str, str], trained: set[str]) -> None:
    assert trained_encoders(make(TrainConfig, values), kinds) == trained


def test_rates_of_further_encoders() -> None:
    config = make(TrainConfig, {"learning_rate": 1e-4, "text_encoder_lr": 5e-5, "text_encoder_2_lr": 2e-5})
    parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    assert [encoder_lr(config, part) for part in parts] == [5e-5, 2e-5, 5e-5]
    assert encoder_lr(TrainConfig(), "text_encoder_2") == TrainConfig().learning_rate
    alone = make(TrainConfig, {"unet_lr": 0.0, "text_encoder_lr": 0.0, "text_encoder_2_lr": 1e-5})
    assert trains_encoders(alone) and encoder_lr(alone) == 0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"network_train_unet_only": True, "text_encoder_3_lr": 1e-5}, "text_encoder_3_lr"),
        ({"text_encoder_2_lr": 1e-5, "optimizer_type": "Prodigy", "learning_rate": 1.0}, "learning rates"),
        ({"text_encoder_2_lr": 1.0}, "text_encoder_2_lr"),
        ({"text_encoder_2_lr": 1e-5, "text_encoder_lr": 0.0, "cache_text_encoder_outputs": True}, "cache"),
        ({"text_encoder_2_lr": 1e-5, "preset": "unet-only"}, "text_encoder_2_lr"),
    ],
)
def test_rates_that_cannot_count_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(LoraGraftError, match="LG-CFG-004") as error:
        make(TrainConfig, values)
    assert named in str(error.value)
