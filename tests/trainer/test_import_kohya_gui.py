"""Configs of bmaltais' kohya_ss GUI: what its LoRA tab saves means what the GUI hands on to kohya's scripts.

The arguments expected here were compared with the TOML that the GUI's own train_model writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer import __main__ as cli
from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.imports import kohya_gui, kohya_table
from loragraft.trainer.imports import kohya_gui_table as gui_table
from loragraft.trainer.imports.imported import Findings, Imported
from loragraft.trainer.imports.kohya import read_kohya

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

# A file as the window saves it: numbers as text in places, empty fields, keys of its own.
SAVED: dict[str, Any] = {
    "LoRA_type": "Standard",
    "additional_parameters": "",
    "adaptive_noise_scale": 0,
    "bucket_no_upscale": True,
    "bucket_reso_steps": 64,
    "caption_dropout_rate": 0.05,
    "caption_extension": ".txt",
    "clip_skip": "1",
    "dataset_config": "",
    "down_lr_weight": "",
    "enable_bucket": True,
    "epoch": 10,
    "learning_rate": 0.0003,
    "lr_scheduler": "cosine",
    "lr_scheduler_args": "",
    "lr_scheduler_num_cycles": "",
    "lr_warmup": 10,
    "max_resolution": "768,768",
    "max_train_epochs": "",
    "max_train_steps": "800",
    "min_snr_gamma": 5,
    "mixed_precision": "bf16",
    "model_list": "custom",
    "network_alpha": 16,
    "network_dim": 32,
    "noise_offset": 0.05,
    "noise_offset_type": "Original",
    "num_cpu_threads_per_process": 2,
    "optimizer": "AdamW",
    "optimizer_args": "weight_decay=0.1",
    "output_dir": "out",
    "output_name": "cat",
    "persistent_data_loader_workers": False,
    "pretrained_model_name_or_path": "base.safetensors",
    "save_precision": "fp16",
    "seed": 42,
    "shuffle_caption": True,
    "text_encoder_lr": 5e-05,
    "train_batch_size": 2,
    "train_data_dir": "photos",
    "unet_lr": 0.0001,
    "v2": False,
    "xformers": "xformers",
}
# What SAVED leaves out, as the window shows it.
UNNAMED = {key: value for key, value in gui_table.WINDOW.items() if key not in SAVED}


def read(**changes: Any) -> Imported:
    return read_kohya(json.dumps({**SAVED, **changes}), where="gui.json")


def refusal(text: str) -> LoraGraftError:
    with pytest.raises(LoraGraftError) as caught:
        api.make_both(read_kohya(text, where="gui.json", is_json=True).settings)
    return caught.value


def handed_on(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the GUI hands on for SAVED with changes."""
    found = Findings("gui.json")
    gui = kohya_gui._values({**SAVED, **changes}, "gui.json", found)
    result = kohya_gui.arguments(gui, kohya_gui._script(gui, "gui.json", found), found)
    found.raise_any()
    return result


def test_a_saved_config_is_taken_whole() -> None:
    imported = read()
    data, train = api.make_both(imported.settings, where="gui.json")
    assert (data.resolution, data.caption_dropout_rate, data.shuffle_caption) == (768, 0.05, True)
    assert (train.network_dim, train.network_alpha, train.unet_lr, train.text_encoder_lr) == (
        32,
        16,
        1e-4,
        5e-5,
    )
    assert (train.max_train_steps, train.lr_warmup_steps, train.seed) == (800, 0.1, 42)
    assert (train.optimizer_type, train.optimizer_args) == ("AdamW", ("weight_decay=0.1",))
    assert (train.min_snr_gamma, train.noise_offset, train.save_every_n_epochs) == (5, 0.05, 1)
    assert imported.places == {
        "pretrained_model_name_or_path": "base.safetensors",
        "train_data_dir": "photos",
        "output_dir": "out",
    }
    assert imported.reading == {"captions": ("txt", "folder")}


