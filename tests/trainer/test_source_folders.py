"""Diffusers folders: their weights tell the family, shards are brought together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loragraft.trainer import api
from loragraft_tests.trainer import tiny_sd2, tiny_sd3, tiny_sdxl
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.model_files import write

FOLDERS = {
    "sd2": tiny_sd2.write_folder,
    "sdxl": tiny_sdxl.write_folder,
    "sd3": lambda folder: tiny_sd3.write_folder(folder, "sd3"),
    "sd35_medium": lambda folder: tiny_sd3.write_folder(folder, "sd35_medium"),
}


@pytest.mark.parametrize("family", FOLDERS)
def test_a_folder_is_told_by_its_weights(family: str, tmp_path: Path) -> None:
    folder = FOLDERS[family](tmp_path / "folder")
    base = api.open_base(folder)
    assert base.family.name == family and base.name == "folder"
    assert set(base.state_dicts) == set(base.family.folders)
    base.load()
    if family.startswith("sd3"):  # which may lack its largest text encoder
        (folder / "text_encoder_3").rename(tmp_path / "elsewhere")
        assert "text_encoder_3" not in api.open_base(folder).state_dicts
    (folder / "vae").rename(tmp_path / "vae")
    with Refusal("LG-BASE-001", "vae"):
        api.open_base(folder)


def test_a_folder_takes_no_further_files(tmp_path: Path, checkpoint: Path) -> None:
    folder = tiny_sdxl.write_folder(tmp_path / "folder")
    with Refusal("LG-BASE-012", "folder"):
        api.open_base(folder, vae=checkpoint)


def test_a_folder_of_another_model(tmp_path: Path) -> None:
    folder = tiny_sdxl.write_folder(tmp_path / "folder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    write(folder / "unet" / "diffusion_pytorch_model.safetensors", {"a": torch.zeros(1)})
    with Refusal("LG-BASE-002", "OtherPipeline", "sdxl"):
        api.open_base(folder)
    for text in ("{", "[]", "[" * 10**5, '{"_class_name": {"a": 1}}'):
        (folder / "model_index.json").write_text(text)
        with Refusal("LG-BASE-002"):
            api.open_base(folder)


def test_a_scheduler_tells_what_is_predicted(tmp_path: Path) -> None:
    folder = tiny_sdxl.write_folder(tmp_path / "folder")
    plain = api.open_base(folder)
    assert not plain.velocity and not plain.zero_terminal
    (folder / "scheduler").mkdir()
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
    base = api.open_base(folder)
    assert base.velocity is True and base.zero_terminal is True
    assert base.weights_hash == plain.weights_hash


def test_shards_by_their_index(tmp_path: Path) -> None:
    folder = tiny_sdxl.write_folder(tmp_path / "folder")
    plain = api.open_base(folder).weights_hash
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    file.unlink()
    names = sorted(whole)
    placed = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors"
        write(file.with_name(shard), {k: whole[k] for k in part})
        placed |= dict.fromkeys(part, shard)
    write(file.with_name("other-00001-of-00001.safetensors"), {k: torch.zeros_like(whole[k]) for k in names})
    index = file.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    assert api.open_base(folder).weights_hash == plain
    outside = {names[0]: "../vae/diffusion_pytorch_model.safetensors"}
    for bad in (
        "{",
        "{}",
        '{"weight_map": 5}',
        '{"weight_map": {"a": 5}}',
        json.dumps({"weight_map": outside}),
    ):
        index.write_text(bad)
        with Refusal("LG-BASE-001", "unet"):
            api.open_base(folder)
    index.write_text(json.dumps({"weight_map": {names[0]: "gone.safetensors"}}))
    with Refusal("LG-BASE-001", "gone.safetensors"):
        api.open_base(folder)
