"""Full fine-tuning in a real ComfyUI: the model is in models/checkpoints and draws as base and file do."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from loragraft.nodes import settings_groups as groups
from loragraft.nodes import widgets
from loragraft.trainer.config import TrainConfig
from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy
from loragraft_tests.comfyui.test_tools import at, picture

NAME = "finetuned.safetensors"


def settings_node(name: str, **given: Any) -> dict[str, Any]:
    """Return a settings node with its widgets at their defaults but for ``given``."""
    group = groups.GROUPS[name]
    default = {w.name: w.default for w in widgets.widgets_of(TrainConfig, group.names)}
    values = {n: default[n] for n in group.always}
    if group.choice:
        chosen = given.get(group.choice, default[group.choice])
        values |= {f"{group.choice}.{n}": default[n] for n in group.options[chosen]}
    return prompts.node(name, **{**values, **given})


def finetune(**settings: Any) -> prompts.Prompt:
    """Return a graph that trains every weight of the denoiser and saves the model."""
    graph = prompts.train_prompt(
        output_name="finetuned", text_encoder_lr=0, learning_rate=2e-4, max_train_steps=2, **settings
    )
    graph["network"] = settings_node("LoraGraftNetwork", algo="full", preset="everything")
    graph["saving"] = settings_node("LoraGraftSaving", settings=["network", 0], save_as="checkpoint")
    graph["train"]["inputs"]["settings"] = ["saving", 0]
    return graph


def test_the_model_draws_as_the_base_with_the_file(server: Comfy) -> None:
    outputs = server.run(finetune())
    assert outputs["train"]["loragraft"][0]["step"] == 2
    model, lora = (server.base / "models" / folder / NAME for folder in ("checkpoints", "loras"))
    assert f"The whole model: {model}" in server.log
    with safe_open(model, framework="pt") as file:
        told = file.metadata()
    assert told["modelspec.architecture"] == "stable-diffusion-v1" and told["loragraft_run"]
    assert {name.rpartition(".")[2] for name in load_file(lora)} == {"diff", "diff_b", "w_norm", "b_norm"}
    plain = picture(server, None, "finetune")
    with_file = picture(server, at(NAME, 1.0), "finetune")
    alone = picture(server, None, "finetune", checkpoint=NAME)
    assert "lora key not loaded" not in server.log
    assert np.abs(with_file - plain).max() > 20
    assert np.abs(with_file - alone).max() <= 3, "but for the files' half precision"


def test_a_second_model_takes_another_name(server: Comfy) -> None:
    taken = server.base / "models" / "checkpoints" / "taken.safetensors"
    Image.new("RGB", (8, 8)).save(taken, "PNG")
    before = taken.read_bytes()
    server.run(finetune() | {})  # the finished run is found again, and nothing is written anew
    graph = finetune()
    graph["train"]["inputs"] |= {"output_name": "taken", "max_train_steps": 1}
    server.run(graph)
    assert taken.read_bytes() == before
    assert taken.with_name("taken_2.safetensors").is_file()
