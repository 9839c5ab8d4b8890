"""The nodes for files after training in a real ComfyUI: what they write is what native loaders read."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy, error_text
from loragraft_tests.trainer.lora_files import tiny_lora

LORA = "tiny_lora.safetensors"
NAMING = {"kohya": "lora_unet_", "comfyui": "diffusion_model."}  # ComfyUI does not read all of diffusers'


@pytest.fixture(scope="module")
def folder(server: Comfy) -> Path:
    """Return models/, with a LoRA for the demo base and its checkpoint in it."""
    models = server.base / "models"
    tiny_lora(api.open_demo_base(), models / "loras")
    shutil.copyfile(api.demo_base_file(), models / "checkpoints" / "demo.safetensors")
    return models


def tool(name: str, **inputs: Any) -> prompts.Prompt:
    """Return a node and probes of its two outputs."""
    return {
        "tool": prompts.node(f"LoraGraft{name}", **inputs),
        "first": prompts.node("PreviewAny", source=["tool", 0]),
        "second": prompts.node("PreviewAny", source=["tool", 1]),
    }


def texts(outputs: dict[str, Any]) -> tuple[str, str]:
    first, second = (str(outputs[name]["text"][0]) for name in ("first", "second"))
    return first, second


def picture(
    server: Comfy, lora: dict[str, Any] | None, prefix: str, checkpoint: str = ""
) -> np.ndarray[Any, Any]:
    """Draw the natively loaded way; ``checkpoint`` is a file in place of the demo base."""
    graph = prompts.native_prompt(lora, prefix=prefix)
    if checkpoint:
        graph["base"] = prompts.node("ProbeLoadCheckpoint", name=checkpoint)
    (image,) = server.run(graph)["save"]["images"]
    return np.asarray(Image.open(io.BytesIO(server.view(image))).convert("RGB")).astype(int)


def at(name: str, strength: float) -> dict[str, Any]:
    return {"lora_name": name, "strength_model": strength, "strength_clip": strength}


def refused(server: Comfy, prompt: prompts.Prompt) -> str:
    """Return with which text a prompt is refused, ahead or while it runs."""
    status, answer = server.post_prompt(prompt)
    if status != 200:
        return json.dumps(answer)
    return error_text(server.wait(answer["prompt_id"]))


def test_a_resized_lora_loads_and_draws_nearly_the_same(server: Comfy, folder: Path) -> None:
    resize = {"lora_name": LORA, "rank": 4, "method": "sv_fro", "parameter": 0.999, "output_name": "resized"}
    name, report = texts(server.run(tool("ResizeLoRA", **resize)))
    assert name == "resized.safetensors" and "modules, ranks" in report
    before, whole, small = (picture(server, lora, "resize") for lora in (None, at(LORA, 0.3), at(name, 0.3)))
    assert np.abs(whole - small).mean() < 0.1 * np.abs(whole - before).mean()
    assert "lora key not loaded" not in server.log
    # the same name again, for another rank, must be asked for
    again = tool("ResizeLoRA", **{**resize, "rank": 2})
    assert "LG-TOOL-004" in refused(server, again)
    again["tool"]["inputs"]["overwrite"] = True
    server.run(again)


def test_a_merged_checkpoint_draws_as_the_lora(server: Comfy, folder: Path) -> None:
    merge = {"checkpoint": "demo.safetensors", "loras": f"{LORA}: 0.3", "output_name": "merged"}
    name, report = texts(server.run(tool("MergeIntoCheckpoint", **merge, save_precision="fp32")))
    assert name == "merged.safetensors" and "at 0.3" in report
    plain, lora, merged = (
        picture(server, None, "merge"),
        picture(server, at(LORA, 0.3), "merge"),
        picture(server, None, "merge", checkpoint=name),
    )
    assert np.abs(lora - merged).max() <= 2, "but for rounding"
    assert np.abs(lora - plain).max() > 20
    extract = {
        "original": "demo.safetensors",
        "tuned": name,
        "output_name": "found",
        "rank": 8,
        "conv_rank": 8,
    }
    name, report = texts(server.run(tool("ExtractLoRA", **extract, clamp_quantile=1.0, min_diff=0.0)))
    found = picture(server, at(name, 1.0), "extract")
    assert np.abs(lora - found).mean() < 0.15 * np.abs(lora - plain).mean()
    assert "is not in the LoRA" in report


def test_a_denoiser_in_a_file_of_its_own(server: Comfy, folder: Path) -> None:
    """Where people keep Flux and its like: models/diffusion_models."""
    weights = load_file(folder / "checkpoints" / "demo.safetensors")
    prefix = "model.diffusion_model."
    unet = {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}
    key = next(k for k in unet if k.endswith("attn1.to_q.weight"))
    tuned = {**unet, key: unet[key] + 0.01}
    (folder / "diffusion_models").mkdir(exist_ok=True)
    for name, tensors in (("own", unet), ("tuned", tuned)):
        save_file(tensors, folder / "diffusion_models" / f"{name}.safetensors")
    settings = {"rank": 1, "conv_rank": 0, "clamp_quantile": 1.0, "min_diff": 0.0}
    pair = {"original": "own.safetensors", "tuned": "tuned.safetensors", "output_name": "of denoisers"}
    lora, _ = texts(server.run(tool("ExtractLoRA", **pair, **settings)))
    merge = {"checkpoint": "own.safetensors", "loras": f"{lora}: 1", "output_name": "merged denoiser"}
    name, _ = texts(server.run(tool("MergeIntoCheckpoint", **merge, save_precision="same")))
    found = load_file(folder / "diffusion_models" / name)
    assert found.keys() == tuned.keys()
    assert all((found[k] - tuned[k]).abs().max() < 1e-5 for k in tuned)


def test_merged_loras_draw_as_both(server: Comfy, folder: Path) -> None:
    merge = {"loras": f"{LORA}: 0.2\n{LORA}: 0.1", "output_name": "both", "method": "concat", "rank": 0}
    name, report = texts(server.run(tool("MergeLoRAs", **merge)))
    assert "2 LoRAs" in report
    assert np.abs(picture(server, at(name, 1.0), "both") - picture(server, at(LORA, 0.3), "both")).max() <= 2


@pytest.mark.parametrize("naming", NAMING)
def test_comfyui_reads_what_is_converted(server: Comfy, folder: Path, naming: str) -> None:
    convert = {"lora_name": LORA, "naming": "diffusers", "output_name": f"for {naming}"}
    name, _ = texts(server.run(tool("ConvertLoRA", **convert)))
    assert any(key.startswith("unet.") for key in load_file(folder / "loras" / name))
    convert = {"lora_name": name, "naming": naming, "output_name": f"as {naming}"}
    name, _ = texts(server.run(tool("ConvertLoRA", **convert)))
    keys = list(load_file(folder / "loras" / name))
    assert any(key.startswith(NAMING[naming]) for key in keys)
    before = len(server.log)
    assert np.abs(picture(server, at(name, 0.3), "as") - picture(server, at(LORA, 0.3), "as")).max() <= 2
    assert "not loaded" not in server.log[before:]


def test_check_and_metadata(server: Comfy, folder: Path) -> None:
    good, report = texts(server.run(tool("CheckLoRA", lora_name=LORA)))
    assert good == "True" and "every module was trained" in report and "mean(abs)" in report
    assert texts(server.run(tool("CheckLoRA", lora_name=LORA, clip_skip=2)))[0] == "False"
    told, _ = texts(server.run(tool("LoRAMetadata", lora_name=LORA, changes="", output_name="")))
    assert json.loads(told) == {"ss_clip_skip": "1"}
    changes = "title: A: b\ntrigger_phrase: zibu"
    edit = tool("LoRAMetadata", lora_name=LORA, changes=changes, output_name="told")
    edit["picture"] = prompts.node("EmptyImage", width=300, height=200, batch_size=1, color=255)
    edit["tool"]["inputs"]["thumbnail"] = ["picture", 0]
    told, words = texts(server.run(edit))
    assert words == "zibu"
    found = api.lora_metadata(folder / "loras" / "told.safetensors")
    assert found == json.loads(told) and found["modelspec.title"] == "A: b"
    assert found["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert "LG-TOOL-004" in refused(
        server, tool("LoRAMetadata", lora_name=LORA, changes=changes, output_name="")
    )
    assert "LG-TOOL-014" in refused(server, tool("LoRAMetadata", lora_name=LORA, changes="x", output_name=""))


def test_a_checkpoint_to_a_folder_and_back(server: Comfy, folder: Path) -> None:
    graph = tool("ConvertCheckpoint", model="demo.safetensors", output_name="demo folder")
    del graph["second"]
    made = server.run(graph)["first"]["text"][0]
    assert made == "diffusers/demo folder"
    assert (folder / made / "model_index.json").is_file()
    graph = tool("ConvertCheckpoint", model="demo folder", output_name="back")
    del graph["second"]
    server.run(graph)
    first, second = (load_file(folder / "checkpoints" / f"{name}.safetensors") for name in ("demo", "back"))
    assert set(first) == set(second) and all((first[k] == second[k]).all() for k in first)


@pytest.mark.parametrize(
    ("name", "inputs", "code"),
    [
        (
            "ResizeLoRA",
            {"lora_name": "none.safetensors", "rank": 4, "method": "fixed", "parameter": 1.0},
            "LG-TOOL-018",
        ),
        (
            "ResizeLoRA",
            {"lora_name": "../x.safetensors", "rank": 4, "method": "fixed", "parameter": 1.0},
            "LG-PATH-002",
        ),
        ("CheckLoRA", {"lora_name": ""}, "LG-TOOL-018"),
        ("MergeLoRAs", {"loras": f"{LORA}: x", "method": "concat", "rank": 0}, "LG-TOOL-016"),
        ("MergeLoRAs", {"loras": f"{LORA}: 1", "method": "concat", "rank": 0}, "LG-TOOL-005"),
        ("MergeIntoCheckpoint", {"checkpoint": "/etc/x.safetensors", "loras": LORA}, "LG-PATH-002"),
        ("ConvertLoRA", {"lora_name": LORA, "naming": "kohya", "output_name": "a/b"}, "LG-PATH-001"),
        ("ConvertCheckpoint", {"model": "../../etc"}, "LG-PATH-002"),
    ],
)
def test_refusals(server: Comfy, folder: Path, name: str, inputs: dict[str, Any], code: str) -> None:
    given = {"output_name": "refused", **inputs}
    if name == "CheckLoRA":
        del given["output_name"]
    graph = tool(name, **given)
    if name == "ConvertCheckpoint":
        del graph["second"]
    assert code in refused(server, graph)
    assert not list(folder.rglob("refused*"))


def test_the_nodes_offer_what_there_is(server: Comfy) -> None:
    nodes = server.object_info()
    options = {
        ("ConvertLoRA", "required", "naming"): api.NAMINGS,
        ("ConvertLoRA", "optional", "save_precision"): api.PRECISIONS,
        ("ResizeLoRA", "required", "method"): ("fixed", "sv_ratio", "sv_fro", "sv_cumulative"),
    }
    for (node, group, widget), wanted in options.items():
        assert nodes[f"LoraGraft{node}"]["input"][group][widget][1]["options"] == list(wanted)