LYCORIS = {"preset": "full", "conv_dim": "1", "conv_alpha": "1", "train_norm": "False"}
FLUX = {"flux1_checkbox": True, "LoRA_type": "Flux1"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr_warmup": "5"}, {"lr_warmup_steps": 0.05}),
        ({"lr_warmup_steps": 30}, {"lr_warmup_steps": 30}),
        ({"dataset_config": "d.toml"}, {"lr_warmup_steps": 80}),
        ({"dataset_config": "d.toml", "max_train_steps": 0, "lr_warmup_steps": 9}, {"lr_warmup_steps": 0.1}),
        ({"text_encoder_lr": 0}, {"network_train_unet_only": True, "text_encoder_lr": None}),
        ({"unet_lr": 0}, {"network_train_text_encoder_only": True, "unet_lr": None}),
        ({"text_encoder_lr": 0, "unet_lr": 0}, {"network_train_unet_only": None}),
        ({"text_encoder_lr": 2e-5}, {"text_encoder_lr": [2e-5]}),
        ({"noise_offset_type": "Multires"}, {"noise_offset": None, "multires_noise_discount": 0.3}),
        (
            {"noise_offset_type": "Multires", "multires_noise_iterations": 6, "multires_noise_discount": 0.2},
            {"multires_noise_iterations": 6, "multires_noise_discount": 0.2},
        ),
        (
            {"max_grad_norm": 0, "prior_loss_weight": 0, "min_timestep": 0},
            dict.fromkeys(("max_grad_norm", "prior_loss_weight", "min_timestep")),
        ),
        ({"max_train_epochs": "3"}, {"max_train_epochs": 3, "max_train_steps": None}),
        ({"xformers": "sdpa"}, {"sdpa": True, "xformers": None}),
        ({"lora_network_weights": "a.safetensors"}, {"network_weights": "a.safetensors"}),
        ({"save_model_as": "same as source model"}, {"save_model_as": "safetensors"}),
        (
            {"LoRA_type": "Kohya LoCon", "conv_dim": 8, "conv_alpha": 4},
            {"network_module": "networks.lora", "network_args": ["conv_dim=8", "conv_alpha=4"]},
        ),
        (
            {"down_lr_weight": "1,0.5", "rank_dropout": 0.1},
            {"network_args": ["down_lr_weight=1,0.5", "rank_dropout=0.1"]},
        ),
        ({"loraplus_lr_ratio": 16}, {"network_args": ["loraplus_lr_ratio=16"]}),
        (
            {"LoRA_type": "Kohya DyLoRA", "unit": 4, "conv_dim": 0, "conv_alpha": 0},
            {"network_module": "networks.dylora", "network_args": ["unit=4"]},
        ),
        (
            {"sd3_checkbox": True, "sd3_clip_l": "l", "clip_l": "x", "clip_g": "g", "sd3_t5xxl": "t"},
            {
                "network_module": "networks.lora_sd3",
                "clip_l": "l",
                "clip_g": "g",
                "t5xxl": "t",
                "weighting_scheme": "logit_normal",
                "text_encoder_lr": [5e-5, 5e-5],
            },
        ),
        (
            {**FLUX, "clip_l": "l", "t5xxl": "t", "ae": "a", "t5xxl_lr": 1e-5},
            {
                "network_module": "networks.lora_flux",
                "clip_l": "l",
                "t5xxl": "t",
                "ae": "a",
                "text_encoder_lr": [5e-5, 1e-5],
                "max_token_length": None,
                "timestep_sampling": "sigma",
                "discrete_flow_shift": 3.0,
            },
        ),
        (
            {**FLUX, "img_attn_dim": "4", "in_dims": 0, "split_mode": True, "train_t5xxl": True},
            {
                "network_args": [
                    "img_attn_dim=4",
                    "train_double_block_indices=all",
                    "train_single_block_indices=all",
                    "train_t5xxl=True",
                    "train_blocks=single",
                ]
            },
        ),
        (
            {**FLUX, "model_type": "Chroma", "clip_l": "l"},
            {"model_type": "chroma", "clip_l": None, "apply_t5_attn_mask": True},
        ),
        ({"ae": "a", "guidance_scale": 1}, {"ae": None, "guidance_scale": None}),
        (
            {"sdxl": True, "sdxl_cache_text_encoder_outputs": True, "sdxl_no_half_vae": True},
            {"cache_text_encoder_outputs": True, "no_half_vae": True},
        ),
        ({"sdxl_cache_text_encoder_outputs": True}, {"cache_text_encoder_outputs": None}),
    ],
)
def test_the_arguments_are_those_that_the_gui_hands_on(
    changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    given = handed_on(changes)
    assert {name: given.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("lora_type", "changes", "expected"),
    [
        ("LyCORIS/LoHa", {}, {**LYCORIS, "algo": "loha", "dora_wd": "False", "use_scalar": "False"}),
        ("LoCon", {"conv_dim": 8}, {**LYCORIS, "algo": "locon", "conv_dim": "8"}),
        (
            "LyCORIS/LoKr",
            {"factor": 6},
            {**LYCORIS, "algo": "lokr", "factor": "6", "decompose_both": "False"},
        ),
        ("LyCORIS/Diag-OFT", {"constrain": 0.1}, {**LYCORIS, "algo": "diag-oft", "constraint": "0.1"}),
        ("LyCORIS/DyLoRA", {"unit": 2, "conv_dim": 4}, {"algo": "dylora", "block_size": "2"}),
        ("LyCORIS/iA3", {"LyCORIS_preset": "attn-mlp"}, {"algo": "ia3", "preset": "attn-mlp"}),
        ("LyCORIS/Native Fine-Tuning", {}, {"algo": "full", "preset": "full", "train_norm": "False"}),
    ],
)
def test_lycoris_types(lora_type: str, changes: dict[str, Any], expected: dict[str, str]) -> None:
    given = handed_on({"LoRA_type": lora_type, **changes})
    words = dict(word.split("=") for word in given["network_args"])
    assert given["network_module"] == "lycoris.kohya" and expected.items() <= words.items()
    api.make_both(read(LoRA_type=lora_type, **changes).settings)


def test_what_lycoris_makes_of_the_words_that_it_is_given() -> None:
    """Any text for decompose_both is true there, use_cp hides use_tucker, and two keys are never read."""
    imported = read(LoRA_type="LyCORIS/LoKr", use_tucker=True, rank_dropout=0.1, rank_dropout_scale=True)
    assert imported.settings["decompose_both"] is True and "use_tucker" not in imported.settings
    assert "rank_dropout_scale" not in imported.settings
    said = "\n".join(imported.notes)
    assert "decompose_both: LyCORIS takes any text for true" in said and "rank_dropout_scale: lycoris" in said
    large = read(LoRA_type="LyCORIS/LoKr", network_dim=100000, decompose_both=True).settings
    assert large["full_matrix"] is True and "decompose_both" not in large
    api.make_both(large)
    assert "train_on_input" in "\n".join(read(LoRA_type="LyCORIS/iA3").notes)


def test_a_key_that_a_file_leaves_out_means_what_the_window_shows() -> None:
    imported = read_kohya('{"LoRA_type": "Standard"}')
    shown = {"learning_rate": 1e-4, "network_dim": 8, "lr_scheduler": "cosine", "lr_warmup_steps": 0.1}
    assert shown.items() <= imported.settings.items()
    note = next(note for note in imported.notes if note.startswith("Not in the file"))
    assert "learning_rate 0.0001" in note and "lr_warmup 10" in note and "optimizer AdamW," in note
    assert "optimizer_type" in imported.settings and imported.settings["optimizer_type"] == "AdamW"
    assert (
        read_kohya('{"LoRA_type": "Standard", "use_8bit_adam": true}').settings["optimizer_type"]
        == "AdamW8bit"
    )
    assert not any("Not in the file" in note for note in read(**UNNAMED).notes)


def test_steps_are_counted_from_the_pictures_as_the_gui_does(tmp_path: Path) -> None:
    for name, files in {"10_cat": 3, "2_b c": 2, "notes": 5}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(files):
            (tmp_path / "photos" / name / f"{number}.{('jpg', 'PNG', 'webp')[number % 3]}").touch()
    (tmp_path / "photos" / "10_cat" / "0.txt").touch()
    file = tmp_path / "gui.json"

    def steps(trusted: bool = True, **changes: Any) -> dict[str, Any]:
        config = {**SAVED, "max_train_steps": 0, "train_data_dir": str(tmp_path / "photos"), **changes}
        file.write_text(json.dumps(config), encoding="utf-8")
        settings = api.read_foreign(file, trusted=trusted).settings
        return {name: settings[name] for name in ("max_train_steps", "max_train_epochs") if name in settings}

    assert steps() == {"max_train_steps": 170}  # (10 x 3 + 2 x 2) / 2 x 10 epochs
    assert steps(train_batch_size=4, gradient_accumulation_steps=3, epoch=1) == {"max_train_steps": 3}
    assert steps(reg_data_dir="reg", epoch=1) == {"max_train_steps": 34}
    assert steps(max_train_epochs=2) == {"max_train_epochs": 2}
    assert steps(trusted=False) == {"max_train_epochs": 10}
    assert steps(train_data_dir=str(tmp_path / "missing")) == {"max_train_epochs": 10}
    assert steps(dataset_config="d.toml") == {}


def test_additional_parameters_are_a_command_line_that_wins() -> None:
    imported = read(
        additional_parameters='--max_grad_norm=0 --network_dim "8" --huber_c 0.2 --loss_type huber'
    )
    assert imported.settings["max_grad_norm"] == 0 and imported.settings["network_dim"] == 8
    assert any("network_dim is given twice" in note for note in imported.notes)
    text = json.dumps({**SAVED, "additional_parameters": "--resolutoin 512"})
    assert (refusal(text).code, refusal(text).fix) == ("LG-CFG-001", "did you mean 'resolution'?")
    error = refusal(json.dumps({**SAVED, "additional_parameters": "huber"}))
    assert error.code == "LG-IMP-001" and "additional_parameters" in error.where


def test_prompts_are_text_in_the_file() -> None:
    imported = read(sample_prompts="a cat --w 64\n\n# no prompt\na dog", sample_every_n_steps=5)
    assert imported.settings["sample_prompts"] == ["a cat --w 64", "a dog"]
    assert imported.settings["sample_every_n_steps"] == 5 and "sample_prompts" not in imported.places


@pytest.mark.parametrize(
    ("changes", "named", "fix"),
    [
        ({"LoRA_type": "Kohya LoHa"}, "LoRA_type Kohya LoHa", "LyCORIS/LoHa"),
        ({"LoRA_type": "LoRA-FA"}, "LoRA_type LoRA-FA", "Standard"),
        ({"flux1_checkbox": True}, "flux1_checkbox", "Flux1"),
        ({"sdxl": True, "sd3_checkbox": True}, "sdxl, sd3_checkbox", "keep one of"),
        ({"train_inpainting": True}, "train_inpainting", "false"),
        ({**FLUX, "show_timesteps": "image"}, "show_timesteps", '""'),
        ({"text_encoder_lr": 0, "t5xxl_lr": 1e-5}, "t5xxl_lr", "set both"),
        ({"learning_rate": 0, "text_encoder_lr": 0, "unet_lr": 0}, "unet_lr 0", "one of them"),
        ({"log_with": "wandb"}, "log_with", "tensorboard"),
        ({"use_wandb": "True"}, "log_with", "tensorboard"),
        ({"resume": "state"}, "resume", "network_weights"),
        ({"resume_from_huggingface": "repo"}, "resume_from_huggingface", "remove it"),
        ({"color_aug": True}, "color_aug", "flip_aug"),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes: dict[str, Any], named: str, fix: str) -> None:
    error = refusal(json.dumps({**SAVED, **changes}))
    assert error.code == "LG-IMP-002" and named in error.where and fix in error.fix


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"num_processes": 2}, "num_processes 2"),
        ({"stop_text_encoder_training": 30}, "stop_text_encoder_training 30"),
        ({"no_token_padding": True}, "no_token_padding True"),
        ({**FLUX, "train_blocks": "double"}, "train_blocks double"),
        ({**FLUX, "single_blocks_to_swap": 2}, "single_blocks_to_swap 2"),
        ({"t5xxl_lr": 1e-5}, "t5xxl_lr 1e-05"),
        ({}, "epoch 10: max_train_steps 800 decides"),
        ({"dataset_config": "d.toml", "max_train_steps": 0}, "1600"),
    ],
)
def test_what_the_gui_does_not_hand_on_is_said(changes: dict[str, Any], note: str) -> None:
    assert any(note in line for line in read(**changes).notes)


