"""One ComfyUI server for all host tests of a session, and the demo graph run once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy, cannot_run

PACK = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).resolve().parent / "probe"
TRAINED = "host_demo"  # the LoRA that the demo fixture trains


@dataclass(frozen=True)
class DemoRun:
    """The demo graph's outputs, its events and how long it took."""

    outputs: dict[str, Any]
    events: list[dict[str, Any]]
    prompt: prompts.Prompt
    file: Path


@pytest.fixture(scope="session")
def server(
    comfyui: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Comfy]:
    """Return a running ComfyUI with this pack and the probe pack in it."""
    reason = cannot_run()
    if reason and request.config.getoption("--require-comfyui"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    if not (PACK / "trainer/demo/base/demo_base.safetensors").is_file():
        pytest.skip("the demo base is not there: trainer/demo/base/demo_base.safetensors")
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "probe").symlink_to(PROBE, target_is_directory=True)
    with Comfy.start(comfyui, base, PACK) as running:
        yield running


@pytest.fixture(scope="session")
def demo(server: Comfy) -> DemoRun:
    """Run the demo graph once, from nothing to a grid."""
    prompt = prompts.demo_prompt(
        train={
            "output_name": TRAINED,
            "max_train_steps": 6,
            "save_every_n_steps": 3,
            "sample_prompts": "a creature\na red circle",
        },
        preview={"checkpoints": ["train", 6], "seeds": "3, 4"},
    ) | {"cells": prompts.node("SaveImage", images=["preview", 1], filename_prefix="cells")}
    begun = server.mark()
    outputs = server.run(prompt)
    return DemoRun(
        outputs, server.events(since=begun), prompt, server.base / "models/loras" / f"{TRAINED}.safetensors"
    )
