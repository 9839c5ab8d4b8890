"""Several LoRAs from one queueing: their files, their grid, what ComfyUI keeps, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from loragraft.trainer import api
from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy, error_text

SWEEP = "learning_rate: 1e-4, 2e-3\nnetwork_dim: 2, 4 / network_alpha: 2, 4"


def names(start: str) -> list[str]:
    """Return the files of SWEEP in its runs' order."""
    values = [
        f"learning_rate{rate}_network_dim{d}_network_alpha{d}" for rate in ("1e-4", "2e-3") for d in (2, 4)
    ]
    return [f"{start}_{value}.safetensors" for value in values]


def graph(
    name: str, sweep: str = SWEEP, preview: dict[str, Any] | None = None, **train: Any
) -> prompts.Prompt:
    """Return Sweep, Train LoRA and Preview with LoRA, with probes of what flows between them."""
    made = prompts.demo_prompt({"output_name": name, "max_train_steps": 3, **train}, preview or {})
    made["sweep"] = prompts.node("LoraGraftSweep", sweep=sweep)
    made["train"]["inputs"]["sweep"] = ["sweep", 0]
    for show, output in (("names", 4), ("words", 5), ("losses", 3), ("checkpoints", 6)):
        made[show] = prompts.node("PreviewAny", source=["train", output])
    return made


