"""Draw the pictures of the README and the example workflows' thumbnails from the real page.

    make screenshots COMFYUI_PATH=/path/to/ComfyUI

Writes docs/images/*.jpg, docs/images/grid.png and example_workflows/*.jpg; pictures of the training in both
renderers go to output/screenshots. Trains the demo LoRA twice,
once in each renderer, and what the other examples train; that takes a while.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 300_000
MARGIN = 24
LOADERS = {  # of what only a user has, and the folders below models that they read
    "CheckpointLoaderSimple": "checkpoints",
    "UNETLoader": "diffusion_models",
    "DualCLIPLoader": "text_encoders",
    "TripleCLIPLoader": "text_encoders",
    "VAELoader": "vae",
}
# Where no part of the page's own frame lies over the canvas.
LEFT, TOP, RIGHT, BOTTOM = 110, 200, 60, 110
QUIET = {
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Workflow.ShowMissingNodesWarning": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
}


def load(name: str) -> Any:
    """Import tests/<name>.py by path, under the name that the tests use."""
    full = "loragraft_tests." + name.replace("/", ".")
    spec = importlib.util.spec_from_file_location(full, ROOT / "tests" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    return module


def save_jpeg(image: Image.Image, path: Path, width: int) -> None:
    """Write the image at this width at most, with the best quality that stays below MAX_BYTES."""
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    for quality in range(92, 40, -4):
        data = io.BytesIO()
        image.convert("RGB").save(data, "jpeg", quality=quality, optimize=True, progressive=True)
        if data.tell() <= MAX_BYTES:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue())
    say(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, {data.tell():,} bytes")


def save_png(image: Image.Image, path: Path) -> None:
    """Write the image as PNG, with 256 colours if it would be larger than MAX_BYTES otherwise."""
    for candidate in (image, image.quantize(256, dither=Image.Dither.NONE)):
        data = io.BytesIO()
        candidate.save(data, "png", optimize=True)
        if data.tell() <= MAX_BYTES:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue())
    say(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, {data.tell():,} bytes")


def say(line: str) -> None:
    """Print one line of progress."""
    print(line, flush=True)


def shoot(page: Any, scale: float = 1.0) -> Image.Image:
    """Return a picture of the whole graph, without the page's own frame."""
    rect = page.ask("place(a[0], a[1], a[2])", scale, LEFT, TOP)
    page.raw.set_viewport_size(
        {"width": round(LEFT + rect["width"] + RIGHT), "height": round(TOP + rect["height"] + BOTTOM)}
    )
    rect = page.ask("place(a[0], a[1], a[2])", scale, LEFT, TOP)
    page.raw.mouse.move(LEFT - MARGIN - 20, TOP + 300)
    clip = {k: rect[k] - MARGIN for k in ("x", "y")} | {k: rect[k] + 2 * MARGIN for k in ("width", "height")}
    return Image.open(io.BytesIO(page.raw.screenshot(clip=clip)))


def part(page: Any, selector: str) -> Image.Image:
    """Return a picture of one element."""
    return Image.open(io.BytesIO(page.raw.locator(selector).first.screenshot()))


def train_demo(page: Any, graph: dict[str, Any], seed: int, at_half: Callable[[], None]) -> dict[str, Any]:
    """Run the demo graph; call ``at_half`` in the middle of the training; return the grid's image."""
    page.load(graph)
    (train,), (preview,) = (page.ask("find(a[0])", f"LoraGraft{n}") for n in ("TrainLoRA", "PreviewWithLoRA"))
    page.ask("put(a[0], a[1])", train, {"seed": seed})
    page.frame()
    page.queue()
    page.wait("halfway(a[0])", train, timeout_s=1800)
    at_half()
    page.wait("phase(a[0]) === 'done'", train, timeout_s=1800)
    page.wait("hasImages(a[0])", preview, timeout_s=1800)
    page.wait("idle()", timeout_s=60)
    page.frame()
    page.wait("showsImages(a[0]) && probe.showsImages(a[1])", train, preview)
    grid: dict[str, Any] = page.ask("app.nodeOutputs[a[0]].images[0]", preview)
    return grid


