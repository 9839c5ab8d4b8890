"""Cancel keeps the work; queueing again ends with the very bytes of a run that never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy, on_gpu

STEPS = 12


def run_folder(server: Comfy, name: str) -> Path:
    return next((server.base / "output/loragraft").glob(f"{name}-*"))


def saved_steps(server: Comfy, name: str) -> list[int]:
    return sorted(int(f.name[5:]) for f in (run_folder(server, name) / "ckpt").glob("step-??????"))


def cancel_at(server: Comfy, prompt: prompts.Prompt, kind: str) -> tuple[dict[str, Any], int]:
    """Queue, press Cancel at the first event of this kind; return the history entry and that event's step."""
    begun = server.mark()
    prompt_id = server.queue(prompt)
    event = server.wait_event(
        lambda e: e["type"] == "loragraft.train" and e["data"]["kind"] == kind, since=begun
    )
    server.interrupt()
    entry = server.wait(prompt_id, timeout_s=60)
    assert any(m == "execution_interrupted" for m, _ in entry["status"]["messages"]), entry["status"]
    return entry, event["data"].get("step", 0)


@pytest.mark.parametrize("kind", ["step", "sample", "save"])
def test_cancel_keeps_the_work_and_the_next_queueing_ends_in_the_same_bytes(server: Comfy, kind: str) -> None:
    name = f"stopped_{kind}"
    settings: dict[str, Any] = {
        "output_name": name,
        "max_train_steps": STEPS,
        "sample_prompts": "a creature" if kind == "sample" else "",
        "save_every_n_steps": 4 if kind != "step" else 0,
        "seed": 21,
        "lr_scheduler": "cosine",
        "deterministic": on_gpu(),
    }
    prompt = prompts.train_prompt(**settings)
    file = server.base / "models/loras" / f"{name}.safetensors"
    _, step = cancel_at(server, prompt, kind)
    assert not file.exists(), "the run was finished before Cancel"
    last = saved_steps(server, name)[-1]
    assert step <= last <= step + 2, "Cancel stops within a step and saves it"

    outputs = server.run(prompt)
    continued = file.read_bytes()
    assert outputs["train"]["loragraft"][0]["step"] == STEPS
    assert f"continues at step {last}" in " ".join(outputs["train"]["loragraft"][0]["lines"])

    afresh = prompts.train_prompt(**settings, existing_run="start afresh")
    outputs = server.run(afresh)
    assert "starts at step 0" in " ".join(outputs["train"]["loragraft"][0]["lines"])
    assert not outputs["train"]["loragraft"][0]["reused"]
    assert file.read_bytes() == continued


def test_cancel_while_encoding_leaves_nothing_broken(server: Comfy) -> None:
    name = "stopped_cache"
    prompt = prompts.train_prompt(output_name=name, max_train_steps=2, seed=22)
    prompt["build"]["inputs"]["resolution"] = 128  # nothing of this size is in the cache yet
    _, _ = cancel_at(server, prompt, "plan")
    assert server.run(prompt)["train"]["loragraft"][0]["step"] == 2


def test_memory_and_files_are_given_back(server: Comfy) -> None:
    """After a warm-up, stopped and finished runs leave no tensors, no gradients and no open files behind."""

    def measure(tag: str) -> dict[str, int]:
        return prompts.answer(server.run({"memory": prompts.node("ProbeMemory", tag=tag)}), "memory")

    def once(seed: int) -> None:
        prompt = prompts.train_prompt(output_name="memory", max_train_steps=6, seed=seed)
        cancel_at(server, prompt, "step")
        server.run(prompt)

    once(31)
    before = measure("before")
    once(32)
    once(33)
    after = measure("after")
    assert after["needing_grad"] == before["needing_grad"], (
        "the host has such weights itself; training adds none"
    )
    assert after["tensor_bytes"] - before["tensor_bytes"] < 2 * 2**20
    assert after["files"] <= before["files"] + 2, (before, after)