def test_what_nobody_chose_and_what_concerns_the_window_goes_without_saying() -> None:
    quiet = {"num_processes": 1, "dynamo_backend": "no", "dynamo_mode": "default", "lowvram": True}
    quiet |= {"anima_vae": "v", "sample_sampler": "euler_a", "train_blocks": "double", "max_train_epochs": ""}
    assert read(**{**quiet, **{k: v for k, v in UNNAMED.items() if k not in quiet}, "epoch": 1}).notes == ()


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        ({"learning_rate_te": 1e-5, "epoch": 2, "optimizer": "AdamW"}, "LG-IMP-003", "whole model"),
        ({"num_vectors_per_token": 8, "epoch": 2}, "LG-IMP-003", "embedding"),
        ({**SAVED, "lumina_checkbox": True}, "LG-IMP-003", "Lumina"),
        ({**SAVED, "anima_checkbox": True}, "LG-IMP-003", "Anima"),
        ({"nodes": [], "links": [], "version": 1}, "LG-IMP-001", "none of kohya_ss' GUI"),
        ({}, "LG-IMP-001", "none of kohya_ss' GUI"),
        ([SAVED], "LG-IMP-001", "no object"),
        ({str(number): 0 for number in range(2000)}, "LG-IMP-001", "more keys"),
        ({**SAVED, "network_dimm": 4}, "LG-CFG-001", "'network_dim'"),
        ({**SAVED, "network_dimm": ""}, "LG-CFG-001", "'network_dim'"),
        ({**SAVED, "network_dim": "four"}, "LG-CFG-003", '"network_dim": 1'),
        ({**SAVED, "sdxl": "yes"}, "LG-CFG-003", '"sdxl": true'),
        ({**SAVED, "xformers": 1}, "LG-CFG-003", "text, true or false"),
        ({**SAVED, "block_dims": [1, 2]}, "LG-CFG-003", "text or a number"),
        ({**SAVED, "seed": {"a": 1}}, "LG-CFG-003", "a whole number"),
        ({**SAVED, "seed": 10**400}, "LG-CFG-003", "a whole number"),
        ({**SAVED, "LoRA_type": "LoRa"}, "LG-CFG-003", "LyCORIS/LoKr"),
    ],
)
def test_a_file_that_is_none_or_wrong_is_refused(config: Any, code: str, said: str) -> None:
    error = refusal(json.dumps(config))
    assert error.code == code and said in f"{error.what} {error.where} {error.why} {error.fix}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"LoRA_type": "Standard", "seed": NaN}', "NaN"),
        ('{"LoRA_type": "Standard", "seed": 1, "seed": 2}', "twice"),
        ('{"LoRA_type": ', "Expecting value"),
        ('{"a": ' * 100_000, "nested"),
        (f'{{"LoRA_type": "Standard", "output_name": "{"a" * 2**20}"}}', "1 MiB"),
        ("network_dim = 4", "Expecting value"),
    ],
)
def test_json_of_a_stranger_is_refused(text: str, said: str) -> None:
    error = refusal(text)
    assert error.code == "LG-IMP-001" and said in error.why