@pytest.fixture(scope="module")
def swept(server: Comfy) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Run a sweep once: its outputs, its events and the log."""
    begun, before = server.mark(), len(server.log)
    prompt = graph("swept", sample_prompts="zogi", preview={"strengths": "0, 1", "steps": 2})
    prompt["cells"] = prompts.node("SaveImage", images=["preview", 1], filename_prefix="swept")
    outputs = server.run(prompt)
    return outputs, server.events(since=begun), server.log[before:]


def test_every_run_gives_a_file(server: Comfy, swept: Any) -> None:
    outputs, _, log = swept
    done = outputs["train"]["loragraft"][0]
    assert [run["file"] for run in done["runs"]] == names("swept")
    assert outputs["names"]["text"] == ["\n".join(names("swept"))]
    assert outputs["words"]["text"] == [done["trigger"]] != [""]
    assert outputs["checkpoints"]["text"][0] in ("()", "[]")
    for name, (rate, dim) in zip(names("swept"), [(1e-4, 2), (1e-4, 4), (2e-3, 2), (2e-3, 4)], strict=True):
        metadata = api.lora_metadata(server.base / "models/loras" / name)
        assert (metadata["ss_learning_rate"], metadata["ss_network_dim"]) == (str(rate), str(dim))
    assert len(outputs["train"]["images"]) == 4, "a sample of each run"
    assert "not loaded" not in log.lower()


def test_a_run_of_a_sweep_learns_what_it_learns_alone(server: Comfy, swept: Any) -> None:
    alone = prompts.train_prompt(
        output_name="swept_alone", max_train_steps=3, network_dim=4, network_alpha=4.0, learning_rate=2e-3
    )
    server.run(alone)
    loras = server.base / "models/loras"
    ours, theirs = (api.lora_tensors(loras / n) for n in (names("swept")[3], "swept_alone.safetensors"))
    assert ours.keys() == theirs.keys()
    off = sum((ours[k].float() - theirs[k].float()).square().sum() for k in ours).sqrt()
    assert off <= 0.02 * sum(v.float().square().sum() for k, v in theirs.items() if "alpha" not in k).sqrt()
    run = api.lora_metadata(loras / names("swept")[3])["loragraft_run"]
    assert run == api.lora_metadata(loras / "swept_alone.safetensors")["loragraft_run"]


def test_the_grid_has_a_row_for_each_file_and_one_without(swept: Any) -> None:
    outputs, _, _ = swept
    rows = outputs["preview"]["loragraft"][0]["rows"]
    assert [row["lora"] for row in rows] == [None, *names("swept")]
    labels = [row["label"].split("\n")[0] for row in rows]
    assert labels == [
        "without LoRA",
        *(n.removeprefix("swept_").removesuffix(".safetensors") for n in names("swept")),
    ]
    assert len(outputs["cells"]["images"]) == 5
    assert outputs["preview"]["images"][0]["filename"].startswith("swept_"), (
        "named after what the files share"
    )


def test_each_row_is_what_its_file_alone_draws(server: Comfy, swept: Any) -> None:
    outputs, _, _ = swept
    last = names("swept")[3]
    one = {
        "base": prompts.node("LoraGraftLoadDemoBase"),
        "preview": prompts.preview_node(lora_name=last, strengths="1", steps=2),
        "cells": prompts.node("SaveImage", images=["preview", 1], filename_prefix="one"),
    }
    alone = server.run(one)["cells"]["images"]
    assert pixels(server, alone[0]) == pixels(server, outputs["cells"]["images"][4])
    assert pixels(server, alone[0]) != pixels(server, outputs["cells"]["images"][0])


def pixels(server: Comfy, image: dict[str, str]) -> bytes:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(server.view(image))).tobytes()


def test_the_browser_is_told_of_each_run(swept: Any) -> None:
    outputs, events, _ = swept
    told = [e["data"] for e in events if e["type"] == "loragraft.train"]
    assert told[0]["kind"] == "sweep" and len(told[0]["runs"]) == 4
    steps = [(s["run"], s["step"]) for m in told if m["kind"] == "step" for s in m["steps"]]
    assert sorted(steps) == [(run, step) for run in range(4) for step in (1, 2, 3)]
    assert sorted(m["run"] for m in told if m["kind"] == "finished") == [0, 1, 2, 3]
    assert told[-1]["kind"] == "done" and told[-1]["runs"] == outputs["train"]["loragraft"][0]["runs"]
    bar = [e["data"] for e in events if e["type"] == "progress" and e["data"]["node"] == "train"]
    assert (bar[-1]["value"], bar[-1]["max"]) == (12, 12)


def test_queueing_again_and_cancelling_lose_nothing(server: Comfy) -> None:
    prompt = graph("swept_stop", max_train_steps=40, seed=81)
    del prompt["preview"]
    begun = server.mark()
    prompt_id = server.queue(prompt)
    server.wait_event(lambda e: e["type"] == "loragraft.train" and e["data"]["kind"] == "step", since=begun)
    server.interrupt()
    entry = server.wait(prompt_id)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    folders = list((server.base / "output/loragraft").glob("swept_stop_*"))
    stopped = [sorted(f.name for f in (folder / "ckpt").glob("step-??????"))[-1] for folder in folders]
    assert len(folders) == 4 and max(stopped) < "step-000040"
    done = server.run(prompt)["train"]["loragraft"][0]
    assert "continues at step" in " ".join(done["lines"])
    assert [(run["step"], len(run["losses"])) for run in done["runs"]] == [(40, 40)] * 4

    more = graph("swept_stop", SWEEP.replace("2e-3", "2e-3, 4e-3"), max_train_steps=40, seed=81)
    del more["preview"]
    done = server.run(more)["train"]["loragraft"][0]
    assert [run.get("reused") for run in done["runs"]] == [True] * 4 + [False] * 2, (
        "only the new value is trained"
    )


def test_failed_runs_are_named_and_the_others_handed_on(server: Comfy) -> None:
    # Such a rate at such a scale lets this tiny base's loss explode, also when it begins again at half of it.
    sweep = "learning_rate: 1e-4, 0.9 / network_alpha: 4, 4096"
    prompt = graph("swept_fail", sweep, max_train_steps=60, seed=82, preview={"steps": 2, "strengths": "1"})
    outputs = server.run(prompt)
    good, bad = outputs["train"]["loragraft"][0]["runs"]
    assert good["file"] == "swept_fail_learning_rate1e-4_network_alpha4.safetensors"
    assert bad["file"] == "" and bad["error"].startswith("LG-RUN-004")
    assert outputs["names"]["text"] == [good["file"]]
    assert [row["lora"] for row in outputs["preview"]["loragraft"][0]["rows"]] == [good["file"]]
    assert "[swept_fail_learning_rate0.9_network_alpha4096] failed: LG-RUN-004" in server.log
    everything = graph(
        "swept_fail", "learning_rate: 0.8, 0.9", network_alpha=4096.0, max_train_steps=60, seed=82
    )
    entry = server.wait(server.queue(everything))
    assert "LG-SWEEP-005" in error_text(entry) and "LG-RUN-004" in error_text(entry)


@pytest.mark.parametrize(
    ("sweep", "code"),
    [
        ("learning_rat: 1e-4, 3e-4", "LG-CFG-001"),
        ("network_dim: 4, 0", "LG-CFG-003"),
        ("engine: eager, fused", "LG-SWEEP-002"),
        ("learning_rate", "LG-SWEEP-001"),
        ("", "LG-SWEEP-003"),
        ("seed: 1, 1", "LG-SWEEP-004"),
    ],
)
def test_an_unreadable_sweep_is_refused_before_anything_runs(server: Comfy, sweep: str, code: str) -> None:
    status, answer = server.post_prompt(graph("never", sweep))
    problems = [e["details"] for e in answer["node_errors"]["sweep"]["errors"]]
    assert status == 400 or "train" not in answer.get("outputs", {})
    assert any(code in p for p in problems), problems


def test_a_contradiction_with_the_nodes_settings_is_refused_with_the_run(server: Comfy) -> None:
    entry = server.wait(server.queue(graph("never", "conv_alpha: 1, 2")))
    assert "LG-CFG-004" in error_text(entry) and "conv_alpha 1" in error_text(entry)
    assert not list((server.base / "models/loras").glob("never*"))


def test_several_files_that_are_not_all_there_are_refused_by_name(server: Comfy, swept: Any) -> None:
    text = "\n".join([names("swept")[0], "nowhere.safetensors", names("swept")[1]])
    made = {"base": prompts.node("LoraGraftLoadDemoBase"), "preview": prompts.preview_node(lora_name=text)}
    status, answer = server.post_prompt(made)
    problems = str(answer["node_errors"]["preview"]["errors"])
    assert status == 400 and "LG-NODE-016" in problems and "nowhere" in problems


def test_a_changed_file_among_several_is_drawn_anew(server: Comfy, swept: Any) -> None:
    loras = server.base / "models/loras"
    copies = [loras / f"copy{i}.safetensors" for i in (1, 2)]
    for copy, name in zip(copies, names("swept"), strict=False):
        copy.write_bytes((loras / name).read_bytes())
    made = {
        "base": prompts.node("LoraGraftLoadDemoBase"),
        "preview": prompts.preview_node(lora_name="\n".join(c.name for c in copies), steps=1),
    }

    def cached() -> bool:
        entry = server.wait(server.queue(made))
        assert entry["status"]["status_str"] == "success"
        return "preview" in next(
            d["nodes"] for k, d in entry["status"]["messages"] if k == "execution_cached"
        )

    assert not cached() and cached()
    copies[1].write_bytes((loras / names("swept")[3]).read_bytes())
    assert not cached()
