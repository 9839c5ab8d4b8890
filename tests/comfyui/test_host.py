"""Training leaves the host as it was, works on its very weights, and gives what the command line gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer import api
from loragraft_tests.comfyui import headless, prompts
from loragraft_tests.comfyui.harness import Comfy, on_gpu

BASE: dict[str, Any] = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2]}


def test_the_very_weights_are_shared(server: Comfy) -> None:
    graph = {
        "base": prompts.node("LoraGraftLoadDemoBase"),
        "share": prompts.node("ProbeShare", **BASE, tag="1"),
    }
    report = prompts.answer(server.run(graph), "share")
    assert report["host_inference"], "the host's weights are inference tensors, or this test shows nothing"
    assert report["count"] > 600
    assert report["copied"] == [] and report["inference"] == []
    assert report["hash"] == api.open_demo_base().weights_hash
    assert report["name"] == api.open_demo_base().name
    assert Path(report["tokenizers"]["clip"]).resolve() == api.demo_tokenizer().resolve()


@pytest.mark.skipif(on_gpu(), reason="compares in float32; on a GPU the host computes in half precision")
def test_the_trainer_computes_what_the_host_computes(server: Comfy) -> None:
    graph = {
        "base": prompts.node("LoraGraftLoadDemoBase"),
        "forward": prompts.node("ProbeForward", **BASE, text="large red circle, white background"),
    }
    report = prompts.answer(server.run(graph), "forward")
    assert report["tokens"], "the same words must become the same tokens"
    assert max(report["denoiser"], report["vae"], report["text"]) < 1e-4, report


def test_the_hash_is_that_of_the_plain_weights_while_a_lora_is_loaded(server: Comfy) -> None:
    """ComfyUI bakes a LoRA into the shared modules and leaves it there after the graph has ended."""
    outputs = server.run(
        prompts.train_prompt(output_name="baked", max_train_steps=2, seed=41, learning_rate=0.01)
    )
    assert not outputs["train"]["loragraft"][0]["reused"]
    lora = {"lora_name": "baked.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
    server.run(prompts.native_prompt(lora, prefix="baked"))
    graph = {
        "base": prompts.node("LoraGraftLoadDemoBase"),
        "share": prompts.node("ProbeShare", **BASE, tag="2"),
    }
    assert prompts.answer(server.run(graph), "share")["hash"] == api.open_demo_base().weights_hash


def test_nothing_of_the_host_is_changed(server: Comfy) -> None:
    def look(tag: str, **more: Any) -> dict[str, Any]:
        graph = {
            "base": prompts.node("LoraGraftLoadDemoBase"),
            "look": prompts.node("ProbeHost", **BASE, tag=tag),
        }
        return prompts.answer(server.run({**graph, **more}), "look")

    def train(**settings: Any) -> None:
        server.run(prompts.train_prompt(output_name="hygiene", max_train_steps=3, **settings))

    train(seed=50, sample_prompts="a creature")  # a warm-up: libraries set themselves up once
    before = look("before")
    assert before["inference_mode"] and not before["grad"]
    train(seed=51, sample_prompts="a creature", gradient_checkpointing=True)
    train(seed=52, mixed_precision="bf16", network_train_unet_only=True, conv_dim=2)
    failed = prompts.train_prompt(output_name="hygiene", max_train_steps=3, seed=53, learning_rate=10.0)
    failed["build"]["inputs"]["resolution"] = 72
    assert server.wait(server.queue(failed))["status"]["status_str"] == "error"
    after = look("after")
    assert after == before


def test_an_image_of_the_same_seed_is_the_same_after_training(server: Comfy) -> None:
    def draw(prefix: str) -> bytes:
        outputs = server.run(prompts.native_prompt(None, prefix=prefix, seeds="77"))
        return (server.base / "output" / outputs["save"]["images"][0]["filename"]).read_bytes()[-2000:]

    first = draw("before")
    server.run(prompts.train_prompt(output_name="same_image", max_train_steps=2, seed=54))
    assert draw("after") == first


@pytest.mark.skipif(on_gpu(), reason="the command line trains on the CPU here")
def test_the_graph_and_the_command_line_give_the_same(server: Comfy, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "output_name": "both_ways",
        "max_train_steps": 5,
        "seed": 61,
        "shuffle_caption": False,
        "conv_dim": 2,
        "conv_alpha": 1.0,
        "text_encoder_lr": 5e-4,
        "lr_scheduler": "cosine",
        "min_snr_gamma": 5.0,
    }
    build = {"shuffle_caption": True, "keep_tokens": 1, "caption_dropout_rate": 0.1}
    train = {k: v for k, v in settings.items() if k != "shuffle_caption"}
    graph = prompts.train_prompt(**train)
    graph["build"]["inputs"] |= build
    workflow = {"id": "both", "nodes": [], "links": []}
    server.run(graph, workflow)

    loras = headless.train(tmp_path, "demo", {**build, **train})
    assert (
        headless.assert_same_file(
            server.base / "models/loras/both_ways.safetensors", loras / "both_ways.safetensors"
        )
        > 400
    )
