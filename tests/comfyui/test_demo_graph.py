"""The demo graph in a real ComfyUI, from a folder of images to a grid, and what native nodes make of it."""

from __future__ import annotations

import functools
import io
import json
import time
from typing import Any

import numpy as np
from PIL import Image

from loragraft.trainer import api
from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.conftest import TRAINED, DemoRun
from loragraft_tests.comfyui.harness import Comfy, on_gpu


def pixels(server: Comfy, image: dict[str, str]) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(server.view(image))).convert("RGB"))


def assert_same_picture(
    server: Comfy, ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any], where: str
) -> None:
    """Assert equal pixels; on a GPU, that they differ no more than two runs of ComfyUI's own nodes do."""
    apart = int(np.abs(ours.astype(int) - theirs.astype(int)).max())
    assert apart <= own_noise(server), f"{where}: {apart} of 255"


@functools.cache
def own_noise(server: Comfy) -> int:
    """Return by how much the native nodes' picture of one seed changes; on a CPU it never does."""
    if not on_gpu():
        return 0
    first, other, again = (
        pixels(
            server,
            server.run(prompts.native_prompt(None, prefix=f"noise{i}", seeds=seed))["save"]["images"][0],
        ).astype(int)
        for i, seed in enumerate(("3", "4", "3"))
    )
    assert not np.array_equal(first, other)
    noise = int(np.abs(first - again).max())
    print(f"native nodes: {noise} of 255 from run to run")
    return noise


def test_it_leaves_the_lora_its_words_and_a_grid(server: Comfy, demo: DemoRun) -> None:
    assert demo.file.is_file()
    assert (
        demo.file.with_suffix(".txt").read_text("utf-8").strip()
        == demo.outputs["train"]["loragraft"][0]["trigger"]
    )
    grid = demo.outputs["preview"]["images"][0]
    assert (grid["type"], grid["subfolder"]) == ("output", "loragraft/grids")
    image = Image.open(io.BytesIO(server.view(grid)))
    assert image.width > 2 * 64 and image.height > 3 * 64
    assert json.loads(image.info["prompt"])["preview"]["class_type"] == "LoraGraftPreviewWithLoRA"
    report = json.loads(
        (server.base / "output/loragraft/grids" / grid["filename"]).with_suffix(".json").read_text("utf-8")
    )
    assert [(r["lora"], r["strength_model"]) for r in report["rows"]] == [
        (None, 0.0),
        ("lora.safetensors", 0.8),  # step 3; the last checkpoint is the finished file and stands there once
        (f"{TRAINED}.safetensors", 0.8),
    ]
    assert [c["seed"] for c in report["columns"]] == [3, 4]


def test_no_key_is_left_out(server: Comfy, demo: DemoRun) -> None:
    native = prompts.native_prompt(
        {"lora_name": demo.file.name, "strength_model": 1.0, "strength_clip": 1.0}, prefix="keys"
    )
    server.run(native)
    assert "lora key not loaded" not in server.log
    assert "NOT LOADED" not in server.log


def test_the_events_tell_the_run_in_order(demo: DemoRun) -> None:
    sent = [e["data"] for e in demo.events if e["type"] == "loragraft.train"]
    kinds = [p["kind"] for p in sent]
    assert kinds[0] == "plan" and kinds[-1] == "done"
    assert {p["node"] for p in sent} == {"train"}
    steps = [s["step"] for p in sent if p["kind"] == "step" for s in p["steps"]]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [p["step"] for p in sent if p["kind"] == "save"] == [3, 6]
    assert all(p["zero_tensors"] == 0 for p in sent if p["kind"] == "save")
    assert [(p["step"], p["prompt"]) for p in sent if p["kind"] == "sample"] == [
        (3, "a creature"),
        (3, "a red circle"),
        (6, "a creature"),
        (6, "a red circle"),
    ]


def test_the_node_shows_progress_samples_and_its_result(server: Comfy, demo: DemoRun) -> None:
    values = [
        e["data"]["value"] for e in demo.events if e["type"] == "progress" and e["data"]["node"] == "train"
    ]
    assert values, "no progress on the node"
    assert any(e["type"] == "binary" for e in demo.events), "no preview picture on the node"
    shown = demo.outputs["train"]
    assert len(shown["images"]) == 4
    assert pixels(server, shown["images"][-1]).shape == (64, 64, 3)
    done = shown["loragraft"][0]
    assert (done["file"], done["step"], done["reused"]) == (demo.file.name, 6, False)
    assert [s for s, _ in done["losses"]] == [1, 2, 3, 4, 5, 6] and len(done["lrs"]) == 6


def test_a_cell_is_what_the_native_nodes_draw(server: Comfy, demo: DemoRun) -> None:
    cells = [pixels(server, image) for image in demo.outputs["cells"]["images"]]
    assert len(cells) == 6
    lora = {"lora_name": demo.file.name, "strength_model": 0.8, "strength_clip": 0.8}
    for row, widgets in ((0, None), (2, lora)):
        for column, seed in enumerate((3, 4)):
            native = server.run(
                prompts.native_prompt(widgets, prefix=f"native_{row}_{column}", seeds=str(seed))
            )
            drawn = pixels(server, native["save"]["images"][0])
            assert_same_picture(server, drawn, cells[2 * row + column], f"row {row}, seed {seed}")
    assert not np.array_equal(cells[0], cells[4]), "the LoRA changes nothing"