def runs_here(workflow: dict[str, Any], *, training: bool) -> bool:
    """Say whether a workflow needs nothing of a user's, and no training unless that is wanted."""
    types = {node["type"] for node in workflow["nodes"]}
    return types.isdisjoint(LOADERS) and (training or "LoraGraftTrainLoRA" not in types)


def run_graph(page: Any, graph: dict[str, Any]) -> None:
    """Run a graph to its end, and wait until all its pictures are drawn."""
    page.load(graph)
    page.frame()
    page.queue()
    while not page.ask("idle()"):
        page.raw.wait_for_timeout(1000)
    page.frame()
    for node in page.ask("app.rootGraph.nodes.map(n => n.id).filter(id => probe.hasImages(id))"):
        page.wait("showsImages(a[0])", node)


def shoot_examples(page: Any, examples: Path, images: Path, *, training: bool) -> None:
    """Make the thumbnails of all example workflows but the demo, run as far as they can."""
    for file in sorted(examples.glob("*.json")):
        workflow = json.loads(file.read_text("utf-8"))
        if file.stem == "LoraGraft Demo":
            continue
        if file.stem == "LoraGraft Sweep" and training:
            train_demo(page, workflow, 42, lambda: None)
        elif runs_here(workflow, training=training):
            run_graph(page, workflow)
        else:
            page.load(workflow)
        if file.stem == "LoraGraft Dataset":
            save_jpeg(shoot(page), images / "dataset.jpg", 1600)
        save_jpeg(shoot(page), file.with_suffix(".jpg"), 1280)


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"))
    parser.add_argument("--without-training", action="store_true", help="only what needs no training")
    arguments = parser.parse_args()
    comfyui = arguments.comfyui
    if not comfyui:
        sys.exit("Where is ComfyUI? Set COMFYUI_PATH, or pass --comfyui FOLDER.")
    harness, pages = load("comfyui/harness"), load("browser/page")
    if reason := harness.cannot_run():
        sys.exit(reason)
    examples, images, extra = ROOT / "example_workflows", ROOT / "docs/images", ROOT / "output/screenshots"
    demo = json.loads((examples / "LoraGraft Demo.json").read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder, pages.browser() as chromium:
        base = Path(folder)
        for graph in examples.glob("*.json"):  # so that the graphs look as they do where the model is there
            for node in json.loads(graph.read_text("utf-8"))["nodes"]:
                for name in (v for v in node["widgets_values"] if str(v).endswith(".safetensors")):
                    if node["type"] in LOADERS:
                        file = base / "models" / LOADERS[node["type"]] / name
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.touch()
        with harness.Comfy.start(Path(comfyui), base, ROOT) as server:
            for nodes2 in (False, True):
                name = "nodes2" if nodes2 else "classic"
                server.request("POST", "/settings", QUIET)
                with pages.open_page(chromium, server, nodes2=nodes2, scale=1.5) as page:

                    def at_half(page: Any = page, name: str = name) -> None:
                        save_jpeg(shoot(page), extra / f"training-{name}.jpg", 1600)
                        save_jpeg(part(page, ".loragraft-panel"), extra / f"panel-{name}.jpg", 900)

                    if not arguments.without_training:
                        grid = train_demo(page, demo, 42 + nodes2, at_half)
                        save_jpeg(shoot(page), extra / f"graph-{name}.jpg", 1600)
                    if nodes2:
                        continue
                    if not arguments.without_training:
                        save_jpeg(shoot(page), images / "graph.jpg", 1600)
                        save_jpeg(shoot(page), examples / "LoraGraft Demo.jpg", 1280)
                        save_png(Image.open(io.BytesIO(server.view(grid))), images / "grid.png")
                    shoot_examples(page, examples, images, training=not arguments.without_training)


if __name__ == "__main__":
    main()
