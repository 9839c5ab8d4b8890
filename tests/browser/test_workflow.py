"""The example workflow in the real page, trained for real: live, cancelled, continued, kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loragraft_tests.browser.conftest import Open
from loragraft_tests.browser.page import Page

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "example_workflows" / "LoraGraft Demo.json"
TRAIN, PREVIEW = "LoraGraftTrainLoRA", "LoraGraftPreviewWithLoRA"

pytestmark = pytest.mark.usefixtures("demo_base")


def workflow() -> dict[str, Any]:
    """Return the demo workflow in UI format."""
    found: dict[str, Any] = json.loads(DEMO.read_text("utf-8"))
    return found


def open_demo(page: Page, name: str, steps: int) -> tuple[str, str]:
    """Open the demo workflow with a quick run; return Train LoRA's and the preview's node id."""
    page.load(workflow())
    (train,), (preview,) = page.ask("find(a[0])", TRAIN), page.ask("find(a[0])", PREVIEW)
    quick = {
        "output_name": name,
        "max_train_steps": steps,
        "save_every_n_steps": steps // 2,
        "preview_image": False,
    }
    page.ask("put(a[0], a[1])", train, quick)
    page.ask(
        "put(a[0], a[1])", preview, {"prompts": "zogi, large, blue background", "seeds": "1", "steps": 4}
    )
    page.frame()
    return train, preview


@pytest.mark.parametrize("nodes2", [False, True], ids=["canvas", "nodes2"])
def test_the_demo_runs_live_and_is_kept(open_comfy: Open, nodes2: bool) -> None:
    steps = 24
    with open_comfy(nodes2=nodes2) as page:
        train, preview = open_demo(page, f"live_{nodes2}".lower(), steps)
        page.queue()
        page.wait("phase(a[0]) === 'training' && probe.points(a[0]) >= 2", train, timeout_s=180)
        page.shoot(f"demo-training-{nodes2}")
        page.wait("phase(a[0]) === 'done'", train, timeout_s=180)
        page.wait("points(a[0]) === a[1]", train, steps)
        page.wait("saves(a[0]) === 2 && probe.samples(a[0]) >= 1", train)
        page.wait("hasImages(a[0])", preview, timeout_s=180)
        page.frame()
        page.wait("showsImages(a[0])", preview)
        page.shoot(f"demo-done-{nodes2}")
        shown = page.ask("text(a[0])", train)
        assert f"live_{nodes2}.safetensors".lower() in shown and f"Step {steps} / {steps}" in shown
        assert page.our_errors() == [] and page.dialogs == []

        page.reload()
        page.wait("node(a[0])?.type === a[1]", train, TRAIN)
        page.frame()
        page.wait("phase(a[0]) === 'done' && probe.points(a[0]) === a[1]", train, steps)
        page.wait("samples(a[0]) >= 1", train)

        page.queue()  # nothing changed: ComfyUI answers from its cache
        page.wait("idle()", timeout_s=120)
        assert page.ask("phase(a[0])", train) == "done"

    with open_comfy(nodes2=nodes2) as page:  # another browser: the server's history tells
        train, _ = open_demo(page, f"live_{nodes2}".lower(), steps)
        page.wait("phase(a[0]) === 'done' && probe.points(a[0]) === a[1]", train, steps)


def test_a_sweep_runs_live_and_is_kept(open_comfy: Open) -> None:
    with open_comfy() as page:
        page.load(json.loads((ROOT / "example_workflows" / "LoraGraft Sweep.json").read_text("utf-8")))
        (train,), (preview,) = page.ask("find(a[0])", TRAIN), page.ask("find(a[0])", PREVIEW)
        page.ask("put(a[0], a[1])", train, {"output_name": "live_sweep", "max_train_steps": 12})
        page.ask("put(a[0], a[1])", preview, {"steps": 4})
        page.frame()
        page.queue()
        page.wait("phase(a[0]) === 'training' && probe.lines(a[0]) === 4", train, timeout_s=180)
        page.wait("phase(a[0]) === 'done'", train, timeout_s=180)
        page.wait("hasImages(a[0])", preview, timeout_s=180)
        rows = page.ask("lanes(a[0])", train)
        assert [row["phase"] for row in rows] == ["done"] * 4
        assert rows[3]["label"] == "learning_rate 3e-3, network_dim 32, network_alpha 32"
        assert "Step 48 / 48" in page.ask("text(a[0])", train)
        page.wait("idle()", timeout_s=60)
        page.frame()
        page.wait("showsImages(a[0])", preview)
        page.shoot("sweep-done")
        assert page.our_errors() == [] and page.dialogs == []
    with open_comfy() as page:  # another browser: the server's history tells
        page.load(json.loads((ROOT / "example_workflows" / "LoraGraft Sweep.json").read_text("utf-8")))
        page.frame()
        page.wait("phase(a[0]) === 'done' && probe.lines(a[0]) === 4", train)


def test_cancel_and_continue(open_comfy: Open) -> None:
    with open_comfy() as page:
        train, _ = open_demo(page, "cancelled", 2000)
        page.queue()
        page.wait("points(a[0]) >= 5", train, timeout_s=180)
        page.ask("api.interrupt(null)")
        page.wait("phase(a[0]) === 'stopped'", train, timeout_s=60)
        page.shoot("demo-stopped")
        kept = page.ask("points(a[0])", train)
        page.queue()
        page.wait("points(a[0]) >= a[1]", train, kept + 3, timeout_s=180)
        assert page.ask("phase(a[0])", train) == "training"
        page.ask("api.interrupt(null)")
        page.wait("phase(a[0]) === 'stopped'", train, timeout_s=60)
        page.wait("idle()")


def test_an_error_is_shown_on_the_node(open_comfy: Open) -> None:
    with open_comfy() as page:
        train, _ = open_demo(page, "failing", 4)
        page.ask("put(a[0], a[1])", train, {"conv_alpha": 1.0})  # without conv_dim
        page.queue()
        page.wait("phase(a[0]) === 'failed'", train, timeout_s=120)
        shown = page.ask("part(a[0], 'hint')", train)
        assert shown.startswith("LG-CFG-004") and "Fix:" in shown
        page.shoot("demo-failed")


@pytest.mark.parametrize("nodes2", [False, True], ids=["canvas", "nodes2"])
def test_every_example_opens_without_missing_parts(open_comfy: Open, nodes2: bool) -> None:
    crowded: dict[str, list[Any]] = {}
    with open_comfy(nodes2=nodes2) as page:
        for file in sorted((ROOT / "example_workflows").glob("*.json")):
            graph = json.loads(file.read_text("utf-8"))
            page.load(graph)
            unknown = page.ask("unknown()")
            assert unknown == [], file.name
            page.frame()
            nodes = page.ask("app.rootGraph.nodes.map(n => [`${n.id} ${n.title}`, ...n.getBounding()])")
            frames = page.ask("app.rootGraph.groups.map(g => [g.title, ...g._bounding])")
            crowded |= {file.stem: [*overlaps(nodes), *overlaps(frames), *straddlers(nodes, frames)]}
            assert (file.with_suffix(".jpg")).is_file(), f"{file.name} has no thumbnail"
        assert page.our_errors() == [] and page.dialogs == []
    assert not any(crowded.values()), crowded


def overlaps(boxes: list[Any]) -> list[Any]:
    """List the pairs of boxes [name, left, top, width, height] that share some of their area."""
    return [(a[0], b[0]) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if meet(a, b)]


def straddlers(nodes: list[Any], frames: list[Any]) -> list[Any]:
    """List the nodes that lie in a frame with a part of them only."""
    return [(n[0], f[0]) for n in nodes for f in frames if meet(n, f) and not within(n, f)]


def meet(a: list[Any], b: list[Any]) -> bool:
    """Say whether two boxes share some of their area."""
    return all(a[k] < b[k] + b[k + 2] and b[k] < a[k] + a[k + 2] for k in (1, 2))


def within(a: list[Any], b: list[Any]) -> bool:
    """Say whether the first box lies in the second."""
    return all(b[k] <= a[k] and a[k] + a[k + 2] <= b[k] + b[k + 2] for k in (1, 2))
