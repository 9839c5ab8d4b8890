"""Settings: what is accepted, what is refused and how the refusal reads, and their way through files."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

import pytest

from loragraft.trainer import api
from loragraft.trainer.checks import make, make_both
from loragraft.trainer.config import (
    DatasetConfig,
    TrainConfig,
    as_dict,
    denoiser_lr,
    encoder_lr,
    info_of,
    optimizer_kwargs,
    resolution_wh,
)
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.optim.build import build_optimizer
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal

BOTH: tuple[type, ...] = (DatasetConfig, TrainConfig)
FIELDS = [(cls, f.name) for cls in BOTH for f in dataclasses.fields(cls)]
IDS = [name for _, name in FIELDS]


def kinds(cls: type, name: str) -> tuple[Any, ...]:
    """Return the types that a setting may have."""
    hint = typing.get_type_hints(cls)[name]
    return (
        typing.get_args(hint) if typing.get_origin(hint) is not tuple and typing.get_args(hint) else (hint,)
    )


# What loss, noise and text settings need beside them.
LOSS_NEIGHBOURS: dict[str, dict[str, Any]] = {
    "huber_c": {"loss_type": "huber"},
    "huber_scale": {"loss_type": "huber", "huber_schedule": "constant"},
    "adaptive_noise_scale": {"noise_offset": 0.1},
    "multires_noise_discount": {"multires_noise_iterations": 6},
    "embedding_lr": {"train_embeddings": ["zibu"]},
}


# What schedules and block weights need beside them; with epochs, the run's length is not known yet.
LEARNING_NEIGHBOURS: dict[str, dict[str, Any]] = {
    "lr_warmup_steps": {"lr_scheduler": "cosine", "max_train_epochs": 1},
    "lr_decay_steps": {"lr_scheduler": "warmup_stable_decay", "max_train_epochs": 1},
    "lr_scheduler_num_cycles": {"lr_scheduler": "cosine_with_restarts"},
    "lr_scheduler_power": {"lr_scheduler": "polynomial"},
    "lr_scheduler_min_lr_ratio": {"lr_scheduler": "cosine_with_min_lr"},
    "lr_scheduler_timescale": {"lr_scheduler": "inverse_sqrt"},
    "block_lr_zero_threshold": {"down_lr_weight": "sine"},
}


# What networks, saves and samples need beside them.
OTHER_NEIGHBOURS: dict[str, dict[str, Any]] = {
    "conv_alpha": {"conv_dim": 4},
    "factor": {"algo": "lokr"},
    "unit": {"algo": "dylora", "network_dim": 1024},
    "constraint": {"algo": "oft"},
    "unet_lr": {"optimizer_type": "SGDNesterov"},
    "text_encoder_lr": {"optimizer_type": "SGDNesterov"},
    "text_encoder_2_lr": {"optimizer_type": "SGDNesterov"},
    "text_encoder_3_lr": {"optimizer_type": "SGDNesterov"},
    "save_last_n_epochs": {"save_every_n_epochs": 1},
    "save_last_n_epochs_state": {"save_every_n_epochs": 1},
    "save_last_n_steps": {"save_every_n_steps": 1},
    "save_last_n_steps_state": {"save_every_n_steps": 1},
    "sample_every_n_steps": {"sample_prompts": ["zibu"]},
    "sample_every_n_epochs": {"sample_prompts": ["zibu"]},
}
NEIGHBOURS = {**LOSS_NEIGHBOURS, **LEARNING_NEIGHBOURS, **OTHER_NEIGHBOURS}


def neighbours(cls: Any, name: str) -> dict[str, Any]:
    """Return what else must be set for this setting to make sense."""
    if name in NEIGHBOURS:
        return NEIGHBOURS[name]
    if cls is DatasetConfig and name == "bucket_reso_steps":
        return {"resolution": 512}
    return {}


# ---- unknown settings ----


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("learing_rate", "learning_rate"),
        ("netwok_dim", "network_dim"),
        ("max_train_step", "max_train_steps"),
        ("conv_alphas", "conv_alpha"),
        ("enable_buckets", "enable_bucket"),
        ("shuffle_captions", "shuffle_caption"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_one(wrong: str, meant: str) -> None:
    with Refusal("LG-CFG-001", wrong, f"did you mean '{meant}'", "run.toml"):
        make_both({wrong: 1}, where="run.toml")
    cls = DatasetConfig if meant in {f.name for f in dataclasses.fields(DatasetConfig)} else TrainConfig
    with Refusal("LG-CFG-001", wrong, f"did you mean '{meant}'"):
        make(cls, {wrong: 1})


def test_an_unknown_setting_like_none_is_answered_with_where_they_are_listed() -> None:
    with Refusal("LG-CFG-001", "qqqq", "--help"):
        make(DatasetConfig, {"qqqq": 1})
    with Refusal("LG-CFG-001", "qqqq", "--help"):
        make_both({"qqqq": 1})


def test_many_unknown_settings_make_one_short_message() -> None:
    with Refusal("LG-CFG-001"):
        make(TrainConfig, {f"unknown_{'x' * 40}_{i}": i for i in range(50)})


# ---- types and ranges, for every setting there is ----


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=IDS)
def test_every_default_passes_its_own_check(cls: Any, name: str) -> None:
    default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
    assert getattr(make(cls, {name: default}), name) == default
    assert info_of(cls, name).help.endswith((".", ")"))


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=IDS)
def test_every_limit_is_inside_and_one_beyond_is_outside(cls: Any, name: str) -> None:
    info, around = info_of(cls, name), neighbours(cls, name)
    whole = int in kinds(cls, name)
    for limit, beyond in ((info.minimum, -1), (info.maximum, 1)):
        if limit is None:
            continue
        outside = limit + beyond if whole or abs(limit) > 1 else limit + beyond * 1e-6
        with Refusal("LG-CFG-003", name):
            make(cls, {**around, name: int(outside) if whole else outside})
        if name not in (
            "resolution",
            "bucket_reso_steps",
            "min_bucket_reso",
            "max_bucket_reso",
            "learning_rate",
            "lr_decay_steps",  # 0 is its default, with which the schedule that has it cannot be
        ):
            make(cls, {**around, name: int(limit) if whole else float(limit)})


@pytest.mark.parametrize(
    ("name", "value"), [("unet_lr", -1), ("text_encoder_lr", -1.0), ("max_train_epochs", 0)]
)
def test_the_value_that_stands_for_empty_on_nodes_is_explained(name: str, value: float) -> None:
    with Refusal("LG-CFG-003", name, f"or empty ({value:g} stands for that on nodes alone)"):
        make(api.TrainConfig, {name: value})
    with pytest.raises(LoraGraftError) as caught:
        make(api.TrainConfig, {name: -7})
    assert "empty" not in caught.value.why


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=IDS)
def test_every_setting_refuses_other_types(cls: Any, name: str) -> None:
    allowed = kinds(cls, name)
    wrong: list[Any] = [{}, object(), b"1", 1j]
    if bool not in allowed:
        wrong += [True, False]
    if str not in allowed:
        wrong += ["", "12", "true"]
    if int not in allowed and float not in allowed:
        wrong += [1, 0]
    if float not in allowed:
        wrong += [1.5, 2.0]
    if type(None) not in allowed and name not in ("max_token_length", "clip_skip"):
        wrong.append(None)
    if not any(typing.get_origin(kind) is tuple for kind in allowed):
        wrong += [[], [1, 2], (512, 512)]
    for value in wrong:
        with Refusal("LG-CFG-003", name):
            make(cls, {name: value})


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=IDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_setting_is_nan_or_infinite(cls: Any, name: str, value: float) -> None:
    with Refusal("LG-CFG-003", name):
        make(cls, {name: value})


@pytest.mark.parametrize("name", [n for cls, n in FIELDS if info_of(cls, n).choices])
def test_a_choice_outside_the_list_is_answered_with_the_list(name: str) -> None:
    info = info_of(TrainConfig, name)
    numbers = int in kinds(TrainConfig, name)
    with Refusal("LG-CFG-003", name, *info.choices):
        make(TrainConfig, {name: 76 if numbers else "unheard-of"})


def test_a_misspelt_choice_gets_the_nearest_one() -> None:
    with Refusal("LG-CFG-003", "did you mean 'cosine'"):
        make(TrainConfig, {"lr_scheduler": "cosin"})


def test_texts_that_no_file_can_hold_are_refused() -> None:
    """Half of a surrogate pair, as broken JSON has it, could not be written into run.toml or the LoRA."""
    for name, value in (
        ("output_name", "a\ud800"),
        ("training_comment", "\udc80"),
        ("sample_prompts", ["fine", "not \udfff"]),
    ):
        with Refusal("LG-CFG-003", name):
            make(TrainConfig, {name: value})


def test_messages_stay_short_whatever_the_value() -> None:
    for value in ("x" * 100_000, "line\nbreak" * 100, ["y" * 5000] * 100, {"deep": {"deeper": "z" * 500}}):
        for cls, name in FIELDS:
            try:
                make(cls, {name: value})
            except LoraGraftError as error:
                assert len(str(error)) < 3000
                assert len(str(error).split("\n")) == 4
                assert len(str(error).split("\n")[0]) <= 120


# ---- bad input that the first release promises to refuse ----


@pytest.mark.parametrize("rank", [0, -1, 1025, 4.0, "4", None, True])
def test_rank_zero_and_other_impossible_ranks(rank: Any) -> None:
    with Refusal("LG-CFG-003", "network_dim", "1 to 1024" if type(rank) is int else "a whole number"):
        make(TrainConfig, {"network_dim": rank})


@pytest.mark.parametrize(
    ("resolution", "remedy"),
    [(500, "512"), ((512, 500), "512"), ([500, 768], "512"), (1000, "1024"), (33, "64")],
)
def test_a_resolution_off_the_grid_names_the_nearest_one(resolution: Any, remedy: str) -> None:
    with Refusal("LG-CFG-005", "resolution", f"use {remedy}", "64"):
        make(DatasetConfig, {"resolution": resolution, "min_bucket_reso": 64})


def test_a_resolution_of_no_size_or_of_three() -> None:
    for value in ([], [512], [512, 512, 512], [512, "512"], [512.0, 512.0], [0, 512]):
        with Refusal("LG-CFG-003", "resolution"):
            make(DatasetConfig, {"resolution": value})


def test_the_grid_of_resolutions_is_the_bucket_step() -> None:
    assert resolution_wh(make(DatasetConfig, {"resolution": [512, 768]})) == (512, 768)
    small = {"resolution": 40, "bucket_reso_steps": 8, "min_bucket_reso": 16, "max_bucket_reso": 64}
    assert resolution_wh(make(DatasetConfig, small)) == (40, 40)
    with Refusal("LG-CFG-003", "bucket_reso_steps", "8"):
        make(DatasetConfig, {**small, "bucket_reso_steps": 12})


def test_bucket_limits_must_enclose_the_resolution() -> None:
    for limits in ({"min_bucket_reso": 576}, {"max_bucket_reso": 448}):
        with Refusal("LG-CFG-006", "512", "min_bucket_reso"):
            make(DatasetConfig, {"resolution": 512, **limits})
        make(DatasetConfig, {"resolution": 512, "enable_bucket": False, **limits})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"network_train_unet_only": True, "text_encoder_lr": 1e-5}, "text_encoder_lr"),
        ({"conv_alpha": 1.0}, "conv_dim"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"unet_lr": 0.0, "text_encoder_lr": 0.0}, "unet_lr"),
        ({"unet_lr": 0.0, "network_train_unet_only": True}, "unet_lr"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 10}, "lr_warmup_steps"),
    ],
)
def test_settings_that_contradict_each_other(values: dict[str, Any], named: str) -> None:
    with Refusal("LG-CFG-004", named):
        make(TrainConfig, values)


def test_learning_rates_fall_back_to_the_common_one() -> None:
    config = make(TrainConfig, {"learning_rate": 3e-4})
    assert (denoiser_lr(config), encoder_lr(config)) == (3e-4, 3e-4)
    config = make(TrainConfig, {"learning_rate": 3e-4, "unet_lr": 0.0, "text_encoder_lr": 5e-5})
    assert (denoiser_lr(config), encoder_lr(config)) == (0.0, 5e-5)
    assert encoder_lr(make(TrainConfig, {"network_train_unet_only": True})) == 0.0
    make(TrainConfig, {"network_train_unet_only": True, "text_encoder_lr": 0.0})


def test_kohyas_spelling_of_values_is_understood() -> None:
    config = make(
        TrainConfig,
        {"mixed_precision": "no", "save_precision": "float", "clip_skip": None, "max_token_length": None},
    )
    assert (config.mixed_precision, config.save_precision) == ("fp32", "fp32")
    assert (config.clip_skip, config.max_token_length) == (1, 75)


# ---- optimizer options ----


def test_optimizer_options_are_literals() -> None:
    config = make(TrainConfig, {"optimizer_args": ["weight_decay=0.1", "betas=.9,.99", "amsgrad = True"]})
    assert optimizer_kwargs(config) == {"weight_decay": 0.1, "betas": (0.9, 0.99), "amsgrad": True}


@pytest.mark.parametrize(
    "option",
    ["weight_decay", "weight_decay=", "weight_decay=x", "eps=__import__('os')", "betas=(0.9", "eps={[]: 1}",
     "eps=" + "-" * 100_000 + "1", "eps=" + "[" * 10_000, "eps=\0"],
    ids=["no-value", "empty", "name", "call", "open", "unhashable", "deep", "deeper", "nul"],
)  # fmt: skip
def test_optimizer_options_that_are_no_literals_are_refused(option: str) -> None:
    with Refusal("LG-CFG-002", "optimizer_args"):
        make(TrainConfig, {"optimizer_args": [option]})


def test_an_optimizer_option_given_twice_is_refused() -> None:
    with Refusal("LG-CFG-002", "weight_decay"):
        make(TrainConfig, {"optimizer_args": ["weight_decay=0.1", "weight_decay=0.2"]})


@pytest.mark.parametrize(
    "option",
    ["decouple=True", "lr=1", "foreach=True", "betas=5", "weight_decay=-1", "weight_decay='a'", "eps=()"],
)
def test_options_that_the_optimizer_does_not_take(option: str) -> None:
    import torch

    group = ([torch.nn.Parameter(torch.zeros(2))], 1e-3)
    with Refusal("LG-CFG-007", option.split("=")[0], "AdamW"):
        build_optimizer(make(TrainConfig, {"optimizer_args": [option]}), [group])


# ---- through dictionaries and files ----


def test_as_dict_and_make_are_inverse() -> None:
    data = make(DatasetConfig, {"resolution": [512, 768], "shuffle_caption": True, "caption_separator": "|"})
    train = make(
        TrainConfig,
        {
            "sample_prompts": ["a, b", 'quote " and \\ and\nline'],
            "lr_warmup_steps": 0.1,
            "optimizer_args": ["eps=1e-9"],
        },
    )
    assert make(DatasetConfig, as_dict(data)) == data
    assert make(TrainConfig, as_dict(train)) == train
    assert make_both({**as_dict(data), **as_dict(train)}) == (data, train)


def test_a_run_is_found_again_from_its_own_settings_file(
    base: api.Base, images: Any, places: api.Places, checkpoint: Any, tokenizer: Any
) -> None:
    """run.toml, given to the command line, is the same run: it is finished, so nothing is trained."""
    from loragraft.trainer.__main__ import main
    from loragraft.trainer.metadata import run_hash

    odd = {
        "sample_prompts": ["zibu \u3042, \U0001f600", 'quote " back \\ tab\t line\nbell\x07 del\x7f'],
        "training_comment": "[table]\n# no comment",
        "lr_warmup_steps": 0.25,
        "learning_rate": 1e-5,
        "optimizer_args": ["weight_decay=0.02"],
        "sample_every_n_steps": 100,
        "max_train_steps": 1,
    }
    train_set = runs.train_set(images, shuffle_caption=True, keep_tokens=1)
    training = runs.Training(base, train_set, places)
    first = training.finish(**odd)
    command = [
        "train",
        "--config",
        str(first.run_folder / "run.toml"),
        "--output_dir",
        str(places.runs.parent),
    ]
    command += ["--pretrained_model_name_or_path", str(checkpoint), "--tokenizer", str(tokenizer)]
    command += ["--train_data_dir", str(images), "--device", "cpu"]
    before = runs.tree(places.loras)
    assert main(command) == 0
    assert runs.tree(places.loras) == before
    assert [p.name for p in places.runs.iterdir()] == [first.run_folder.name]
    config = runs.settings(**odd)
    assert first.run_folder.name.endswith(run_hash(base, train_set, config, 1, "fp32")[:8])


def test_settings_that_change_no_tensor_do_not_make_another_run(
    base: api.Base, train_set: api.TrainSet
) -> None:
    from loragraft.trainer.metadata import run_hash

    plain = run_hash(base, train_set, runs.settings(), 4, "fp32")
    same = {
        "output_name": "y",
        "sample_prompts": ["a"],
        "save_every_n_steps": 1,
        "training_comment": "c",
        "cache_latents": False,
        "mixed_precision": "fp32",
        "preview_image": True,
    }
    for name, value in same.items():
        assert run_hash(base, train_set, runs.settings(**{name: value}), 4, "fp32") == plain, name
    other = {
        "seed": 1,
        "network_dim": 5,
        "network_alpha": 3,
        "learning_rate": 2e-3,
        "unet_lr": 1e-4,
        "text_encoder_lr": 1e-4,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 1,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "min_snr_gamma": 5.0,
        "max_token_length": 150,
        "clip_skip": 2,
        "save_precision": "fp32",
        "conv_dim": 4,
        "optimizer_args": ["eps=1e-9"],
        "max_grad_norm": 0.5,
        "network_train_unet_only": True,
    }
    hashes = {run_hash(base, train_set, runs.settings(**{k: v}), 4, "fp32") for k, v in other.items()}
    assert len(hashes | {plain}) == len(other) + 1
    assert run_hash(base, train_set, runs.settings(), 5, "fp32") != plain
    assert run_hash(base, train_set, runs.settings(), 4, "bf16") != plain
