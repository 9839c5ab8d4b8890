"""Converted LoRA files in diffusers and in ComfyUI: nothing is left over, the weights change as ours do."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loragraft.trainer.families import z_image
from loragraft.trainer.families.names import (
    chroma_keys,
    flux2_keys,
    flux_keys,
    ldm_keys,
    lumina2_keys,
    sd3_keys,
)
from loragraft.trainer.tools import lora_file, places
from loragraft.trainer.tools.convert import convert_naming
from loragraft.trainer.tools.deltas import delta
from loragraft.trainer.tools.unflatten import unflatten
from loragraft_tests.comfyui.harness import cannot_run, python
from loragraft_tests.conftest import comfyui_path
from loragraft_tests.trainer import tiny_dits, tiny_families, tiny_flux, tiny_qwen, tiny_sd3
from loragraft_tests.trainer.test_tools_families import plain, random_lora

CHILD = Path(__file__).with_name("comfy_names_child.py")
FromFolder = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
# Family -> diffusers' tiny transformer, and how its weights become ours.
TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], FromFolder]] = {
    "sd3": (lambda: tiny_sd3.random_transformer("sd3"), sd3_keys.from_diffusers),
    "sd35_medium": (lambda: tiny_sd3.random_transformer("sd35_medium"), sd3_keys.from_diffusers),
    "flux": (tiny_flux.random_transformer, flux_keys.from_diffusers),
    "chroma": (tiny_dits.random_chroma, chroma_keys.chroma_from_diffusers),
    "flux2": (tiny_dits.random_klein, flux2_keys.flux2_from_diffusers),
    "qwen_image": (tiny_qwen.random_qwen_image, dict),
    "z_image": (tiny_qwen.random_z_image, z_image.transformer_from_diffusers),
    "lumina2": (tiny_dits.random_lumina, lumina2_keys.lumina2_from_diffusers),
}
TEXT = re.compile(r"lora_te(\d?)_(.+)")
KINDS = {"2": "clip_g", "3": "t5xxl"}
QUICK_DIFFUSERS, QUICK_COMFYUI = ("flux", "lumina2"), ("flux",)


def marked(names: Any, quick: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(TRANSFORMERS, QUICK_DIFFUSERS))
def test_diffusers_transformers_take_what_is_converted(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="diffusers loads LoRAs through peft")
    from peft.tuners.tuners_utils import BaseTunerLayer

    build, brought = TRANSFORMERS[name]
    base = tiny_families.open_tiny(name, tmp_path)
    lora = plain(random_lora(base, preset="everything"))
    theirs = convert_naming(lora, "diffusers").tensors()
    inside = {k: v for k, v in theirs.items() if k.startswith("transformer.")}
    model: Any = build().float()
    before = {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.load_lora_adapter(dict(inside), adapter_name="x", prefix="transformer")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert set(layers) == {k.removeprefix("transformer.").rpartition(".lora_")[0] for k in inside}
    after = {
        k: before[k] + layers[k.removesuffix(".weight")].get_delta_weight("x").detach()
        if k.removesuffix(".weight") in layers
        else v
        for k, v in before.items()
    }
    ours_before, ours_after = brought(before), brought(after)
    paths = {t.key: t.path for t in base.family.targets(base.load(), convolutions=True, preset="everything")}
    moved = 0
    for key, module in lora.modules.items():
        if key.startswith("lora_unet_"):
            weight = f"{paths[key]}.weight"
            found = ours_after[weight] - ours_before[weight]
            torch.testing.assert_close(found.flatten(), delta(module).flatten(), rtol=1e-4, atol=1e-5)
            moved += 1
    assert moved == sum(n.startswith("lora_unet_") for n in lora.modules) > 5


CONVERTERS = {
    "flux": "_convert_kohya_flux_lora_to_diffusers",
    "flux2": "_convert_kohya_flux2_lora_to_diffusers",
    "qwen_image": "_convert_non_diffusers_qwen_lora_to_diffusers",
    "z_image": "_convert_non_diffusers_z_image_lora_to_diffusers",
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_diffusers_own_conversion_gives_the_same(name: str, tmp_path: Path) -> None:
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    convert = getattr(conversion, CONVERTERS[name], None)
    if convert is None:
        pytest.skip("this release of diffusers does not convert such files")
    if name == "flux":
        lora = one_block_of_flux()
    else:
        lora = random_lora(tiny_families.open_tiny(name, tmp_path))
    inside = lora_file.LoraFile(
        {n: m for n, m in lora.modules.items() if n.startswith("lora_unet_")}, lora.metadata
    )
    left = dict(inside.tensors())
    theirs = lora_file.parse(convert(left))
    if name == "flux2":
        assert left == {}, "it takes what it knows out of the dictionary"
    ours = convert_naming(inside, "diffusers")
    assert set(theirs.modules) == set(ours.modules)
    for key, module in ours.modules.items():
        torch.testing.assert_close(delta(module), delta(theirs.modules[key]), rtol=1e-4, atol=1e-5)


def one_block_of_flux() -> lora_file.LoraFile:
    """Return a block of each kind in full size: the peer knows no other."""
    golden = Path(__file__).resolve().parents[1] / "golden" / "lora_modules.json"
    shapes = json.loads(golden.read_text("utf-8"))["flux_dev_dim16"]
    rng = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, (down, up) in shapes.items():
        if "_double_blocks_0_" in name or "_single_blocks_0_" in name:
            tensors[f"{name}.lora_down.weight"] = torch.randn(down, generator=rng) * 0.1
            tensors[f"{name}.lora_up.weight"] = torch.randn(up, generator=rng) * 0.1
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return lora_file.parse(tensors)


# Family -> ComfyUI's class, and its names of the text encoders that are trained.
COMFYUI: dict[str, tuple[str, dict[str, str]]] = {
    "sd15": ("BaseModel", {"text_encoder": "clip_l"}),
    "sd2": ("BaseModel", {"text_encoder": "clip_h"}),
    "sdxl": ("SDXL", {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}),
    "sd3": (
        "SD3",
        {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    ),
    "flux": ("Flux", {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}),
    "chroma": ("Chroma", {}),
    "flux2": ("Flux2", {}),
    "qwen_image": ("QwenImage", {}),
    "z_image": ("Lumina2", {}),
    "lumina2": ("Lumina2", {}),
}
# Whose diffusers' names ComfyUI reads; of U-Nets it reads a part alone.
READS_DIFFUSERS = ("sd3", "flux", "chroma", "flux2", "qwen_image", "z_image")


@pytest.mark.parametrize("name", marked(COMFYUI, QUICK_COMFYUI))
def test_comfyui_changes_its_weights_as_we_do(name: str, tmp_path: Path) -> None:
    root = comfyui_path()
    if root is None:
        pytest.skip("no ComfyUI: COMFYUI_PATH is not set to one")
    if (lacking := cannot_run()) is not None:
        pytest.skip(lacking)
    base = tiny_families.open_tiny(name, tmp_path / "base")
    lora = plain(random_lora(base))
    model_class, texts = COMFYUI[name]
    single = base.family.join(base.state_dicts)
    weights = {
        k.removeprefix("model."): v.float() for k, v in single.items() if k.startswith(ldm_keys.UNET_PREFIX)
    }
    for part, kind in texts.items():
        for key, tensor in base.state_dicts[part].items():
            weights[f"text_encoders.{kind}.transformer.{key}"] = tensor.float()
    files = ["kohya", "comfyui", *(["diffusers"] if name in READS_DIFFUSERS else [])]
    for naming in files:
        converted = convert_naming(read_by_comfyui(lora, naming), naming).tensors()
        save_file({k: v.contiguous().clone() for k, v in converted.items()}, tmp_path / naming)
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, tmp_path / "weights.safetensors")
    (tmp_path / "job.json").write_text(json.dumps({"class": model_class, "files": files}), encoding="utf-8")
    done = subprocess.run(
        [python(), str(CHILD), str(root), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    unmatched = json.loads((tmp_path / "unmatched.json").read_text(encoding="utf-8"))
    assert unmatched == {naming: [] for naming in files}
    found = places.places_in(single)
    for naming in files:
        changed = load_file(tmp_path / f"{naming}.changed.safetensors")
        wanted = {}
        for key, module in read_by_comfyui(lora, naming).modules.items():
            text = TEXT.fullmatch(key)
            place = f"text_encoders.{KINDS.get(text[1], texts['text_encoder'])}.transformer." if text else ""
            place += f"{unflatten(text[2])}.weight" if text else found[key].key.removeprefix("model.")
            wanted[place] = weights[place] + delta(module).reshape(weights[place].shape)
        assert changed.keys() == wanted.keys(), naming
        for key, tensor in wanted.items():
            torch.testing.assert_close(changed[key], tensor, rtol=1e-4, atol=1e-5)


def read_by_comfyui(lora: lora_file.LoraFile, naming: str) -> lora_file.LoraFile:
    """Leave out T5 where it has diffusers' names, which ComfyUI does not know."""
    out = "lora_te3_" if naming == "diffusers" else "none"
    return dataclasses.replace(lora, modules={n: m for n, m in lora.modules.items() if not n.startswith(out)})
