"""Loss, noise and text settings that contradict each other: refused, with the nearest that do not."""

from __future__ import annotations

from typing import Any

import pytest

from loragraft.trainer import api
from loragraft.trainer.checks import make
from loragraft.trainer.config import TrainConfig, token_length
from loragraft.trainer.settings.words import Word, parse_words
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal

VELOCITY = {"v_parameterization": True}
HUBER = {"loss_type": "huber"}
CONTRADICTIONS: list[tuple[dict[str, Any], str, dict[str, Any] | None]] = [
    # settings, what the refusal names, what makes them valid
    ({"zero_terminal_snr": True}, "v_parameterization", VELOCITY),
    ({"scale_v_pred_loss_like_noise_pred": True}, "v_parameterization", VELOCITY),
    ({"v_pred_like_loss": 0.5, **VELOCITY}, "v_pred_like_loss", {"v_parameterization": False}),
    ({"huber_schedule": "constant"}, "loss_type", HUBER),
    ({"huber_c": 0.2, "loss_type": "l1"}, "huber_c", {"loss_type": "smooth_l1"}),
    ({"huber_scale": 2.0, **HUBER}, "huber_schedule", {"huber_schedule": "exponential"}),
    ({"noise_offset_random_strength": True}, "noise_offset", {"noise_offset": 0.1}),
    ({"adaptive_noise_scale": 0.1}, "noise_offset", {"noise_offset": 0.1}),
    ({"multires_noise_discount": 0.8}, "multires_noise_iterations", {"multires_noise_iterations": 6}),
    ({"ip_noise_gamma_random_strength": True}, "ip_noise_gamma", {"ip_noise_gamma": 0.1}),
    ({"mask_range": "hcp", "masked_loss": False}, "masked_loss", {"masked_loss": True}),
    ({"min_timestep": 500, "max_timestep": 500}, "499", {"min_timestep": 499}),
    ({"tokenizer_repeats": 3, "max_token_length": 150}, "set it to 2", {"tokenizer_repeats": 2}),
    ({"weighted_captions_keep_mean": True}, "weighted_captions", {"weighted_captions": True}),
    (
        {"cache_text_encoder_outputs": True, "text_encoder_lr": 5e-5},
        "network_train_unet_only",
        {"text_encoder_lr": 0.0},
    ),
    (
        {"cache_text_encoder_outputs": True, "network_train_unet_only": True, "train_embeddings": ["a"]},
        "train_embeddings",
        {"cache_text_encoder_outputs": False},
    ),
    ({"embedding_lr": 0.01}, "train_embeddings", {"train_embeddings": ["zibu"]}),
]


@pytest.mark.parametrize(("given", "named", "remedy"), CONTRADICTIONS, ids=lambda x: str(x)[:40])
def test_a_contradiction_is_refused_and_its_remedy_works(
    given: dict[str, Any], named: str, remedy: dict[str, Any]
) -> None:
    with Refusal("LG-CFG-004", named):
        make(TrainConfig, given)
    make(TrainConfig, {**given, **remedy})


def test_min_snr_gamma_must_be_above_zero() -> None:
    for value in (0, 0.0, -5.0):
        with Refusal("LG-CFG-003", "min_snr_gamma"):
            make(TrainConfig, {"min_snr_gamma": value})


def test_lengths_are_given_in_tokens_or_in_chunks() -> None:
    assert token_length(runs.settings()) == 75
    assert token_length(runs.settings(max_token_length=225)) == 225
    assert token_length(runs.settings(tokenizer_repeats=5)) == 375
    assert token_length(runs.settings(tokenizer_repeats=2, max_token_length=150)) == 150


def test_words_are_read_as_they_are_written() -> None:
    entries = ["Zibu", "pt-1*4", "pt2=red cat", " pt_3 = a = b *2 "]
    assert parse_words(entries) == [
        Word("zibu"),
        Word("pt-1", vectors=4),
        Word("pt2", "red cat"),
        Word("pt_3", "a = b", 2),
    ]


@pytest.mark.parametrize(
    "entry", ["", "*3", "two words", "a*0", "a*76", "a*x", "a=", "../a", "a/b", "a,b", "x" * 65]
)
def test_words_that_cannot_be_are_refused(entry: str) -> None:
    with Refusal("LG-CFG-003", "train_embeddings"):
        make(TrainConfig, {"train_embeddings": [entry]})
    with Refusal("LG-CFG-003", "named twice"):
        make(TrainConfig, {"train_embeddings": ["zibu", "ZIBU=cat"]})


def test_a_scale_of_masks_without_masks_is_refused(training: runs.Training) -> None:
    with Refusal("LG-CFG-004", "mask_range", "no picture has a mask"):
        training.events(mask_range="hcp", max_train_steps=1)


def test_emphasis_without_brackets_is_said(training: runs.Training) -> None:
    events = training.events(weighted_captions=True, max_train_steps=1)
    lines = runs.only(events, api.Planned).lines
    assert any("no caption has brackets" in line for line in lines)


def test_a_word_whose_file_could_have_no_name_is_refused_before_anything_is_trained() -> None:
    given = {"output_name": "x" * 100, "train_embeddings": ["\u5b57" * 7]}
    with Refusal("LG-CFG-003", "train_embeddings", "120 bytes"):
        make(TrainConfig, given)
    make(TrainConfig, {**given, "output_name": "x" * 90})
