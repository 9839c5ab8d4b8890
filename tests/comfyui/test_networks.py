"""Every kind of network is trained in a graph, and ComfyUI's own loader takes all of its file."""

from __future__ import annotations

from typing import Any

import pytest

from loragraft.nodes import settings_groups
from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy

NEEDED: dict[str, dict[str, Any]] = {"dylora": {"algo.unit": 2}, "locon": {"algo.conv_dim": 2}}


@pytest.mark.parametrize("algo", settings_groups.NETWORK.options)
def test_a_network_is_trained_and_drawn(server: Comfy, algo: str) -> None:
    info = server.object_info()["LoraGraftNetwork"]["input"]["required"]
    option = next(o for o in info["algo"][1]["options"] if o["key"] == algo)
    shown = {f"algo.{n}": spec[1]["default"] for n, spec in option["inputs"].get("required", {}).items()}
    always = {name: spec[1]["default"] for name, spec in info.items() if name != "algo"}
    network = {**always, **shown, **NEEDED.get(algo, {}), "algo": algo}
    graph = prompts.demo_prompt(
        train={
            "output_name": f"network_{algo}",
            "max_train_steps": 1,
            "settings": ["network", 0],
        },
        preview={"strengths": "1", "steps": 1},
    ) | {"network": prompts.node("LoraGraftNetwork", **network)}
    before = len(server.log)
    outputs = server.run(graph)
    assert outputs["train"]["loragraft"][0]["file"] == f"network_{algo}.safetensors"
    assert outputs["preview"]["images"]
    assert "not loaded" not in server.log[before:].lower()
