"""What cannot be trained or read is refused in plain words, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy, error_text

ODD = {
    "no_tokenizer": "LG-NODE-008",
    "packed": "LG-NODE-004",
    "meta": "LG-NODE-005",
    "inpaint": "LG-NODE-003",
    "no_clip": "LG-NODE-001",
    "no_vae": "LG-NODE-001",
    "bypass": "LG-NODE-002",
    "clip_layer": "LG-NODE-007",
}


def files_of(server: Comfy) -> set[Path]:
    folders = (server.base / "models/loras", server.base / "output")
    found = {f for folder in folders for f in folder.rglob("*") if f.is_file()}
    return {f for f in found if f.parent.name != "reports"}  # of data sets, which are fine


def refused(server: Comfy, prompt: prompts.Prompt) -> str:
    """Queue the prompt and return its error's text; it must have all five parts, and leave no file."""
    before = files_of(server)
    status, answer = server.post_prompt(prompt)
    if status == 200 and not answer.get("node_errors"):
        entry = server.wait(answer["prompt_id"])
        assert entry["status"]["status_str"] == "error"
        text = error_text(entry)
    else:
        errors = [e for node in answer["node_errors"].values() for e in node["errors"]]
        assert errors and all(e["type"] == "custom_validation_failed" for e in errors), answer
        text = errors[0]["details"]
    for part in ("LG-", "Where:", "Why:", "Fix:"):
        assert part in text, text
    assert max(len(line) for line in text.splitlines()[:1]) <= 140
    assert files_of(server) == before, "something was written"
    return text


@pytest.mark.parametrize(("kind", "code"), ODD.items())
def test_an_odd_base_is_refused(server: Comfy, kind: str, code: str) -> None:
    graph = prompts.train_prompt(output_name="never", max_train_steps=1, seed=71)
    graph["odd"] = prompts.node(
        "ProbeOddModel", model=["base", 0], clip=["base", 1], vae=["base", 2], kind=kind
    )
    graph["train"]["inputs"] |= {"model": ["odd", 0], "clip": ["odd", 1], "vae": ["odd", 2]}
    assert code in refused(server, graph)


def test_a_base_with_a_lora_on_it_is_refused(server: Comfy, demo: Any) -> None:
    for socket in (0, 1):
        graph = prompts.train_prompt(output_name="never", max_train_steps=1, seed=72)
        graph["loader"] = prompts.node(
            "LoraLoader",
            model=["base", 0],
            clip=["base", 1],
            lora_name=demo.file.name,
            strength_model=1.0,
            strength_clip=1.0,
        )
        graph["train"]["inputs"][("model", "clip")[socket]] = ["loader", socket]
        text = refused(server, graph)
        assert "LG-NODE-002" in text and ("MODEL", "CLIP")[socket] in text


def test_a_preview_on_the_trained_model_is_refused(server: Comfy, demo: Any) -> None:
    graph = {**demo.prompt, "preview": prompts.preview_node(model=["train", 1])}
    del graph["cells"]
    text = refused(server, graph)
    assert "LG-NODE-012" in text and demo.file.name in text


WIDGETS = [
    ("train", {"network_dim": 0}, None),
    ("train", {"output_name": "a/b"}, "LG-PATH-001"),
    ("train", {"output_name": "../escape"}, "LG-PATH-001"),
    ("train", {"output_name": "CON"}, "LG-PATH-001"),
    ("train", {"output_name": "new\nline"}, "LG-PATH-001"),
    ("train", {"text_encoder_lr": 1e-4, "network_train_unet_only": True}, "LG-CFG-004"),
    ("train", {"learning_rate": 0.0}, "LG-CFG-004"),
    ("train", {"optimizer_args": "betas"}, "LG-CFG-002"),
    ("build", {"resolution": 72}, "LG-CFG-005"),
    ("build", {"min_bucket_reso": 96}, "LG-CFG-006"),
    ("folder", {"path": "nowhere"}, "LG-PATH-003"),
    ("folder", {"path": "new folder'"}, "LG-PATH-003"),
]


