"""The tools on every family: names, merging into checkpoints, extracting, drawing; on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.engine.precision import place, resolve
from loragraft.trainer.families import drawing
from loragraft.trainer.families.base import Reading
from loragraft.trainer.tools import extract, lora_file, places, sigmas
from loragraft.trainer.tools.architecture import architecture_of
from loragraft.trainer.tools.convert import convert_naming, naming_of, to_common
from loragraft.trainer.tools.deltas import delta
from loragraft.trainer.tools.sample import merge_into_modules
from loragraft_tests.trainer import quantised_files, tiny_families
from loragraft_tests.trainer.data_folders import Refusal

ARCHITECTURES = {
    **{"sd15": "sd", "sd35_large": "sd3", "sd35_medium": "sd3", "flux_schnell": "flux"},
    **{name: name for name in ("sd2", "sdxl", "sd3", "flux", "chroma", "flux2")},
    **{name: name for name in ("qwen_image", "z_image", "lumina2")},
}
QUICK = ("sdxl", "flux")
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
    module = tiny_base.family.metadata.get("ss_network_module", "networks.lora")
    assert found.metadata["ss_network_module"] == module


def drawn(base: api.Base, **more: Any) -> list[api.Drawing]:
    options = {"size": (64, 96), "steps": 2, "mixed_precision": "fp32", **more.pop("settings", {})}
    return list(api.draw_images(base, ["a"], [1], api.SampleSettings(**options), device="cpu", **more))


def test_images_are_drawn_with_a_lora(tiny_base: api.Base, lora: lora_file.LoraFile, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    lora_file.save_lora(file, lora.tensors(), lora.metadata, precision="fp32")
    (without,), (with_lora,) = drawn(tiny_base), drawn(tiny_base, loras=[(file, 4.0)])
    assert without.image.size == (96, 64)
    assert np.abs(np.asarray(without.image, int) - np.asarray(with_lora.image, int)).max() > 3
    look = tiny_base.family.look
    sampler = "euler, Schedule type: own" if isinstance(tiny_base.family.objective, api.Flow) else "dpmpp_2m"
    assert f"Steps: 2, Sampler: {sampler}" in without.parameters
    assert f"CFG scale: {look.cfg:g}" in without.parameters
    assert ("Distilled CFG Scale: 3.5" in without.parameters) == (look.guidance is not None)
    for schedule in ("normal", "karras", "sgm_uniform"):
        (other,) = drawn(tiny_base, settings={"schedule": schedule, "sampler": "dpmpp_2m"})
        assert len(np.unique(np.asarray(other.image))) > 10, "noise in, no noise out"


def test_what_has_no_effect_is_refused(tiny_base: api.Base, tmp_path: Path) -> None:
    family = tiny_base.family
    flows = isinstance(family.objective, api.Flow)
    for settings, why, refused in (
        ({"size": (64, 72)}, "multiples of", family.latent_multiple == 16),
        ({"sampler": "euler_a"}, "euler_a", flows),
        ({"negative": "b", "cfg": 1.0}, "negative prompt", True),
        ({"guidance": 4.0}, "guidance", family.look.guidance is None),
        ({"clip_skip": 2}, "clip_skip", "clip_skip" in family.ignored),
    ):
        if refused:
            with Refusal("LG-TOOL-005", why):
                drawn(tiny_base, settings=settings)
        else:
            assert drawn(tiny_base, settings=settings)


def test_the_authors_schedule_is_the_familys(tiny_base: api.Base) -> None:
    """Euler along it draws what the family's own loop draws."""
    family = tiny_base.family
    parts = tiny_base.load()
    place(parts, resolve("fp32", torch.device("cpu")), owned=True, text_at_every_step=False)
    look = family.look
    guided = drawing.Guided("", look.cfg, look.guidance)
    reading = Reading(weighted="weighted_captions" not in family.ignored, keep_mean=True)
    (wanted,) = drawing.sample(
        family, parts, ["a"], seeds=[1], size=(64, 96), steps=2, guided=guided, reading=reading
    )
    (found,) = drawn(tiny_base, settings={"sampler": "euler", "schedule": "own"})
    assert np.abs(np.asarray(found.image, int) - np.asarray(wanted, int)).max() <= 1


def test_a_level_does_not_depend_on_the_tables_length() -> None:
    """FLUX.2's shift follows the steps that are taken, not the table that a schedule is read from."""
    objective = api.FAMILIES["flux2"].objective
    own = objective.sigmas_for(8, (1024, 1024))
    table = sigmas.levels("sgm_uniform", objective, 8, (1024, 1024))
    torch.testing.assert_close(table, own, rtol=0, atol=2e-3)


def test_a_lora_of_a_model_that_only_its_host_knows_is_merged(tmp_path: Path) -> None:
    """Its names are those of the checkpoint's tensors, whatever model it is."""
    name = "blocks.3.self_attn.q"
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    for prefix in ("model.diffusion_model.", "diffusion_model."):
        weights = {f"{prefix}{name}.weight": torch.randn(8, 8), f"{prefix}norm.weight": torch.ones(8)}
        save_file(weights, tmp_path / "base.safetensors")
        pair = {
            f"diffusion_model.{name}.lora_down.weight": down,
            f"diffusion_model.{name}.lora_up.weight": up,
        }
        save_file(pair, tmp_path / "lora.safetensors")
        output = api.Output(tmp_path / "merged.safetensors", overwrite=True)
        api.merge_checkpoint(tmp_path / "base.safetensors", [(tmp_path / "lora.safetensors", 0.5)], output)
        found = load_file(output.path)
        key = f"{prefix}{name}.weight"
        torch.testing.assert_close(found[key], weights[key] + 0.5 * up @ down)


@pytest.mark.parametrize(("layer", "good"), [("te1,2", True), ("te1,1", False), ("te2,3", False)])
def test_sdxls_last_layer_of_clip_l_stays_untrained(tmp_path: Path, layer: str, good: bool) -> None:
    base = tiny_families.open_tiny("sdxl", tmp_path)
    tensors = random_lora(base).tensors()
    last = f"lora_{layer.replace(',', '_text_model_encoder_layers_')}_"
    tensors = {
        k: torch.zeros_like(v) if k.startswith(last) and k.endswith("lora_up.weight") else v
        for k, v in tensors.items()
    }
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_clip_skip": "None"})
    found = api.check_lora(tmp_path / "lora.safetensors")
    assert len(found.zero) == 6 and found.expected_zero == 6
    assert found.good == good
    assert any("first text encoder" in line for line in found.remarks)


def test_a_quantised_base_draws_with_a_lora(tmp_path: Path) -> None:
    """What a LoRA changes is unpacked; all else stays packed."""
    weights = tiny_families.WEIGHTS["flux"](tmp_path)
    packed, _, meant = quantised_files.scaled_fp8(weights, "layer")
    tokenizers = [tiny_families.TOKENIZERS[kind](tmp_path / kind) for kind in ("clip", "t5")]
    images = []
    for name, tensors in (("packed", packed), ("plain", meant)):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
        base = api.open_base(tmp_path / f"{name}.safetensors", tokenizer=tokenizers)
        lora = random_lora(base)
        file = tmp_path / f"{name} lora.safetensors"
        lora_file.save_lora(file, lora.tensors(), lora.metadata, precision="fp32")
        (drawing_,) = drawn(base, loras=[(file, 1.0)])
        images.append(np.asarray(drawing_.image, int))
    assert np.abs(images[0] - images[1]).max() <= 1
