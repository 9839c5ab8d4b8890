"""SD3 beside ComfyUI's and diffusers' own: equal outputs on the same tensors, LoRA files that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loragraft.trainer.adapters import network
from loragraft.trainer.families import FAMILIES
from loragraft.trainer.families.names.sd3_keys import their_module
from loragraft.trainer.families.sd3 import VERSIONS
from loragraft.trainer.parts import Parts
from loragraft.trainer.tools import bake, lora_file
from loragraft.trainer.tools.convert import convert_naming
from loragraft_tests.trainer import comfy_peer, networks, tiny_sd3
from loragraft_tests.trainer.sd3_models import own_transformer

# As ComfyUI reads it from the weights.
SHAPE: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": tiny_sd3.BLOCKS,
    "input_size": None,
    "adm_in_channels": tiny_sd3.POOLED,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 32, "out_features": 128},
    },
    "num_patches": 256,
    "pos_embed_max_size": 16,
    "pos_embed_scaling_factor": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd35_large": {"qk_norm": "rms"},
    "sd35_medium": {"qk_norm": "rms", "x_block_self_attn_layers": [0]},
}


def given() -> dict[str, torch.Tensor]:
    """Return inputs of a transformer."""
    drawn = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 16, 6, 8, generator=drawn),
        "t": torch.tensor([433.3, 12.7]),
        "text": torch.randn(2, 7, 32, generator=drawn),
        "pooled": torch.randn(2, 24, generator=drawn),
    }


def with_lora(parts: Parts, version: str, preset: str = "") -> network.Adapter:
    """Put a LoRA that does something on what a preset names."""
    targets = FAMILIES[version].targets(parts, convolutions=False, preset=preset)
    return networks.moved(network.inject(parts, network.Settings(4, 2.0, 4, 2.0, 0), targets))


@pytest.mark.parametrize("version", VERSIONS)
def test_comfyui_computes_the_same_on_one_file_and_reads_its_lora(version: str, tmp_path: Path) -> None:
    weights = tiny_sd3.mmdit_weights(tiny_sd3.random_transformer(version))
    parts = Parts(own_transformer(weights), nn.Identity(), nn.ModuleDict({}), {})
    tensors = given()
    with torch.no_grad():
        cond = tensors["text"], tensors["pooled"]
        expected = FAMILIES[version].predict(parts, tensors["x"], tensors["t"], cond)
    adapter = with_lora(parts, version, "everything")
    save_file(adapter.saved(), tmp_path / "lora.safetensors")
    answer = comfy_peer.ask(
        tmp_path / "comfy",
        "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
        {**SHAPE, **VARIANTS[version]},
        weights,
        tensors,
        [{"x": "x", "timesteps": "t", "context": "text", "y": "pooled"}],
        tmp_path / "lora.safetensors",
    )
    scale = expected.abs().max().item()
    torch.testing.assert_close(answer.outputs[0], expected, rtol=0, atol=2e-6 * scale)
    assert answer.unmatched == []
    assert len(answer.weights) == len(adapter.modules) == (27 if version == "sd35_medium" else 25)
    for m in adapter.modules:
        name = f"{their_module(m.target.path)}.weight"
        ours = networks.weight_of(m)
        assert not torch.equal(ours, weights[name])
        torch.testing.assert_close(answer.weights[name], ours, rtol=0, atol=1e-6)


def predicted(version: str, parts: Parts) -> torch.Tensor:
    """Return what the model says to the inputs."""
    tensors = given()
    with torch.no_grad():
        cond = tensors["text"], tensors["pooled"]
        return FAMILIES[version].predict(parts, tensors["x"], tensors["t"], cond)


@pytest.mark.parametrize("version", VERSIONS)
def test_diffusers_reads_the_converted_lora_with_the_same_effect(version: str, tmp_path: Path) -> None:
    """Query, key and value are taken apart there, and the last block's shift and scale change places."""
    from diffusers import StableDiffusion3Pipeline

    theirs: Any = tiny_sd3.random_transformer(version)
    parts = Parts(own_transformer(tiny_sd3.mmdit_weights(theirs)), nn.Identity(), nn.ModuleDict({}), {})
    before = predicted(version, parts)
    adapter = with_lora(parts, version)
    expected = predicted(version, parts)
    assert not torch.allclose(expected, before, atol=1e-2), "the LoRA does something"
    file = lora_file.parse({k: v.clone() for k, v in adapter.saved().items()})
    converted = convert_naming(file, "diffusers")
    tensors = converted.tensors()
    assert all(k.startswith("transformer.transformer_blocks.") for k in tensors)
    StableDiffusion3Pipeline.load_lora_into_transformer(tensors, theirs, adapter_name="tiny")
    x = given()
    found = theirs(x["x"], x["text"], x["pooled"], x["t"], return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * expected.abs().max().item())
    if version == "sd35_medium":  # of two blocks alone, second attentions tell it from Flux
        back = convert_naming(converted, "kohya")
        assert sorted(back.modules) == sorted(file.modules)
        for name, module in file.modules.items():
            (up, down), (new_up, new_down) = module.factors(), back.modules[name].factors()
            product, again = module.scale * up @ down, back.modules[name].scale * new_up @ new_down
            torch.testing.assert_close(again, product, rtol=1e-5, atol=1e-6)


def test_a_lora_is_merged_into_a_checkpoint(tmp_path: Path) -> None:
    theirs = tiny_sd3.random_modules("sd35_medium")
    weights = tiny_sd3.single_file_weights(theirs)
    parts = Parts(
        own_transformer(tiny_sd3.mmdit_weights(theirs["transformer"])), nn.Identity(), nn.ModuleDict({}), {}
    )
    for part in tiny_sd3.KINDS:
        cast(Any, parts.text_encoders)[part] = theirs[part]
    adapter = with_lora(parts, "sd35_medium")
    assert {m.target.part for m in adapter.modules} == {"denoiser", *tiny_sd3.KINDS}
    expected = predicted("sd35_medium", parts)
    file = lora_file.parse({k: v.clone() for k, v in adapter.saved().items()})
    forms, made = bake.merged(weights, [(file, 1.0)], "tiny", lambda name, dtype: dtype)
    merged = {name: made(name) for name in forms}
    changed = [name for name in weights if not torch.equal(merged[name], weights[name])]
    assert len(changed) == len(adapter.modules)
    prefix = "model.diffusion_model."
    model = own_transformer({k[len(prefix) :]: v for k, v in merged.items() if k.startswith(prefix)})
    found = predicted("sd35_medium", Parts(model, nn.Identity(), nn.ModuleDict({}), {}))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