def test_a_number_without_end_is_none_in_toml_either() -> None:
    with pytest.raises(LoraGraftError) as caught:
        read_kohya(f"network_dim = {10**400}")
    assert caught.value.code == "LG-CFG-003"


def test_every_key_stands_in_one_table_and_means_an_argument_of_kohyas() -> None:
    assert len(set(kohya_gui.KNOWN)) == len(kohya_gui.KNOWN)
    assert set(gui_table.WINDOW) <= set(kohya_gui.KINDS)
    names = {*kohya_gui.ARGUMENTS.values(), *gui_table.NOISE}.union(
        *(names.values() for names in gui_table.BY_MODEL.values())
    )
    assert names <= kohya_table.all_arguments()


def test_the_command_line_runs_the_file(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"pretrained_model_name_or_path": str(checkpoint), "train_data_dir": str(images)}
    file = tmp_path / "gui.json"
    file.write_text(json.dumps({**SAVED, **places, "output_dir": str(tmp_path)}), encoding="utf-8")
    assert cli.main(["train", "--config_file", str(file), "--network_dim", "6", "--print_settings"]) == 0
    printed = capsys.readouterr()
    settings = tomllib.loads(printed.out)
    assert (settings["network_dim"], settings["max_train_steps"], settings["resolution"]) == (6, 800, 768)
    assert "epoch 10: max_train_steps 800 decides" in printed.err


def test_a_file_of_the_gui_is_read_as_json_whatever_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "gui.json"
    file.write_text("network_dim = 4\nlearning_rate = 1e-4", encoding="utf-8")
    with pytest.raises(LoraGraftError) as caught:
        api.read_foreign(file)
    assert caught.value.code == "LG-IMP-001"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(SAVED).encode())  # editors put a mark in front
    assert api.read_foreign(file).settings["network_dim"] == 32
