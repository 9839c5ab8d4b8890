"""The tools on every family: names, merging into checkpoints, extracting, drawing; on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.tools import extract, lora_file, places
from loragraft.trainer.tools.architecture import architecture_of
from loragraft.trainer.tools.convert import convert_naming, naming_of, to_common
from loragraft.trainer.tools.deltas import delta
from loragraft.trainer.tools.sample import merge_into_modules
from loragraft_tests.trainer import tiny_families

ARCHITECTURES = {
    **{"sd15": "sd", "sd35_large": "sd3", "sd35_medium": "sd3", "flux_schnell": "flux"},
    **{name: name for name in ("sd2", "sdxl", "sd3", "flux", "chroma", "flux2")},
    **{name: name for name in ("qwen_image", "z_image", "lumina2")},
}
QUICK = ("sdxl", "flux", "lumina2")
FAMILIES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny_families.WEIGHTS
]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> api.Base:
    """Return one family's tiny base."""
    return tiny_families.open_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def lora(tiny_base: api.Base) -> lora_file.LoraFile:
    """Return a LoRA with random tensors for every layer that can be trained, normalisation layers too."""
    return random_lora(tiny_base, preset="everything", norms=True)


def random_lora(base: api.Base, *, preset: str = "", norms: bool = False) -> lora_file.LoraFile:
    """Return random tensors of rank 2 and alpha 1 under the names that training gives them."""
    rng = torch.Generator().manual_seed(8)
    parts = base.load()
    tensors: dict[str, torch.Tensor] = {}
    convolutions = preset == "everything"
    for target in base.family.targets(parts, convolutions=convolutions, preset=preset, norms=norms):
        layer: Any = parts.part(target.part).get_submodule(target.path)
        if target.kind == "norm":
            tensors[f"{target.key}.w_norm"] = torch.randn(layer.weight.shape, generator=rng) * 0.1
            if getattr(layer, "bias", None) is not None:
                tensors[f"{target.key}.b_norm"] = torch.randn(layer.bias.shape, generator=rng) * 0.1
            continue
        out, fan_in, *kernel = layer.weight.shape
        tensors[f"{target.key}.lora_down.weight"] = torch.randn(2, fan_in, *kernel, generator=rng) * 0.1
        tensors[f"{target.key}.lora_up.weight"] = torch.randn(out, 2, *[1] * len(kernel), generator=rng) * 0.1
        tensors[f"{target.key}.alpha"] = torch.tensor(1.0)
    return lora_file.parse(tensors, base.family.metadata, name="tiny.safetensors")


def plain(file: lora_file.LoraFile) -> lora_file.LoraFile:
    """Return a file without its normalisation layers."""
    modules = {name: m for name, m in file.modules.items() if m.kind == lora_file.PLAIN}
    return lora_file.LoraFile(modules, file.metadata, file.name)


def same_changes(a: lora_file.LoraFile, b: lora_file.LoraFile) -> None:
    assert list(a.modules) == list(b.modules)
    for name, module in a.modules.items():
        assert module.shape() == b.modules[name].shape() and module.rank == b.modules[name].rank, name
        torch.testing.assert_close(delta(module), delta(b.modules[name]), rtol=1e-5, atol=1e-6)


def checkpoint_of(base: api.Base, path: Path) -> Path:
    """Write the base as the single file that the tools read."""
    weights = base.family.join(base.state_dicts)
    save_file({name: weights[name].contiguous().clone() for name in weights}, path)
    return path


def test_names_come_back_from_every_naming(tiny_base: api.Base, lora: lora_file.LoraFile) -> None:
    name = tiny_base.family.name
    whole = plain(lora)
    assert architecture_of(whole.modules, whole.metadata) == ARCHITECTURES[name]
    assert naming_of(whole) == "kohya"
    theirs = convert_naming(lora, "comfyui")
    assert naming_of(theirs) == "comfyui"
    same_changes(plain(to_common(theirs)), whole)
    assert set(to_common(theirs).modules) == set(lora.modules), "normalisation layers have names too"
    diffusers = convert_naming(whole, "diffusers")
    assert naming_of(diffusers) == "diffusers"
    back = convert_naming(diffusers, "kohya")
    assert set(back.modules) == set(whole.modules)
    same_changes(lora_file.LoraFile({n: back.modules[n] for n in whole.modules}), whole)


def test_comfyuis_names_are_those_of_the_checkpoint(tiny_base: api.Base, lora: lora_file.LoraFile) -> None:
    weights = tiny_base.family.join(tiny_base.state_dicts)
    for name in convert_naming(plain(lora), "comfyui").modules:
        if name.startswith("diffusion_model."):
            assert f"model.{name}.weight" in weights, name


def test_every_module_has_its_place(tiny_base: api.Base, lora: lora_file.LoraFile) -> None:
    weights = tiny_base.family.join(tiny_base.state_dicts)
    found = places.places_in(weights)
    for name, module in lora.modules.items():
        assert name in found, name
        rows = found[name].rows(weights[found[name].key])
        wanted = module.shape() if module.kind == lora_file.PLAIN else module.tensors["w_norm"].shape
        assert tuple(rows.shape[:2]) == tuple(wanted[:2]), name


def test_a_merged_checkpoint_has_what_merged_modules_have(
    tiny_base: api.Base, lora: lora_file.LoraFile, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tiny_base, tmp_path / "base.safetensors")
    file, target = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    lora_file.save_lora(file, lora.tensors(), lora.metadata, precision="fp32")
    api.merge_checkpoint(checkpoint, [(file, 0.8)], api.Output(target, "fp32"))
    tokenizers = [Path(folder) for folder in tiny_base.tokenizer_folders.values()]
    merged = api.open_base(target, tokenizer=tokenizers).load()
    ours, before = tiny_base.load(), tiny_base.load()
    merge_into_modules(tiny_base.family, ours, [(lora, 0.8)])
    moved = 0
    for found, wanted, old in zip(*map(states, (merged, ours, before)), strict=True):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name].float(), tensor.float(), rtol=1e-3, atol=1e-3)
            moved += not torch.equal(tensor, old[name])
    assert moved >= len(lora.modules)


def states(parts: api.Parts) -> list[dict[str, torch.Tensor]]:
    return [parts.denoiser.state_dict(), parts.text_encoders.state_dict()]


def test_the_difference_of_two_checkpoints_is_the_lora_between_them(
    tiny_base: api.Base, tmp_path: Path
) -> None:
    lora = random_lora(tiny_base)
    checkpoint = checkpoint_of(tiny_base, tmp_path / "base.safetensors")
    weights = load_file(checkpoint)
    original = tmp_path / "original.safetensors"
    save_file({name: tensor.float() for name, tensor in weights.items()}, original)
    file, target = tmp_path / "lora.safetensors", tmp_path / "tuned.safetensors"
    lora_file.save_lora(file, lora.tensors(), lora.metadata, precision="fp32")
    api.merge_checkpoint(original, [(file, 1.0)], api.Output(target))
    settings = api.ExtractSettings(2, None, 1.0, 0.0)
    found, report = extract.extract_lora(original, target, settings)
    assert max(told.error for told in report if told.norm > 1e-3) < 1e-3
    for name, module in lora.modules.items():
        assert name in found.modules, name
        torch.testing.assert_close(
            delta(found.modules[name]).flatten(), delta(module).flatten(), rtol=1e-3, atol=1e-4
        )
    for key in ("ss_base_model_version", "modelspec.architecture"):
        assert found.metadata[key] == tiny_base.family.metadata[key]
