"""Command lines of kohya's scripts for SD3 and Flux train unchanged, on tiny bases of several files."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from loragraft.trainer import __main__ as cli
from loragraft.trainer import api
from loragraft_tests.trainer import tiny_flux, tiny_sd3, tiny_sdxl

FLUX_FILES = {
    "flux1-dev": "model.diffusion_model.",
    "ae": "vae.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
}


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """Return a folder with a tiny Flux.1 dev's files, as people keep them, and its tokenizers."""
    weights = tiny_flux.single_file_weights()
    for name, prefix in FLUX_FILES.items():
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        save_file(own, tmp_path / f"{name}.safetensors")
    tiny_flux.write_tokenizers(tmp_path)
    return tmp_path


def flux_line(folder: Path, images: Path, *more: str) -> str:
    """Return a line as kohya's page on Flux has it, for these files."""
    line = (
        "accelerate launch --num_cpu_threads_per_process 1 flux_train_network.py",
        f'--pretrained_model_name_or_path="{folder.as_posix()}/flux1-dev.safetensors"',
        f'--clip_l="{folder.as_posix()}/clip_l.safetensors"',
        f'--t5xxl="{folder.as_posix()}/t5xxl.safetensors" --ae="{folder.as_posix()}/ae.safetensors"',
        f'--train_data_dir="{images.as_posix()}" --output_dir="{folder.as_posix()}/out"',
        "--output_name=flux --save_model_as=safetensors --resolution=64 --caption_extension=.txt",
        "--network_module=networks.lora_flux --network_dim=4 --network_alpha=1 --learning_rate=1e-3",
        "--lr_scheduler=constant --sdpa --max_train_steps=1 --mixed_precision=no --guidance_scale=1.0",
        "--timestep_sampling=shift --discrete_flow_shift=3.1582 --model_prediction_type=raw --seed=42",
        "--t5xxl_max_token_length=16 --cache_latents_to_disk --highvram",
        *more,
    )
    return " \\\n  ".join(line)


def train(folder: Path, text: str, *kinds: str) -> int:
    """Run a line; ``kinds`` are the tokenizers that its base needs."""
    file = folder / "line.txt"
    file.write_text(text, encoding="utf-8")
    tokenizers = [flag for kind in kinds or ("clip", "t5") for flag in ("--tokenizer", str(folder / kind))]
    flags = (*tokenizers, "--device", "cpu", "--preview_image", "false")
    return cli.main(["train", "--config_file", str(file), *flags])


def test_a_line_for_flux(flux: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = flux_line(flux, images, "--network_train_unet_only", "--network_args train_double_block_indices=1")
    assert train(flux, line) == 0, capsys.readouterr().err
    tensors = api.lora_tensors(flux / "out" / "loras" / "flux.safetensors")
    names = {name.split(".")[0] for name in tensors}
    assert any(name.startswith("lora_unet_single_blocks_0_") for name in names)
    assert {name[:26] for name in names if "double" in name} == {"lora_unet_double_blocks_1_"}
    assert not any(name.startswith("lora_te") for name in names)


def test_clip_is_trained_unless_it_is_said_not_to_be(
    flux: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(flux, flux_line(flux, images, "--cache_text_encoder_outputs")) == 0, capsys.readouterr().err
    tensors = api.lora_tensors(flux / "out" / "loras" / "flux.safetensors")
    kinds = {name.split("_")[1] for name in tensors}
    assert kinds == {"unet", "te1"}, "and T5 only with train_t5xxl"
    assert "CLIP is trained" in capsys.readouterr().err


def test_t5_is_trained_with_train_t5xxl(flux: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = flux_line(flux, images, "--network_args train_t5xxl=True", "--text_encoder_lr 1e-4 5e-5")
    assert train(flux, line) == 0, capsys.readouterr().err
    tensors = api.lora_tensors(flux / "out" / "loras" / "flux.safetensors")
    assert {name.split("_")[1] for name in tensors} == {"unet", "te1", "te3"}


@pytest.mark.parametrize("program", ["sd3_train_network.py", "sdxl_train_network.py"])
def test_lines_for_sd3_and_sdxl(
    program: str, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.safetensors"
    if program.startswith("sd3"):
        tiny_sd3.write_checkpoint(base, "sd35_medium")
        own = "--weighting_scheme logit_normal --training_shift 3 --t5xxl_max_token_length 16 --clip_skip 2"
        prefixes, kinds = {"unet", "te1", "te2"}, ["clip", "t5"]
    else:
        tiny_sdxl.write_checkpoint(base)
        own = "--text_encoder_lr 1e-3 0 --min_snr_gamma 5 --no_half_vae --clip_skip 2"
        prefixes, kinds = {"unet", "te1"}, ["clip"]
    tiny_flux.write_tokenizers(tmp_path)
    line = (
        f'{program} --pretrained_model_name_or_path "{base.as_posix()}" '
        f'--train_data_dir "{images.as_posix()}" --output_dir "{tmp_path.as_posix()}/out" '
        f"--output_name it --network_module networks.lora {own} "
        "--network_dim 4 --learning_rate 1e-3 --max_train_steps 1 --resolution 64 --caption_extension .txt"
    )
    assert train(tmp_path, line, *kinds) == 0, capsys.readouterr().err
    tensors = api.lora_tensors(tmp_path / "out" / "loras" / "it.safetensors")
    assert {name.split("_")[1] for name in tensors} == prefixes
    assert "clip_skip 2" in capsys.readouterr().err


def test_what_the_base_has_no_use_for_is_refused_before_a_step(
    flux: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = flux_line(flux, images, "--network_train_unet_only", "--loss_type huber")
    assert train(flux, line) != 0
    said = capsys.readouterr().err
    assert "LG-CFG-004" in said and "exponential" in said
    assert not list((flux / "out").rglob("*.safetensors"))
