"""Command lines of kohya's trainer, for any shell and however they are broken."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.imports.kohya import read_kohya
from loragraft_tests.trainer.kohya_configs import refusal, settings

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
