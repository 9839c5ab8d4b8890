"""The example workflows fit the nodes as they are, and the demo one runs as it stands but for its length."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loragraft_tests.comfyui import workflows
from loragraft_tests.comfyui.guides import FAMILIES, GUIDES
from loragraft_tests.comfyui.harness import Comfy
from loragraft_tests.comfyui.sheet import to_prompt

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
MADE = {
    workflows.DEMO_NAME: workflows.demo_workflow,
    workflows.SD15_NAME: workflows.sd15_workflow,
    workflows.DATASET_NAME: workflows.dataset_workflow,
    workflows.SWEEP_NAME: workflows.sweep_workflow,
    **GUIDES,  # test_guides.py runs them
    **FAMILIES,  # and test_family_workflows.py these
}
# What only a reader has: models, and images.
LACKING = {
    workflows.SD15_NAME: {"CheckpointLoaderSimple"},
    "LoraGraft SD2.x": {"CheckpointLoaderSimple"},
    "LoraGraft SDXL": {"CheckpointLoaderSimple"},
    "LoraGraft SD3.5": {"CheckpointLoaderSimple", "TripleCLIPLoader"},
    "LoraGraft Flux.1": {"UNETLoader", "DualCLIPLoader", "VAELoader"},
}


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return loaded


@pytest.fixture(scope="module")
def info(server: Comfy) -> dict[str, Any]:
    return server.object_info()


@pytest.mark.parametrize("name", MADE)
def test_the_committed_workflow_is_up_to_date(info: dict[str, Any], name: str) -> None:
    made = MADE[name](info)
    if os.environ.get("LORAGRAFT_WRITE_WORKFLOWS"):
        (FOLDER / f"{name}.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", "utf-8")
    assert read(name) == made, (
        "write it anew: LORAGRAFT_WRITE_WORKFLOWS=1 pytest tests/comfyui/test_workflows.py -k up_to_date"
    )


def test_every_workflow_here_is_known() -> None:
    assert {f.stem for f in FOLDER.glob("*.json")} == set(MADE)


@pytest.mark.parametrize("name", [name for name in MADE if name not in GUIDES])
def test_the_workflow_validates(server: Comfy, info: dict[str, Any], name: str) -> None:
    graph = to_prompt(read(name), info)
    status, answer = server.post_prompt(graph)
    if name not in LACKING:
        server.interrupt()
        server.wait(answer["prompt_id"])
        assert status == 200 and not answer.get("node_errors")
    else:
        problems = [(e["type"], n["class_type"]) for n in answer["node_errors"].values() for e in n["errors"]]
        assert set(problems) == {
            *(("value_not_in_list", kind) for kind in LACKING[name]),
            ("custom_validation_failed", "LoraGraftLoadImageFolder"),
        }


def test_links_and_widgets_are_consistent(info: dict[str, Any]) -> None:
    for name in MADE:
        workflow = read(name)
        nodes = {n["id"]: n for n in workflow["nodes"]}
        for number, source, slot, target, place, kind in workflow["links"]:
            assert number in nodes[source]["outputs"][slot]["links"]
            assert nodes[target]["inputs"][place]["link"] == number
            assert nodes[source]["outputs"][slot]["type"] == kind
            accepted = nodes[target]["inputs"][place]["type"]
            assert accepted in (kind, "*")


def test_the_demo_workflow_runs(server: Comfy, info: dict[str, Any]) -> None:
    workflow = read(workflows.DEMO_NAME)
    graph = to_prompt(workflow, info)
    ids = {n["class_type"]: i for i, n in graph.items()}
    graph[ids["LoraGraftTrainLoRA"]]["inputs"] |= {
        "max_train_steps": 2,
        "save_every_n_steps": 1,
        "output_name": "workflow_demo",
        "lr_warmup_steps": 0,
    }
    graph[ids["LoraGraftPreviewWithLoRA"]]["inputs"] |= {"steps": 2}
    before = len(server.log)
    outputs = server.run(graph, workflow)
    assert outputs[ids["LoraGraftTrainLoRA"]]["loragraft"][0]["step"] == 2
    assert outputs[ids["LoraGraftPreviewWithLoRA"]]["images"]
    assert "bucket" in outputs[ids["PreviewAny"]]["text"][0]
    assert "not loaded" not in server.log[before:].lower()


def test_the_sweep_workflow_runs(server: Comfy, info: dict[str, Any]) -> None:
    workflow = read(workflows.SWEEP_NAME)
    graph = to_prompt(workflow, info)
    ids = {n["class_type"]: i for i, n in graph.items()}
    graph[ids["LoraGraftTrainLoRA"]]["inputs"] |= {
        "max_train_steps": 2,
        "output_name": "workflow_sweep",
        "lr_warmup_steps": 0,
    }
    graph[ids["LoraGraftPreviewWithLoRA"]]["inputs"] |= {"steps": 2}
    before = len(server.log)
    outputs = server.run(graph, workflow)
    done = outputs[ids["LoraGraftTrainLoRA"]]["loragraft"][0]
    assert [run["step"] for run in done["runs"]] == [2] * 4
    rows = outputs[ids["LoraGraftPreviewWithLoRA"]]["loragraft"][0]["rows"]
    assert [row["lora"] for row in rows] == [None, *(run["file"] for run in done["runs"])]
    assert "not loaded" not in server.log[before:].lower()


def test_the_dataset_workflow_runs(server: Comfy, info: dict[str, Any]) -> None:
    workflow = read(workflows.DATASET_NAME)
    outputs = server.run(to_prompt(workflow, info), workflow)
    texts = "\n".join(t for o in outputs.values() for t in o.get("text", []))
    assert "16 images" in texts and "bucket" in texts and "deduplicate" in texts
    pictures = [image for o in outputs.values() for image in o.get("images", [])]
    assert len(pictures) >= 4, "duplicates, the crop, and the report's pictures"


@pytest.mark.full
def test_the_sd15_workflow_runs(server: Comfy, info: dict[str, Any]) -> None:
    """On a checkpoint of real size: LORAGRAFT_SD15 names an SD1.x .safetensors file."""
    given = os.environ.get("LORAGRAFT_SD15")
    if not given:
        pytest.skip("LORAGRAFT_SD15 names no checkpoint")
    checkpoint = server.base / "models/checkpoints/sd15.safetensors"
    checkpoint.symlink_to(Path(given).resolve())
    images = server.base / "input" / "4_mycat"
    images.mkdir()
    from PIL import Image

    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (256, 256), colour).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"mycat, {colour}", "utf-8")
    graph = to_prompt(read(workflows.SD15_NAME), info)
    ids = {n["class_type"]: i for i, n in graph.items()}
    graph[ids["CheckpointLoaderSimple"]]["inputs"]["ckpt_name"] = checkpoint.name
    graph[ids["LoraGraftLoadImageFolder"]]["inputs"]["path"] = images.name
    graph[ids["LoraGraftBuildDataset"]]["inputs"] |= {"resolution": 256}
    graph[ids["LoraGraftTrainLoRA"]]["inputs"] |= {
        "max_train_steps": 2,
        "save_every_n_steps": 0,
        "sample_prompts": "",
        "preview_image": False,
    }
    graph[ids["LoraGraftPreviewWithLoRA"]]["inputs"] |= {
        "steps": 2,
        "width": 256,
        "height": 256,
        "seeds": "1",
        "prompts": "photo of mycat",
        "strengths": "1",
        "checkpoints": None,
    }
    del graph[ids["LoraGraftPreviewWithLoRA"]]["inputs"]["checkpoints"]
    before = len(server.log)
    outputs = server.run(graph, timeout_s=1800)
    assert outputs[ids["LoraGraftTrainLoRA"]]["loragraft"][0]["step"] == 2
    assert "not loaded" not in server.log[before:].lower()