@pytest.mark.parametrize(("name", "inputs", "code"), WIDGETS, ids=[str(w[1]) for w in WIDGETS])
def test_an_impossible_widget_is_refused(
    server: Comfy, name: str, inputs: dict[str, Any], code: str | None
) -> None:
    graph = prompts.train_prompt(output_name="never", max_train_steps=1, seed=73)
    graph[name]["inputs"] |= inputs
    if code is None:  # the host's own check of the widget's range
        _, answer = server.post_prompt(graph)
        assert "value_smaller_than_min" in str(answer["node_errors"][name])
    else:
        assert code in refused(server, graph)


PREVIEW = [
    ({"seeds": "one"}, "LG-NODE-011"),
    ({"seeds": ""}, "LG-NODE-011"),
    ({"seeds": "9-1"}, "LG-NODE-011"),
    ({"strengths": "0.5-"}, "LG-NODE-010"),
    ({"clip_strengths": "half"}, "LG-NODE-010"),
    ({"lora_name": "nowhere.safetensors"}, "LG-NODE-016"),
    ({"lora_name": "model.ckpt"}, "LG-NODE-016"),
    ({"lora_name": "../../secret.safetensors"}, "LG-PATH-002"),
    ({"seeds": "1-300", "strengths": "0, 1"}, "LG-NODE-015"),
    ({"lora_name": ""}, "LG-NODE-016"),
]


@pytest.mark.parametrize(("inputs", "code"), PREVIEW, ids=[str(p[0]) for p in PREVIEW])
def test_an_impossible_preview_is_refused(
    server: Comfy, demo: Any, inputs: dict[str, Any], code: str
) -> None:
    graph = {
        "base": prompts.node("LoraGraftLoadDemoBase"),
        "preview": prompts.preview_node(**{"lora_name": demo.file.name, **inputs}),
    }
    assert code in refused(server, graph)


def test_a_linked_choice_is_checked_when_the_node_runs(server: Comfy, demo: Any) -> None:
    for widget in ("sampler_name", "scheduler"):
        graph = {
            "base": prompts.node("LoraGraftLoadDemoBase"),
            "choice": prompts.node("ProbeChoice", text="eulre"),
            "preview": prompts.preview_node(**{"lora_name": demo.file.name, widget: ["choice", 0]}),
        }
        assert "LG-NODE-014" in refused(server, graph)


def test_a_bad_image_among_good_ones_is_named(server: Comfy) -> None:
    folder = server.base / "input" / "mixed"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"<html>not an image</html>")
    text = refused(server, prompts.train_prompt("mixed", output_name="never", max_train_steps=1))
    assert "bad.png" in text and "good.png" not in text
    graph = prompts.train_prompt("mixed", output_name="skipped_one", max_train_steps=1, seed=74)
    graph["folder"]["inputs"] |= {"on_bad": "skip", "class_tokens": "a face"}
    graph["show"] = prompts.node("PreviewAny", source=["folder", 1])
    outputs = server.run(graph)
    assert "bad.png" in str(outputs["show"]["text"])


def test_an_empty_folder_is_refused(server: Comfy) -> None:
    (server.base / "input" / "empty").mkdir()
    assert "LG-DATA" in refused(server, prompts.train_prompt("empty", output_name="never", max_train_steps=1))


def test_a_lora_of_another_architecture_is_refused(server: Comfy) -> None:
    import torch
    from safetensors.torch import save_file

    names = (
        "lora_unet_joint_blocks_0_context_block_attn_qkv",
        "lora_te2_text_model_encoder_layers_31_mlp_fc1",
    )
    tensors = {f"{n}.lora_{d}.weight": torch.ones(2, 2) for n in names for d in ("up", "down")}
    save_file(tensors, server.base / "models/loras/other_family.safetensors")
    graph = {
        "base": prompts.node("LoraGraftLoadDemoBase"),
        "preview": prompts.preview_node(lora_name="other_family.safetensors", strengths="1"),
    }
    text = refused(server, graph)
    assert "LG-NODE-009" in text and names[0] in text
