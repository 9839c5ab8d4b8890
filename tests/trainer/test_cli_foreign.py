"""Configs of other trainers and presets on the command line: a run from them, what is printed, refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loragraft.trainer import __main__ as cli
from loragraft.trainer import api
from loragraft.trainer.data.toml_text import toml_lines

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

KOHYA = """
[model_arguments]
pretrained_model_name_or_path = "{base}"
[dataset_arguments]
train_data_dir = "{images}"
resolution = "32,32"
min_bucket_reso = 16
max_bucket_reso = 64
bucket_reso_steps = 8
enable_bucket = true
caption_extension = ".txt"
[network]
network_module = "networks.lora"
network_dim = 4
network_alpha = 2
network_args = ["conv_dim=2"]
[training]
learning_rate = 1e-3
max_train_steps = 3
train_batch_size = 3
seed = 42
xformers = true
max_data_loader_n_workers = 2
save_precision = "fp16"
output_dir = "{out}"
output_name = "unchanged"
"""


@pytest.fixture
def places(checkpoint: Path, images: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "base": checkpoint.as_posix(),
        "images": images.as_posix(),
        "out": (tmp_path / "out").as_posix(),
    }


def run(*arguments: str) -> int:
    return cli.main(["train", *arguments])


def printed_settings(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, object], str]:
    """Return what --print_settings prints, and what was said beside it."""
    assert run(*arguments, "--print_settings") == 0
    printed = capsys.readouterr()
    return tomllib.loads(printed.out), printed.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_a_kohya_config_runs_unchanged(
    places: dict[str, str], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kohya.toml"
    file.write_text(KOHYA.format(**places), encoding="utf-8")
    flags = ("--tokenizer", str(tokenizer), "--device", "cpu", "--preview_image", "false")
    assert run("--config_file", str(file), *flags) == 0
    printed = capsys.readouterr()
    assert f"LoRA          {Path(places['out']) / 'loras' / 'unchanged.safetensors'}" in printed.out
    said, trained = printed.err.index("Config        xformers: "), printed.err.index("steps:")
    assert said < trained, "what means nothing is said before step 1"
    assert "kohya's defaults" in printed.err[:trained] and "lr_scheduler constant" in printed.err[:trained]
    metadata = api.lora_metadata(Path(places["out"]) / "loras" / "unchanged.safetensors")
    assert metadata["ss_network_dim"] == "4" and metadata["ss_lr_scheduler"] == "constant"


def test_the_same_config_as_a_command_line_and_with_our_own_flags_gives_the_same_settings(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kohya.toml"
    file.write_text(KOHYA.format(**places), encoding="utf-8")
    lines = (
        f'accelerate launch train_network.py --pretrained_model_name_or_path="{places["base"]}" \\\n'
        f'  --train_data_dir "{places["images"]}" --resolution 32,32 --min_bucket_reso 16 \\\n'
        "  --max_bucket_reso 64 --bucket_reso_steps 8 --enable_bucket --caption_extension .txt \\\n"
        "  --network_module networks.lora --network_dim 4 --network_alpha 2 --network_args conv_dim=2 \\\n"
        "  --learning_rate 1e-3 --max_train_steps 3 --train_batch_size 3 --seed 42 --xformers \\\n"
        f'  --max_data_loader_n_workers 2 --save_precision fp16 --output_dir "{places["out"]}" \\\n'
        "  --output_name unchanged\n"
    )
    shell = tmp_path / "run.sh"
    shell.write_text(lines, encoding="utf-8")
    from_toml, _ = printed_settings(capsys, "--config_file", str(file))
    from_text, _ = printed_settings(capsys, "--config_file", str(shell))
    assert from_toml == from_text
    assert from_toml["conv_dim"] == 2 and from_toml["conv_alpha"] == 1.0
    changed, _ = printed_settings(capsys, "--config_file", str(file), "--network_dim", "6")
    assert changed == {**from_toml, "network_dim": 6}
    own = tmp_path / "own.toml"
    own.write_text("\n".join(toml_lines(from_toml)), encoding="utf-8")
    assert printed_settings(capsys, "--config", str(own))[0] == from_toml


def test_a_dataset_config_takes_what_it_leaves_out_from_the_config(
    places: dict[str, str], images: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """caption_extension of the command line counts for the folders of a dataset config, as in kohya's."""
    folder = next(path for path in sorted(images.iterdir()) if path.is_dir())
    data = tmp_path / "data.toml"
    data.write_text(
        f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{folder.as_posix()}"\n', encoding="utf-8"
    )
    text = f'{KOHYA.format(**places)}dataset_config = "{data.as_posix()}"\n'
    file = tmp_path / "kohya.toml"
    file.write_text(text, encoding="utf-8")
    flags = ("--tokenizer", str(tokenizer), "--device", "cpu", "--preview_image", "false")
    assert run("--config_file", str(file), *flags) == 0
    said = capsys.readouterr().err
    assert "train_data_dir: dataset_config names the folders" in said
    file.write_text(text.replace('caption_extension = ".txt"', ""), encoding="utf-8")
    assert "LG-DATA-006" in refused(capsys, "--config_file", str(file), "--tokenizer", str(tokenizer))


