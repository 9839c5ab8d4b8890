"""The workflows of the families run as they stand, but for their length, on tiny models of these families."""

from __future__ import annotations

from typing import Any

import pytest

from loragraft.trainer import api
from loragraft_tests.comfyui import guides, prompts
from loragraft_tests.comfyui.harness import Comfy, ServerError
from loragraft_tests.comfyui.test_guides import BUILD, GRID, TRAIN, Guide

LOADERS = ("CheckpointLoaderSimple", "UNETLoader", "DualCLIPLoader", "TripleCLIPLoader", "VAELoader")
SLOTS = {"MODEL": 0, "CLIP": 1, "VAE": 2}
SMALL = {"resolution": 64, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 32}
TINY = {guides.SD2: "sd2_v", guides.SDXL: "sdxl", guides.SD35: "sd35", guides.FLUX: "flux"}


@pytest.fixture(scope="module")
def info(server: Comfy) -> dict[str, Any]:
    return server.object_info()


def on_tiny(guide: Guide) -> prompts.Prompt:
    """Return the workflow with a tiny base in the place of its loaders, on the sample images."""
    graph = guide.prompt()
    loaders = {str(n["id"]): n["outputs"] for n in guide.workflow["nodes"] if n["type"] in LOADERS}
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in loaders:
                kind = loaders[value[0]][value[1]]["type"]
                node["inputs"][name] = ["base", SLOTS[kind]]
        if node["class_type"] == "LoraGraftLoadImageFolder":
            node["inputs"] |= {"path": "[demo]", "class_tokens": ""}
        if node["class_type"] == BUILD:
            node["inputs"] |= SMALL
        if node["class_type"] == TRAIN:  # an epoch of the samples is longer than the test
            node["inputs"] |= {"max_train_epochs": 0, "save_every_n_epochs": 0, "save_every_n_steps": 0}
            node["inputs"] |= {"mixed_precision": "fp32", "lr_warmup_steps": 0}
        if node["class_type"] == GRID:
            node["inputs"] |= {"width": 64, "height": 64, "seeds": "1", "prompts": "a red circle"}
        rates = node["inputs"].get("network_reg_lrs")
        if rates:  # the tiny model has two blocks of each kind
            node["inputs"]["network_reg_lrs"] = rates.replace("single_blocks_[0-9]_", "single_blocks_0_")
    kept = {i: node for i, node in graph.items() if i not in loaders}
    return {**kept, "base": prompts.node("ProbeTinyBase", family=TINY[guide.name])}


@pytest.mark.parametrize("name", TINY)
def test_a_family_is_trained_and_drawn(server: Comfy, info: dict[str, Any], name: str) -> None:
    guide = Guide(name, info)
    guide.run(server, on_tiny(guide))
    done = guide.done()
    assert done["step"] == 2 and (server.base / "models/loras" / done["file"]).is_file()
    rows = guide.grid()["rows"]
    assert rows[0]["strength_model"] == 0 and rows[-1]["lora"] == done["file"]
    trained = api.lora_metadata(server.base / "models/loras" / done["file"])
    wanted = guide.node(TRAIN)["widgets_values"]
    assert int(trained["ss_network_dim"]) in wanted
    assert "16 images" in guide.text("PreviewAny")


def test_the_guides_rates_are_those_of_fluxs_blocks(server: Comfy, info: dict[str, Any]) -> None:
    """The block weights of its command line are refused, with what replaces them."""
    guide = Guide(guides.FLUX, info)
    graph = on_tiny(guide)
    blocks = next(node for node in graph.values() if node["class_type"] == "LoraGraftBlocks")
    blocks["inputs"] |= {"network_reg_lrs": "", "down_lr_weight": "sine-.5", "mid_lr_weight": "2"}
    blocks["inputs"]["block_lr_zero_threshold"] = 0.1
    with pytest.raises(ServerError) as caught:
        server.run(graph)
    assert "LG-CFG-004" in str(caught.value) and "network_reg_lrs" in str(caught.value)
