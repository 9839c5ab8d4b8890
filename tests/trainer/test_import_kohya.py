"""Configs of kohya's trainer: every argument is accounted for, defaults are kohya's, nothing is silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer import api
from loragraft.trainer.imports import kohya_table, kohya_values
from loragraft.trainer.imports.kohya import read_kohya
from loragraft.trainer.imports.kohya_scripts import FLUX, ONLY, SD3, SDXL
from loragraft_tests.trainer.kohya_configs import FIELDS, refusal, settings

GOLDEN = Path(__file__).parent.parent / "golden"
ARGUMENTS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "kohya_arguments.json").read_text("utf-8"))
MORE: dict[str, dict[str, Any]] = json.loads((GOLDEN / "kohya_arguments_more.json").read_text("utf-8"))
# What says for which script a TOML is, for arguments that not all have.
SCRIPT_LINES = {
    name: {SDXL: "", SD3: 'network_module = "networks.lora_sd3"\n', FLUX: 'ae = "a"\n'}[users[-1]]
    for name, users in ONLY.items()
}


# ---- the table of arguments ----


def test_every_argument_of_the_reference_is_in_exactly_one_table() -> None:
    tables = (
        kohya_table.HONOURED,
        kohya_table.TRANSLATED,
        kohya_table.PLACES,
        kohya_table.NOTED,
        kohya_table.REFUSED,
    )
    assert set().union(*tables) == {*ARGUMENTS, *MORE}
    assert sum(map(len, tables)) == len(ARGUMENTS) + len(MORE) == 193 + 34


def test_what_is_honoured_is_a_setting_and_its_kind_is_the_parsers() -> None:
    assert [name for name in kohya_table.HONOURED if name not in FIELDS] == []
    kinds = {"int": kohya_table.WHOLE, "float": kohya_table.NUMBER, "str": kohya_table.TEXT}
    for name, kind in kohya_table.HONOURED.items():
        told = ARGUMENTS.get(name) or MORE[name]
        if told["kind"] == "StoreTrue":
            expected = kohya_table.SWITCH
        elif told["nargs"] == "*":
            expected = kohya_table.WORDS
        else:
            expected = kinds.get(told["type"], kohya_table.STEPS)
        assert kind == expected, name


def test_defaults_that_differ_are_filled_in_or_said_to_stay() -> None:
    """Where kohya's parser has a default, ours is the same, or the import fills kohya's in."""
    plain = {**api.as_dict(api.DatasetConfig()), **api.as_dict(api.TrainConfig())}
    for name in (name for name in kohya_table.HONOURED if name in ARGUMENTS):
        default = ARGUMENTS[name]["default"]
        filled = kohya_table.KOHYA_DEFAULTS.get(name)
        if default in (None, "", "no") and filled is None:
            continue  # off, or chosen inside the reference: see the test below
        if name in kohya_table.KEPT_DEFAULTS:
            continue
        assert {"no": "fp32"}.get(default, default) in (filled, plain[name], None), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network_dim", 4),  # networks/lora.py: None is 4
        ("save_precision", "fp32"),  # None keeps the LoRA's own precision
        ("output_name", "last"),
        ("max_token_length", 75),
        ("clip_skip", 1),
        ("optimizer_type", "AdamW"),
        ("learning_rate", 2e-6),
        ("lr_scheduler", "constant"),
        ("mixed_precision", "fp32"),
        ("network_alpha", 1.0),
        ("enable_bucket", False),
        ("max_train_steps", 1600),
        ("noise_offset", 0.0),
        ("min_snr_gamma", None),
    ],
)
def test_a_config_that_says_nothing_means_kohyas_defaults(name: str, value: Any) -> None:
    data, train = settings("resolution = 512\n")
    assert {**api.as_dict(data), **api.as_dict(train)}[name] == value


def test_what_was_filled_in_is_said() -> None:
    notes = "\n".join(read_kohya("learning_rate = 1e-4").notes)
    for said in ("network_dim 4", "network_alpha 1.0", "lr_scheduler constant", "seed: 42", ".caption"):
        assert said in notes
    assert "learning_rate" not in notes


@pytest.mark.parametrize("name", sorted(kohya_table.NOTED))
def test_what_means_nothing_here_is_said(name: str) -> None:
    kind = kohya_table.kind_of(name)
    value = {kohya_table.SWITCH: "true", kohya_table.WHOLE: "2"}.get(kind, '"x"')
    script = SCRIPT_LINES.get(name, "")
    imported = read_kohya(f"resolution = 512\n{script}{name} = {value}")
    (said,) = [note for note in imported.notes if note.startswith(f"{name}: ")]
    assert len(said) > len(name) + 15
    assert imported.settings == read_kohya(f"resolution = 512\n{script}").settings


@pytest.mark.parametrize("name", sorted(kohya_table.REFUSED))
def test_what_cannot_be_honoured_is_refused_with_a_remedy_unless_it_asks_for_nothing(name: str) -> None:
    kind, harmless, why, fix = kohya_table.REFUSED[name]
    value = {
        kohya_table.SWITCH: "true",
        kohya_table.WHOLE: "7",
        kohya_table.NUMBER: "0.5",
        kohya_table.WORDS: '["a.safetensors"]',
    }.get(kind, '"x"')
    script = SCRIPT_LINES.get(name, "")
    error = refusal(f"resolution = 512\n{script}{name} = {value}")
    assert error.code == "LG-IMP-002"
    assert name in error.where and why[:40] in error.where and error.fix == fix
    for nothing in harmless:
        read_kohya(f"resolution = 512\n{script}{name} = {json.dumps(nothing)}")


def test_all_faults_of_a_kind_are_named_at_once() -> None:
    error = refusal('deepspeed = true\nresume = "a"\nrandom_crop = true')
    assert error.what.startswith("3 settings")
    for name in ("deepspeed", "resume", "random_crop"):
        assert name in error.where
    error = refusal("learning_rat = 1\nnetwork_dims = 3")
    assert error.code == "LG-CFG-001" and "'learning_rate'" in error.fix and "'network_dim'" in error.fix


# ---- values ----


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ('learning_rate = "1e-4"', "learning_rate", 1e-4),
        ("network_dim = 8.0", "network_dim", 8),
        ('resolution = "512,768"', "resolution", (512, 768)),
        ('resolution = "512,512"', "resolution", 512),
        ("resolution = [512, 768]", "resolution", (512, 768)),
        ("text_encoder_lr = [5e-5]", "text_encoder_lr", 5e-5),
        ("text_encoder_lr = 5e-5", "text_encoder_lr", 5e-5),
        ("min_snr_gamma = 0", "min_snr_gamma", None),
        ("noise_offset = 0.0", "noise_offset", 0.0),
        ("network_alpha = 0", "network_alpha", 0.0),
        ("use_8bit_adam = true", "optimizer_type", "AdamW8bit"),
        ("use_lion_optimizer = true", "optimizer_type", "Lion"),
        ('optimizer_type = "adamw8bit"', "optimizer_type", "AdamW8bit"),
        ('learning_rate = 1.0\noptimizer_type = "DAdaptation"', "optimizer_type", "DAdaptAdamPreprint"),
        ("fp8_base = true", "base_storage", "fp8"),
        ('mixed_precision = "no"', "mixed_precision", "fp32"),
        ('save_precision = "float"', "save_precision", "fp32"),
        ("max_token_length = 225", "max_token_length", 225),
        ('lr_scheduler = "cosine"\nlr_warmup_steps = 0.05', "lr_warmup_steps", 0.05),
        ("save_every_n_epochs = 1", "publish_checkpoints", True),
        ('log_with = "tensorboard"', "log_with", "auto"),
    ],
)
def test_a_value_becomes_ours(line: str, name: str, value: Any) -> None:
    data, train = settings(f"{line}\n")
    assert getattr(train if hasattr(train, name) else data, name) == value


@pytest.mark.parametrize(
    "line",
    [
        "learning_rate = true",
        'learning_rate = "fast"',
        "network_dim = 4.5",
        'shuffle_caption = "yes"',
        'resolution = "512x768"',
        "resolution = true",
        "optimizer_args = 'weight_decay=0.1'",
        "text_encoder_lr = ['a']",
        "output_name = 3",
        "learning_rate = inf",
        "[a.b]\nc = 1",
        "network_dim = {a = 1}",
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(line: str) -> None:
    assert refusal(line).code in ("LG-CFG-003", "LG-CFG-001")


def test_a_setting_that_stands_twice_counts_as_the_last_and_is_said() -> None:
    imported = read_kohya("[a]\nresolution = '512,512'\n[b]\nresolution = '768,768'\n")
    assert imported.settings["resolution"] == 768
    assert any(note.startswith("resolution is given twice") for note in imported.notes)
    assert not any("twice" in note for note in read_kohya("[a]\nseed = 1\n[b]\nseed = 1").notes)


def test_places_and_reading() -> None:
    imported = read_kohya(
        'pretrained_model_name_or_path = "a.safetensors"\ntrain_data_dir = "d"\nreg_data_dir = ""\n'
        'output_dir = "o"\nsample_prompts = "p.txt"\ncaption_extension = ".txt"\nalpha_mask = true\n'
        "enable_wildcard = true"
    )
    assert imported.places == {
        "pretrained_model_name_or_path": "a.safetensors",
        "train_data_dir": "d",
        "output_dir": "o",
        "sample_prompts": "p.txt",
    }
    assert imported.reading == {"captions": ("txt", "folder"), "masks": "alpha", "caption_lines": "all"}
    assert imported.settings["sample_steps"] == 30 and imported.settings["sample_cfg"] == 7.5


def test_in_json_and_dataset_config() -> None:
    assert read_kohya('in_json = "m.json"\ndataset_repeats = 3').reading == {
        "captions": ("json",),
        "caption_json": "m.json",
        "default_repeats": 3,
    }
    imported = read_kohya('dataset_config = "d.toml"\ntrain_data_dir = "x"\nin_json = "m.json"')
    assert imported.places == {"dataset_config": "d.toml"} and imported.reading == {}
    assert sum("dataset_config names the folders" in note for note in imported.notes) == 2


def test_what_does_nothing_in_kohyas_trainer_either_is_dropped_and_said() -> None:
    imported = read_kohya(
        "sample_every_n_epochs = 2\nsave_last_n_steps = 5\nmasked_loss = true\ndataset_repeats = 2"
    )
    assert not {"sample_every_n_epochs", "save_last_n_steps", "masked_loss"} & set(imported.settings)
    notes = "\n".join(imported.notes)
    for name in ("sample_every_n_epochs", "save_last_n_steps", "masked_loss", "dataset_repeats"):
        assert f"{name}: without" in notes


def test_options_of_adaptive_optimizers_are_their_librarys() -> None:
    imported = read_kohya(
        'optimizer_type = "Prodigy"\noptimizer_args = ["use_bias_correction=True", "d_coef=2"]'
    )
    assert imported.settings["optimizer_args"] == [
        "use_bias_correction=True",
        "d_coef=2",
        "weight_decay=0.0",
        "safeguard_warmup=False",
    ]
    assert "optimizer_args" not in read_kohya('optimizer_type = "AdamW"').settings
    for name, options in kohya_values.LIBRARY_DEFAULTS.items():
        assert set(options) <= set(kohya_values.KNOWN[name].options), name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('lr_scheduler = "polynomial"\nlr_scheduler_power = 0.75', "holds the rate up longer"),
        ('lr_scheduler = "polynomial"\nlr_scheduler_power = 2', "fall earlier"),
        ('network_args = ["down_lr_weight=sine-.5"]', "fails on the minus"),
    ],
)
def test_what_guides_say_wrongly_is_put_right(text: str, said: str) -> None:
    assert any(said in note for note in read_kohya(text).notes)


@pytest.mark.parametrize(
    ("given", "taken"), [(255, 225), (225, 225), (150, 150), (200, 150), (76, 75), (75, 75)]
)
def test_the_length_of_captions_is_what_the_reference_reads(given: int, taken: int) -> None:
    text = f"max_token_length = {given}"
    assert settings(text)[1].max_token_length == taken
    assert any("max_token_length" in note for note in read_kohya(text).notes) == (given != taken)


def test_lengths_that_nothing_here_reads_are_refused() -> None:
    assert refusal("max_token_length = 300").code == "LG-CFG-003"


@pytest.mark.parametrize(
    ("switch", "rate"),
    [
        ("network_train_unet_only", "text_encoder_lr"),
        ("network_train_text_encoder_only", "unet_lr"),
    ],
)
def test_rates_of_what_is_switched_off_are_noted_and_dropped(switch: str, rate: str) -> None:
    text = f"{switch} = true\n{rate} = 1e-5"
    found = read_kohya(text)
    assert rate not in found.settings
    assert any(note.startswith(f"{rate}: {switch}") for note in found.notes)
    assert getattr(settings(text)[1], switch) is True