def test_sample_prompts_are_read_from_their_file(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two\nzibu --w 64 --h 64 --n bad\nblue zibu\n", encoding="utf-8")
    file = tmp_path / "kohya.toml"
    text = f'{KOHYA.format(**places)}sample_prompts = "{prompts.as_posix()}"\nsample_every_n_steps = 2\n'
    file.write_text(text, encoding="utf-8")
    settings, _ = printed_settings(capsys, "--config_file", str(file))
    assert settings["sample_prompts"] == ["zibu --w 64 --h 64 --n bad", "blue zibu"]
    assert (settings["sample_steps"], settings["sample_cfg"], settings["sample_every_n_steps"]) == (
        30,
        7.5,
        2,
    )


def test_a_file_of_hcp_diffusion_trains(
    places: dict[str, str], images: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = next(path for path in sorted(images.iterdir()) if path.is_dir())
    file = tmp_path / "cat.yaml"
    file.write_text(
        "_base_: [cfgs/train/train_base.yaml, cfgs/train/tuning_base.yaml]\n"
        "exp_dir: " + places["out"] + "\nmixed_precision: null\n"
        "lora_unet:\n- {lr: 1e-4, rank: 2, layers: ['re:.*\\.to_k$', 're:.*\\.to_v$']}\n"
        "- {lr: 1e-5, rank: 3, layers: ['re:.*\\.ff$']}\n"
        "train:\n  train_steps: 2\n  save_step: 2\n  scheduler: {name: constant}\n"
        f"model: {{pretrained_model_name_or_path: '{places['base']}', tokenizer_repeats: 1}}\n"
        "data:\n  dataset1:\n    batch_size: 2\n    source:\n      one:\n"
        f"        img_root: '{folder.as_posix()}'\n        caption_file: '{folder.as_posix()}'\n"
        "    bucket: {target_area: 1024, num_bucket: 1}\n",
        encoding="utf-8",
    )
    flags = ("--tokenizer", str(tokenizer), "--device", "cpu", "--preview_image", "false")
    arguments = ("--config_file", str(file), *flags, "train.train_steps=1", "data.dataset1.batch_size=1")
    assert run(*arguments) == 0
    printed = capsys.readouterr()
    assert "1 steps" in printed.err and "scale_lr" in printed.err
    tensors = api.lora_tensors(Path(places["out"]) / "loras" / "cat.safetensors")
    downs = {name: tensor.shape[0] for name, tensor in tensors.items() if "lora_down" in name}
    assert downs and all("lora_unet" in name for name in downs)
    for name, rank in downs.items():
        assert rank == (3 if "_ff_" in name else 2) and ("_to_k" in name or "_to_v" in name or "_ff_" in name)


def test_a_recipe_fills_the_settings_and_flags_win(capsys: pytest.CaptureFixture[str]) -> None:
    settings, said = printed_settings(capsys, "--recipe", "character", "8gb")
    assert "train_batch_size" not in settings and settings["gradient_accumulation_steps"] == 4  # 1 is plain
    assert settings["max_train_steps"] == 1000 and settings["text_encoder_lr"] == 5e-5
    assert "max_train_steps 1000 (S3" in said and "gradient_checkpointing True (S4" in said
    settings, said = printed_settings(capsys, "--recipe", "style", "locon", "--max_train_steps", "7")
    assert (settings["max_train_steps"], settings["algo"], settings["conv_dim"]) == (7, "locon", 16)
    assert "1.44 times" in said


def test_refusals(places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kohya.toml"
    file.write_text(KOHYA.format(**places) + "random_crop = true\nresume = 'x'\n", encoding="utf-8")
    said = refused(capsys, "--config_file", str(file))
    assert "LG-IMP-002" in said and "random_crop True" in said and "resume x" in said
    assert not (tmp_path / "out").exists()
    for flags in (["--recipe", "style"], ["--config", str(file)], ["train.a=1"]):
        assert "LG-CLI-004" in refused(capsys, "--config_file", str(file), *flags)
    assert "LG-CLI-004" in refused(capsys, "train.train_epochs=10")
    assert "LG-CFG-003" in refused(capsys, "--recipe", "style", "character")
    assert "LG-IMP-001" in refused(capsys, "--config_file", str(tmp_path / "none.toml"))
