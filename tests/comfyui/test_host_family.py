"""Models that the trainer has no family for, trained through ComfyUI's own way of calling them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loragraft.trainer import api
from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy, ServerError
from loragraft_tests.comfyui.test_families import BASE, pixels
from loragraft_tests.comfyui.test_finetune import settings_node

KINDS = ("auraflow", "wan")


def base(kind: str) -> prompts.Prompt:
    return {"base": prompts.node("ProbeAnyBase", kind=kind)}


def train(kind: str, **settings: Any) -> prompts.Prompt:
    own = {"output_name": f"any_{kind}", "max_train_steps": 3, "learning_rate": 5e-3, **settings}
    return prompts.train_prompt(**own) | base(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_it_predicts_what_the_hosts_own_model_does(server: Comfy, kind: str) -> None:
    report = prompts.answer(
        server.run({**base(kind), "look": prompts.node("ProbeAnyForward", **BASE)}), "look"
    )
    assert report["apart"] < 1e-4
    assert report["copied"] == [] and report["kept"], "the weights are shared, and stay where they are"
    assert report["latents"] == [1, {"auraflow": 4, "wan": 16}[kind], 8, 12]
    assert report["drawn"] == [1, 3, 64, 96]


@pytest.mark.parametrize("kind", KINDS)
def test_its_lora_is_used_at_once_and_by_the_native_nodes(server: Comfy, kind: str) -> None:
    graph = train(kind, save_every_n_steps=1, sample_prompts="a creature")
    graph["preview"] = prompts.preview_node(checkpoints=["train", 6], seeds="3")
    graph["cells"] = prompts.node("SaveImage", images=["preview", 1], filename_prefix=f"any_{kind}_cells")
    before = len(server.log)
    outputs = server.run(graph)
    assert "not loaded" not in server.log[before:].lower()
    assert outputs["train"]["loragraft"][0]["step"] == 3
    tensors = api.lora_tensors(server.base / "models/loras" / f"any_{kind}.safetensors")
    assert all(name.startswith("diffusion_model.") for name in tensors)
    assert all(float(t.abs().max()) > 0 for name, t in tensors.items() if name.endswith("lora_up.weight"))
    assert len(tensors) == {"auraflow": 28, "wan": 20}[kind] * 3
    lora = {"lora_name": f"any_{kind}.safetensors", "strength_model": 0.8, "strength_clip": 0.8}
    drawn = server.run(prompts.native_prompt(lora, prefix=f"any_{kind}", seeds="3") | base(kind))
    last = pixels(server, outputs["cells"]["images"][-1])
    assert np.array_equal(pixels(server, drawn["save"]["images"][0]), last)
    assert "not loaded" not in server.log[before:].lower()
    assert not np.array_equal(pixels(server, outputs["cells"]["images"][0]), last), "the LoRA changes nothing"
    again = server.run(train(kind, save_every_n_steps=1, sample_prompts="a creature"))
    assert again["train"]["loragraft"][0]["reused"]


SETTINGS: dict[str, Any] = {"clip_skip": 2, "conv_dim": 4, "attention": "plain"}
OF_NODES: dict[str, tuple[str, dict[str, Any]]] = {
    "train_norm": ("LoraGraftNetwork", {"train_norm": True}),
    "guidance_scale": ("LoraGraftLoss", {"guidance_scale": 2.0}),
    "t5xxl_max_token_length": ("LoraGraftText", {"t5xxl_max_token_length": 128}),
}


@pytest.mark.parametrize("name", [*SETTINGS, *OF_NODES])
def test_settings_without_a_meaning_there_are_refused(server: Comfy, name: str) -> None:
    graph = train("auraflow", **({name: SETTINGS[name]} if name in SETTINGS else {}))
    if name in OF_NODES:
        kind, values = OF_NODES[name]
        graph["own"] = settings_node(kind, **values)
        graph["train"]["inputs"]["settings"] = ["own", 0]
    with pytest.raises(ServerError, match=f"LG-CFG-004.*{name}"):
        server.run(graph)


def test_a_caption_that_is_too_long_is_refused(server: Comfy) -> None:
    graph = train("auraflow", output_name="never")
    graph["build"]["inputs"]["caption_suffix"] = "x" * 5000
    with pytest.raises(ServerError, match="LG-NODE-018"):
        server.run(graph)


def test_a_model_that_is_sampled_otherwise_is_refused(server: Comfy) -> None:
    graph = train("auraflow", output_name="never")
    edm = {"sampling": "edm", "sigma_max": 80.0, "sigma_min": 0.002}
    graph["edm"] = prompts.node("ModelSamplingContinuousEDM", model=["base", 0], **edm)
    graph["train"]["inputs"]["model"] = ["edm", 0]
    with pytest.raises(ServerError, match="LG-NODE-017"):
        server.run(graph)


def test_a_shift_of_the_models_sampling_is_trained_with(server: Comfy) -> None:
    graph = train("auraflow", output_name="any_shifted")
    graph["shift"] = prompts.node("ModelSamplingAuraFlow", model=["base", 0], shift=3.5)
    graph["train"]["inputs"]["model"] = ["shift", 0]
    before = len(server.log)
    assert server.run(graph)["train"]["loragraft"][0]["step"] == 3
    assert "discrete_flow_shift is 3.5" in server.log[before:]
