"""Configs of kohya's trainer: every argument is accounted for, defaults are kohya's, nothing is silent."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.imports import kohya_network, kohya_table, kohya_values
from loragraft.trainer.imports.kohya import read_kohya
from loragraft.trainer.imports.kohya_blocks import DIMS, INDICES
from loragraft.trainer.imports.kohya_scripts import FLUX, ONLY, SD3, SDXL

GOLDEN = Path(__file__).parent.parent / "golden"
ARGUMENTS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "kohya_arguments.json").read_text("utf-8"))
MORE: dict[str, dict[str, Any]] = json.loads((GOLDEN / "kohya_arguments_more.json").read_text("utf-8"))
FIELDS = {**api.DatasetConfig.__dataclass_fields__, **api.TrainConfig.__dataclass_fields__}


def settings(text: str) -> tuple[api.DatasetConfig, api.TrainConfig]:
    return api.make_both(read_kohya(text).settings, where="test")


def refusal(text: str) -> LoraGraftError:
    with pytest.raises(LoraGraftError) as caught:
        settings(text)
    return caught.value


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
        ('log_with = "tensorboard"', "log_with", "tensorboard"),
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


# ---- networks ----


@pytest.mark.parametrize(
    ("module", "args", "expected"),
    [
        ("networks.lora", [], {"algo": "lora", "conv_dim": None}),
        ("networks.lora", ["conv_dim=8"], {"conv_dim": 8, "conv_alpha": 1.0}),
        ("networks.lora", ["conv_dim=8", "conv_alpha=4"], {"conv_dim": 8, "conv_alpha": 4.0}),
        ("networks.lora", ["dropout=0.1", "rank_dropout=0.2"], {"network_dropout": 0.1, "rank_dropout": 0.2}),
        ("networks.lora", ["loraplus_lr_ratio=16"], {"loraplus_lr_ratio": 16.0}),
        (
            "networks.lora",
            [
                "down_lr_weight=sine+.5",
                "mid_lr_weight=2",
                "up_lr_weight=cosine+1",
                "block_lr_zero_threshold=0.1",
            ],
            {"down_lr_weight": "sine+.5", "mid_lr_weight": "2", "block_lr_zero_threshold": 0.1},
        ),
        ("networks.dylora", ["unit=2"], {"algo": "dylora", "unit": 2}),
        ("lycoris.kohya", [], {"algo": "locon", "preset": "full"}),
        ("lycoris.kohya", ["algo=LoHa", "conv_dim=4", "conv_alpha=1"], {"algo": "loha", "conv_dim": 4}),
        ("lycoris.kohya", ["algo=lokr", "factor=4", "use_cp=True"], {"factor": 4, "use_tucker": True}),
        ("lycoris.kohya", ["algo=diag-oft", "constraint=0.001"], {"algo": "oft", "constraint": 0.001}),
        ("lycoris.kohya", ["preset=attn-mlp", "train_norm=True"], {"preset": "attn-mlp", "train_norm": True}),
        ("lycoris.kohya", ["algo=dylora"], {"algo": "dylora", "unit": 4}),
        ("lycoris.kohya", ["dora_wd=True"], {"dora_wd": True, "wd_on_output": True}),
        ("lycoris.kohya", ["algo=lokr", "conv_dim=10000"], {"full_matrix": True, "conv_dim": 1024}),
        ("locon.locon_kohya", [], {"algo": "locon", "conv_dim": 8, "conv_alpha": 4.0}),
    ],
)
def test_network_args(module: str, args: list[str], expected: dict[str, Any]) -> None:
    text = (
        f'network_module = "{module}"\nnetwork_args = {json.dumps(args)}\nnetwork_dim = 8\nnetwork_alpha = 4'
    )
    _, train = settings(text)
    assert {name: getattr(train, name) for name in expected} == expected


def test_every_key_of_network_args_is_a_setting() -> None:
    for keys in kohya_network.KEYS.values():
        chosen = {"train_blocks", "train_t5xxl"}.union(*DIMS.values(), *INDICES.values())
        assert {key.setting for key in keys.values()} <= {*FIELDS, *chosen}


def test_a_key_of_another_module_is_refused_by_name() -> None:
    error = refusal('network_args = ["algo=loha"]')
    assert error.code == "LG-IMP-002" and "lycoris.kohya" in error.fix
    error = refusal('network_module = "lycoris.kohya"\nnetwork_args = ["down_lr_weight=sine"]')
    assert error.code == "LG-IMP-002" and "networks.lora" in error.fix


def test_conv_alphas_of_the_guide_is_no_key() -> None:
    error = refusal('network_args = ["conv_dim=16", "conv_alphas=1"]')
    assert error.code == "LG-CFG-001" and error.fix == "did you mean 'conv_alpha'?"


# ---- command lines ----

LINES = {
    "bash": (
        "accelerate launch --num_cpu_threads_per_process 1 train_network.py \\\n"
        '  --train_data_dir="/data/my images" --network_dim=8 \\\n'
        "  --network_args 'conv_dim=4' \"conv_alpha=1\" --shuffle_caption --resolution 512,768\n"
    ),
    "powershell": (
        "# train\n& .\\venv\\python.exe .\\train_network.py `\n"
        '  --train_data_dir "/data/my images" --network_dim 8 `\n'
        "  --network_args conv_dim=4 conv_alpha=1 --shuffle_caption --resolution=512,768"
    ),
    "batch": (
        "REM train\naccelerate launch train_network.py ^\r\n"
        '  --train_data_dir="/data/my images" --network_dim 8 ^\r\n'
        "  --network_args conv_dim=4 conv_alpha=1 --shuffle_caption --resolution 512,768\r\n"
    ),
    "collected": (
        '#!/bin/bash\ncmd="accelerate launch train_network.py"\n# where\n'
        'cmd="$cmd --train_data_dir \'/data/my images\'"\ncmd="$cmd --network_dim 8 --shuffle_caption"\n'
        "cmd=\"$cmd --network_args 'conv_dim=4' 'conv_alpha=1'\"\ncmd=\"$cmd --resolution 512,768\"\n"
        "nohup $cmd > log.log &\n"
    ),
    "set": (
        'set "cmd=accelerate launch train_network.py"\n'
        "set \"cmd=!cmd! --train_data_dir '/data/my images'\"\n"
        'set "cmd=!cmd! --network_dim 8 --network_args conv_dim=4 conv_alpha=1"\n'
        'set "cmd=!cmd! --shuffle_caption --resolution 512,768"\n'
    ),
    "arguments": "--train_data_dir='/data/my images' --network_dim=8 --network_args conv_dim=4 conv_alpha=1 "
    "--shuffle_caption --resolution=512,768",
}


@pytest.mark.parametrize("text", LINES.values(), ids=LINES)
def test_a_command_line_is_read_however_it_was_written(text: str) -> None:
    imported = read_kohya(text)
    data, train = api.make_both(imported.settings)
    assert imported.places == {"train_data_dir": "/data/my images"}
    assert (train.network_dim, train.conv_dim, train.conv_alpha) == (8, 4, 1.0)
    assert data.shuffle_caption and data.resolution == (512, 768)


def test_a_path_of_windows_keeps_its_backslashes() -> None:
    text = "train_network.py --pretrained_model_name_or_path C:\\ai\\new.safetensors --train_data_dir D:\\b"
    assert read_kohya(text).places == {
        "pretrained_model_name_or_path": "C:\\ai\\new.safetensors",
        "train_data_dir": "D:\\b",
    }


def test_a_command_line_says_what_its_toml_says() -> None:
    toml = read_kohya('learning_rate = 1e-4\nlr_warmup_steps = 0.1\nresolution = "512"\ncache_latents = true')
    line = read_kohya("--learning_rate 1e-4 --lr_warmup_steps 10% --resolution 512 --cache_latents")
    assert toml == line


def test_an_abbreviation_counts_as_in_the_references_parser() -> None:
    assert read_kohya("--max_train_e 3 --resolution 512").settings["max_train_epochs"] == 3
    assert refusal("--max_train 3").code == "LG-CFG-001"


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("--network_dim", "LG-CFG-003", "network_dim"),
        ("--network_dim 4 5", "LG-CFG-003", "4 5"),
        ("--shuffle_caption yes", "LG-CFG-003", "expected no value"),
        ("--lerning_rate 1", "LG-CFG-001", "learning_rate"),
        ("train_network.py stray --network_dim 4", "LG-IMP-001", "stray"),
        ("--output_name 'open", "LG-IMP-001", "quotation"),
        ("--output_dir $HOME/out", "LG-IMP-001", "variable"),
        ("--output_dir %USERPROFILE%", "LG-IMP-001", "variable"),
        ("lumina_train_network.py --network_dim 4", "LG-IMP-003", "Lumina"),
        ("flux_train.py --network_dim 4", "LG-IMP-003", "Flux"),
        ("train_db.py --learning_rate 1e-6", "LG-IMP-003", "whole model"),
        ("something.py --learning_rate 1e-6", "LG-IMP-003", "something.py"),
        ("accelerate launch -m hcpdiff.train_ac_single --cfg a.yaml", "LG-IMP-003", "HCP-Diffusion"),
        ("no config at all", "LG-IMP-001", "config"),
        ("a = ", "LG-IMP-001", "config"),
        ("[" * 5000, "LG-IMP-001", "config"),
        ("a = '" + "x" * 2**20 + "'", "LG-IMP-001", "larger"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(text: str, code: str, named: str) -> None:
    error = refusal(text)
    assert error.code == code and named in str(error)


def test_the_launchers_own_options_are_said_to_mean_nothing() -> None:
    imported = read_kohya("accelerate launch --mixed_precision bf16 train_network.py --resolution 512")
    assert imported.settings["mixed_precision"] == "fp32"  # kohya's script does not take the launcher's
    assert any(note.startswith("--mixed_precision: options of the launcher") for note in imported.notes)


@given(
    st.text(max_size=200)
    | st.text(alphabet=string.printable, max_size=200).map(lambda s: f"--network_dim 4 {s}")
)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        settings(text)
    except LoraGraftError as error:
        assert error.fix


# ---- lora-scripts ----

LORA_SCRIPTS = """
[model_arguments]
v2 = false
v_parameterization = false
pretrained_model_name_or_path = "./sd-models/model.ckpt"
[dataset_arguments]
train_data_dir = "./train/aki"
reg_data_dir = ""
resolution = "512,512"
prior_loss_weight = 1
[additional_network_arguments]
network_dim = 32
network_alpha = 16
network_train_unet_only = false
network_train_text_encoder_only = false
network_module = "networks.lora"
network_args = []
[optimizer_arguments]
unet_lr = 1e-4
text_encoder_lr = 1e-5
optimizer_type = "AdamW8bit"
lr_scheduler = "cosine_with_restarts"
lr_warmup_steps = 0
lr_restart_cycles = 1
[training_arguments]
train_batch_size = 1
noise_offset = 0.0
keep_tokens = 0
caption_extension = ".txt"
max_token_length = 225
seed = 1337
xformers = true
lowram = false
max_train_epochs = 10
resolution = "512,512"
clip_skip = 2
mixed_precision = "fp16"
enable_contrastive = false
noise_strength = 1.0
[sample_prompt_arguments]
sample_sampler = "euler_a"
sample_every_n_epochs = 5
[saving_arguments]
output_name = "aki"
save_every_n_epochs = 1
save_n_epoch_ratio = 0
save_state = false
save_model_as = "safetensors"
output_dir = "./output"
logging_dir = "./logs"
log_prefix = ""
save_precision = "fp16"
[others]
cache_latents = true
shuffle_caption = true
enable_bucket = true
"""


def test_lora_scripts_own_file_is_read_unchanged() -> None:
    imported = read_kohya(LORA_SCRIPTS)
    data, train = api.make_both(imported.settings)
    assert (train.network_dim, train.network_alpha, train.unet_lr, train.text_encoder_lr) == (
        32,
        16.0,
        1e-4,
        1e-5,
    )
    assert (train.optimizer_type, train.lr_scheduler, train.max_train_epochs) == (
        "AdamW8bit",
        "cosine_with_restarts",
        10,
    )
    assert (train.clip_skip, train.max_token_length, train.seed, train.noise_offset) == (2, 225, 1337, 0.0)
    assert data.shuffle_caption and data.enable_bucket and data.resolution == 512
    notes = "\n".join(imported.notes)
    for name in ("lr_restart_cycles", "enable_contrastive", "xformers", "sample_every_n_epochs"):
        assert f"{name}: " in notes


def test_a_key_of_lora_scripts_that_kohyas_trainer_ignores_is_refused() -> None:
    """lr_restart_cycles = 4 trains without restarts there, and nobody is told."""
    error = refusal("lr_restart_cycles = 4")
    assert error.code == "LG-IMP-002" and "lr_scheduler_num_cycles" in error.fix
    assert "algo=" in refusal('lycoris_algo = "lokr"').fix
    assert 'network_args = ["conv_dim=4"]' in refusal("conv_dim = 4").fix


def test_a_preset_of_lora_scripts_has_tables_that_say_nothing_of_training() -> None:
    text = (
        '[metadata]\nname = "x"\nversion = "0.0.1"\n[data]\nresolution = "768,768"\nbucket_no_upscale = true'
    )
    assert read_kohya(text).settings["resolution"] == 768