def test_model_and_clip_outputs_equal_the_native_loader(server: Comfy, demo: DemoRun) -> None:
    train = {**demo.prompt, **prompts.native_prompt(None, prefix="outputs")}
    del train["preview"], train["cells"]
    for name in ("positive", "negative"):
        train[name]["inputs"]["clip"] = ["train", 2]
    train["sampled"]["inputs"]["model"] = ["train", 1]
    ours = server.run(train)
    native = server.run(
        prompts.native_prompt(
            {"lora_name": demo.file.name, "strength_model": 1.0, "strength_clip": 1.0}, prefix="loader"
        )
    )
    pictures = (pixels(server, outputs["save"]["images"][0]) for outputs in (ours, native))
    assert_same_picture(server, *pictures, "outputs")


def test_native_training_nodes_take_the_outputs(server: Comfy, demo: DemoRun) -> None:
    graph = {**demo.prompt, **prompts.native_prompt(None, prefix="lora_model")}
    del graph["preview"], graph["cells"]
    graph["loader"] = prompts.node(
        "LoraModelLoader", model=["base", 0], lora=["train", 0], strength_model=1.0, bypass=False
    )
    graph["sampled"]["inputs"]["model"] = ["loader", 0]
    graph["loss"] = prompts.node("LossGraphNode", loss=["train", 3], filename_prefix="loss")
    before = len(server.log)
    outputs = server.run(graph)
    assert outputs["loss"]["images"]
    only_model = {"lora_name": demo.file.name, "strength_model": 1.0, "strength_clip": 0.0}
    native = server.run(prompts.native_prompt(only_model, prefix="only_model"))
    assert np.array_equal(
        pixels(server, outputs["save"]["images"][0]), pixels(server, native["save"]["images"][0])
    )
    assert "not loaded" not in server.log[before:].lower()


def test_a_finished_run_is_returned_within_a_second(server: Comfy, demo: DemoRun) -> None:
    server.run(prompts.native_prompt(None, prefix="other"))  # ComfyUI forgets the outputs of the graph before
    graph = {**prompts.train_prompt(), "train": demo.prompt["train"]}
    stamp = demo.file.stat().st_mtime_ns
    begun = time.monotonic()
    entry = server.wait(server.queue(graph))
    seconds = time.monotonic() - begun
    cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    assert "train" not in cached, "the node itself has to return at once"
    done = entry["outputs"]["train"]["loragraft"][0]
    assert done["reused"] and done["file"] == demo.file.name and done["seconds"] < 1
    assert [s for s, _ in done["losses"]] == [1, 2, 3, 4, 5, 6]
    assert {s["step"] for s in done["samples"]} == {3, 6}
    assert demo.file.stat().st_mtime_ns == stamp
    assert seconds < 5, "the node takes less than one; the rest is the queue on a busy machine"


def test_another_comment_trains_nothing_anew(server: Comfy) -> None:
    settings: dict[str, Any] = {"output_name": "commented", "max_train_steps": 2, "seed": 13}
    server.run(prompts.train_prompt(**settings))
    outputs = server.run(prompts.train_prompt(**settings, training_comment="second thoughts"))
    done = outputs["train"]["loragraft"][0]
    assert done["reused"] and done["file"] == "commented.safetensors"
    metadata = api.lora_metadata(server.base / "models/loras/commented.safetensors")
    assert metadata["ss_training_comment"] == "second thoughts"


def test_the_cached_graph_costs_nothing(server: Comfy, demo: DemoRun) -> None:
    server.run(demo.prompt)  # other tests' prompts may have pushed it out of ComfyUI's cache
    entry = server.wait(server.queue(demo.prompt))
    cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    assert {"base", "folder", "build", "train", "preview"} <= set(cached)


def test_the_file_opens_the_graph_that_made_it(server: Comfy, tmp_path: Any) -> None:
    inside = server.base / "input" / "faces"
    workflow = {
        "id": "11111111-2222-3333-4444-555555555555",
        "nodes": [
            {
                "id": 1,
                "type": "LoraGraftLoadImageFolder",
                "widgets_values": [str(inside), True, "", 1, "stop"],
            }
        ],
        "extra": {"note": f"made from {inside} and /home/somebody/private"},
    }
    outputs = server.run(
        prompts.train_prompt(output_name="with_workflow", max_train_steps=1, seed=11), workflow
    )
    assert outputs["train"]["loragraft"][0]["workflow"] == workflow["id"]
    metadata = api.lora_metadata(server.base / "models/loras/with_workflow.safetensors")
    kept = json.loads(metadata["workflow"])
    assert kept["nodes"][0]["widgets_values"][0] == "faces"
    everything = " ".join(metadata.values())
    assert str(server.base) not in everything
    server.run(
        prompts.train_prompt(
            output_name="without_workflow", max_train_steps=1, seed=12, embed_workflow=False
        ),
        workflow,
    )
    assert "workflow" not in api.lora_metadata(server.base / "models/loras/without_workflow.safetensors")


def test_a_taken_name_is_numbered_or_refused(server: Comfy, demo: DemoRun) -> None:
    before = demo.file.read_bytes()
    outputs = server.run(prompts.train_prompt(output_name=TRAINED, max_train_steps=1, seed=99))
    assert outputs["train"]["loragraft"][0]["file"] == f"{TRAINED}_2.safetensors"
    refused = prompts.train_prompt(output_name=TRAINED, max_train_steps=1, seed=98, name_taken="refuse")
    entry = server.wait(server.queue(refused))
    assert "LG-SAVE-005" in str(entry["status"]["messages"])
    assert demo.file.read_bytes() == before
