"""Checkpoints of every family from a diffusers folder to a single file, and U-Nets back into a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.families.sources.folders import sorted_folder
from loragraft.trainer.tools import folder_layout
from loragraft_tests.trainer import (
    tiny,
    tiny_dits,
    tiny_families,
    tiny_flux,
    tiny_qwen,
    tiny_sd2,
    tiny_sd3,
    tiny_sdxl,
    tiny_t5,
)
from loragraft_tests.trainer.data_folders import Refusal

Parts = Mapping[str, Mapping[str, torch.Tensor]]


def write_parts(parts: Parts, folder: Path) -> Path:
    """Write the parts of a diffusers folder, one file each."""
    for part, tensors in parts.items():
        inside = folder / ("transformer" if part == "denoiser" else part)
        inside.mkdir(parents=True)
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, inside / "model.safetensors")
    return folder


def modules(parts: Mapping[str, torch.nn.Module]) -> Parts:
    return {name: module.state_dict() for name, module in parts.items()}


def chroma() -> Parts:
    parts = tiny_dits.folder_parts(tiny_dits.random_chroma(), tiny_dits.random_vae(), tiny_t5.random_t5())
    return {**parts, "text_encoder": tiny_t5.t5_file_weights(tiny_t5.random_t5())}


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "sd2": tiny_sd2.write_folder,
    "sdxl": tiny_sdxl.write_folder,
    "sd35_medium": lambda folder: tiny_sd3.write_folder(folder, "sd35_medium"),
    "flux": lambda folder: write_parts(tiny_flux.random_folder(), folder),
    "chroma": lambda folder: write_parts(chroma(), folder),
    "flux2": lambda folder: write_parts(
        tiny_dits.folder_parts(
            tiny_dits.random_klein(), tiny_dits.random_klein_vae(), tiny_dits.random_klein_text()
        ),
        folder,
    ),
    "qwen_image": lambda folder: write_parts(modules(tiny_qwen.qwen_image_modules()), folder),
    "z_image": lambda folder: write_parts(modules(tiny_qwen.z_image_modules()), folder),
    "lumina2": lambda folder: write_parts(
        tiny_dits.folder_parts(tiny_dits.random_lumina(), tiny_dits.random_vae(), tiny_dits.random_gemma()),
        folder,
    ),
}
QUICK = ("sdxl", "flux", "qwen_image")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FOLDERS]
)
def test_a_folder_becomes_a_file(name: str, tmp_path: Path) -> None:
    folder, file = FOLDERS[name](tmp_path / "folder"), tmp_path / "file.safetensors"
    assert api.convert_checkpoint(folder, file) == []
    family, parts = sorted_folder(folder, api.FAMILIES)
    assert family.name == name
    found = family.split(load_file(file))
    assert found.keys() == parts.keys()
    for part, tensors in parts.items():
        assert set(found[part]) == set(tensors)
        for key in tensors:
            assert torch.equal(found[part][key], tensors[key]), (part, key)
    with Refusal("LG-TOOL-004", "file.safetensors"):
        api.convert_checkpoint(folder, file)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_what_a_file_would_lack_is_refused(part: str, tmp_path: Path) -> None:
    folder = tiny_sd2.write_folder(tmp_path / "folder")
    file = next((folder / part).glob("*.safetensors"))
    save_file({**load_file(file), "class_embedding.weight": torch.ones(2)}, file)
    with Refusal("LG-TOOL-013", "class_embedding"):
        api.convert_checkpoint(folder, tmp_path / "file.safetensors")


def test_a_vae_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = write_parts(tiny_flux.random_folder(), tmp_path / "folder")
    other = tiny.write_checkpoint(tmp_path / "sd15.safetensors")
    with Refusal("LG-TOOL-013", "sd15.safetensors"):
        api.convert_checkpoint(folder, tmp_path / "x.safetensors", vae=other)
    own = tmp_path / "own.safetensors"
    api.convert_checkpoint(folder, own)
    weights = {k: v + 0.5 if k.startswith("vae.") else v for k, v in load_file(own).items()}
    save_file(weights, tmp_path / "changed.safetensors")
    api.convert_checkpoint(folder, tmp_path / "x.safetensors", vae=tmp_path / "changed.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in weights)


UNETS: dict[str, Any] = {"sd2": tiny_sd2, "sdxl": tiny_sdxl}


@pytest.mark.parametrize("name", UNETS)
def test_a_file_becomes_a_folder_that_diffusers_opens(name: str, tokenizer: Path, tmp_path: Path) -> None:
    import diffusers

    checkpoint = UNETS[name].write_checkpoint(tmp_path / "x.safetensors", torch.float32)
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    lines = api.convert_checkpoint(checkpoint, folder, tokenizer=tokenizer)
    before = load_file(checkpoint)
    api.convert_checkpoint(folder, back)
    again = load_file(back)
    lost = [k for k in before if k not in again]
    assert bool(lines) == bool(lost), "what is left out is told"
    assert not [k for k in lost if "resblocks" not in k and "text_projection" not in k and "logit" not in k]
    for key, tensor in again.items():
        if name != "sd2" or f".resblocks.{tiny_sd2.LAYERS - 1}." not in key:  # a layer that no caption passes
            assert torch.equal(tensor, before[key]), key
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    ours = api.open_base(folder).load()
    for mine, theirs in (
        (ours.denoiser, pipeline.unet),
        (ours.vae, pipeline.vae),
        *((encoder, getattr(pipeline, part)) for part, encoder in ours.text_encoders.items()),
    ):
        wanted = theirs.state_dict()
        for key, tensor in mine.state_dict().items():
            assert torch.equal(wanted[key].flatten(), tensor.flatten()), key
    last = pipeline.tokenizer_2 if name == "sdxl" else pipeline.tokenizer
    assert last.pad_token == "!" and last.pad_token_id == 0
    if name == "sdxl":
        assert pipeline.tokenizer.pad_token == "<|endoftext|>"
        assert pipeline.text_encoder_2.config.hidden_act == "gelu"
    else:
        assert pipeline.unet.config.use_linear_projection
    image = pipeline("a", height=32, width=32, num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


def test_what_a_base_predicts_is_in_the_folder(tokenizer: Path, tmp_path: Path) -> None:
    marks = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    checkpoint = tiny_sdxl.write_checkpoint(tmp_path / "x.safetensors", **marks)
    api.convert_checkpoint(checkpoint, tmp_path / "folder", tokenizer=tokenizer)
    told = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    assert told["prediction_type"] == "v_prediction" and told["rescale_betas_zero_snr"] is True
    base = api.open_base(tmp_path / "folder")
    assert base.velocity and base.zero_terminal


def test_a_transformers_file_stays_a_file(tmp_path: Path) -> None:
    weights = tiny_families.WEIGHTS["flux"](tmp_path)
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "flux.safetensors")
    with Refusal("LG-TOOL-013", "flux"):
        api.convert_checkpoint(tmp_path / "flux.safetensors", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_tokenizer_from_the_cache_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache knows a name and not a folder."""
    written: list[tuple[str, str]] = []
    held = SimpleNamespace(pad_token="end")
    held.save_pretrained = lambda folder: written.append((Path(folder).name, held.pad_token))
    monkeypatch.setattr(folder_layout, "load_tokenizer", lambda name: held)
    folder_layout._copy_tokenizer("openai/clip", tmp_path / "tokenizer", None)
    folder_layout._copy_tokenizer("openai/clip", tmp_path / "tokenizer_2", "!")
    assert written == [("tokenizer", "end"), ("tokenizer_2", "!")]
