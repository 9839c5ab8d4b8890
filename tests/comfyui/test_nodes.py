"""The nodes as ComfyUI lists them, and how they behave in its cache."""

from __future__ import annotations

import time
from typing import Any

import pytest
from PIL import Image

from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy
from loragraft_tests.comfyui.node_table import NODES


@pytest.fixture(scope="module")
def info(server: Comfy) -> dict[str, Any]:
    return server.object_info()


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_listed(info: dict[str, Any], name: str) -> None:
    title, category, inputs, outputs = NODES[name]
    node = info[name]
    assert (node["display_name"], node["category"], node["output"]) == (title, category, outputs)
    order = node["input_order"]
    assert [*order["required"], *order.get("optional", [])] == inputs
    assert node["description"] and node["search_aliases"]
    assert all(node["output_tooltips"])
    for group in ("required", "optional"):
        for widget, (_, options) in node["input"].get(group, {}).items():
            assert options.get("tooltip"), f"{name}.{widget} has no tooltip"


def test_no_other_node_is_ours(info: dict[str, Any]) -> None:
    ours = {n for n, node in info.items() if "LoraGraft" in node["python_module"]}
    assert ours == set(NODES)


def test_loading_the_pack_is_quick(server: Comfy) -> None:
    line = next(x for x in server.log.splitlines() if x.rstrip().endswith("custom_nodes/ComfyUI-LoraGraft"))
    assert "FAILED" not in line
    assert float(line.split()[1]) <= 0.5, line


def test_the_seed_stays_fixed(info: dict[str, Any]) -> None:
    assert info["LoraGraftTrainLoRA"]["input"]["required"]["seed"][1]["control_after_generate"] == "fixed"


def test_advanced_widgets_are_marked_and_optional(info: dict[str, Any]) -> None:
    node = info["LoraGraftTrainLoRA"]["input"]
    plain = [name for name, (_, options) in node["optional"].items() if not options.get("advanced")]
    assert plain == ["sweep", "settings"], "sockets, which the page never folds"
    assert not any(o.get("advanced") for _, o in node["required"].values())


def test_an_edited_caption_or_image_is_noticed_and_nothing_else(server: Comfy) -> None:
    folder = server.base / "input" / "edited"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("first words", "utf-8")
    graph = prompts.dataset_nodes("edited") | {"show": prompts.node("PreviewAny", source=["build", 1])}

    def cached() -> set[str]:
        entry = server.wait(server.queue(graph))
        assert entry["status"]["status_str"] == "success"
        return set(next(d["nodes"] for k, d in entry["status"]["messages"] if k == "execution_cached"))

    cached()
    assert {"folder", "build", "show"} <= cached()
    (folder / "a.txt").write_text("other words", "utf-8")
    assert not cached() & {"folder", "build", "show"}
    assert "other words" in server.run(graph)["show"]["text"][0]
    Image.new("RGB", (64, 64), "blue").save(folder / "b.png")
    (folder / "b.txt").write_text("more words", "utf-8")
    assert not cached() & {"folder", "build"}
    assert {"folder", "build", "show"} <= cached()


def test_the_grid_takes_every_axis(server: Comfy, demo: Any) -> None:
    graph = {
        "base": prompts.node("LoraGraftLoadDemoBase"),
        "preview": prompts.preview_node(
            lora_name=demo.file.name,
            prompts="a\nb",
            seeds="1-2",
            strengths="0, 1",
            clip_strengths="0, 0.5",
            steps=2,
            batch_size=2,
            save_grid=False,
        ),
        "cells": prompts.node("SaveImage", images=["preview", 1], filename_prefix="axes"),
    }
    outputs = server.run(graph)
    report = outputs["preview"]["loragraft"][0]
    strengths = [(r["strength_model"], r["strength_clip"]) for r in report["rows"]]
    assert strengths == [(0, 0), (0, 0.5), (1, 0), (1, 0.5)]
    assert len(report["columns"]) == 2 * 2 * 2
    assert len(outputs["cells"]["images"]) == 4 * 8
    assert outputs["preview"]["images"][0]["type"] == "temp"


def test_cancel_stops_a_preview_between_steps(server: Comfy, demo: Any) -> None:
    graph = {
        "base": prompts.node("LoraGraftLoadDemoBase"),
        "preview": prompts.preview_node(lora_name=demo.file.name, seeds="1-40", steps=50),
    }
    begun = server.mark()
    prompt_id = server.queue(graph)
    server.wait_event(lambda e: e["type"] == "progress" and e["data"]["node"] == "preview", since=begun)
    pressed = time.monotonic()
    server.interrupt()
    entry = server.wait(prompt_id)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert time.monotonic() - pressed < 10, "the whole grid would take minutes"
