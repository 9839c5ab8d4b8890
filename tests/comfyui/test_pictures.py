"""Frame Extract, Crop and the bridges in a real ComfyUI, on real videos and a real upscaler."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy, error_text
from loragraft_tests.trainer.data_folders import fill, picture
from loragraft_tests.trainer.videos import encode, scene

FRAMES: dict[str, Any] = {
    "name": "clips",
    "mode": "every_n_frames",
    "every_n_frames": 10,
    "every_n_seconds": 1.0,
    "start": 0.0,
    "end": 0.0,
    "max_frames": 200,
    "skip_blurred": False,
    "skip_similar": False,
    "image_format": "png",
    "recursive": True,
    "class_tokens": "zog",
    "default_repeats": 1,
    "on_bad": "stop",
}
CROP: dict[str, Any] = {"mode": "square", "align": "center", "width": 64, "height": 64}


@pytest.fixture(scope="module")
def videos(server: Comfy) -> Path:
    """Return a folder of two videos below input/."""
    folder = server.base / "input" / "videos"
    frames = [scene(n) for n in range(30)]
    encode(folder / "4_miri" / "b.mkv", frames)
    encode(folder / "a.mp4", frames)
    return folder


@pytest.fixture(scope="module")
def photos(server: Comfy) -> Path:
    """Return a folder of three pictures with captions below input/."""
    folder = server.base / "input" / "photos"
    fill(folder, {"a.png": (96, 64), "b.png": (64, 96), "c.png": (64, 64)})
    fill(folder, {f"{n}.txt": f"words {n}" for n in "abc"})
    return folder


def contents(root: Path) -> dict[str, int]:
    return {p.relative_to(root).as_posix(): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def extract(**settings: Any) -> prompts.Prompt:
    """Return Frame Extract into a training set's report."""
    return {
        "frames": prompts.node("LoraGraftFrameExtract", **{"path": "videos", **FRAMES, **settings}),
        "build": prompts.node("LoraGraftBuildDataset", dataset=["frames", 0], **prompts.BUILD),
        "show": prompts.node("PreviewAny", source=["build", 1]),
        "folder": prompts.node("PreviewAny", source=["frames", 2]),
    }


def load(path: str = "photos") -> prompts.Prompt:
    return {"folder": prompts.dataset_nodes(path)["folder"]}


def report(server: Comfy, graph: prompts.Prompt, source: list[Any]) -> str:
    """Run a graph and return the text that an output gives."""
    shown = server.run({**graph, "shown": prompts.node("PreviewAny", source=source)})
    return str(shown["shown"]["text"][0])


def refused(server: Comfy, graph: prompts.Prompt) -> str:
    """Run a graph that must fail and return its message."""
    return error_text(server.wait(server.queue(graph)))


# ---- frames ----


def test_videos_become_a_training_set_and_a_second_run_touches_nothing(server: Comfy, videos: Path) -> None:
    out = server.base / "output" / "loragraft" / "datasets" / "clips"
    outputs = server.run(extract())
    assert "6 pictures of 2 videos" in outputs["show"]["text"][0]
    assert outputs["folder"]["text"][0] == "loragraft/datasets/clips [output]"
    shown = [Image.open(p).size for p in sorted(out.rglob("*.png"))]
    assert shown == [(96, 64)] * 6
    assert {p.parent.name for p in out.rglob("*.png")} == {"clips", "4_miri"}
    assert len(server.view(outputs["frames"]["images"][0])) > 100
    before = contents(out)

    def cached() -> set[str]:
        entry = server.wait(server.queue(extract()))
        return set(next(d["nodes"] for k, d in entry["status"]["messages"] if k == "execution_cached"))

    assert {"frames", "build"} <= cached()
    encode(videos / "a.mp4", [scene(50 + n) for n in range(20)])
    assert not {"frames", "build"} & cached()
    after = contents(out)
    assert {n for n in after if before.get(n) == after[n] and n.endswith(".png")} == {
        n for n in before if n.startswith("4_miri")
    }
    next(out.glob("a_*.png")).unlink()
    text = report(server, extract(), ["frames", 1])
    assert "Deleted by hand, and left out: 1 picture" in text
    assert {"frames", "build"} <= cached()


def test_the_pictures_can_be_loaded_by_the_folder_that_is_given(server: Comfy, videos: Path) -> None:
    server.run(extract(path="videos/4_miri/b.mkv", name="one"))
    graph = prompts.dataset_nodes("loragraft/datasets/one [output]")
    graph["folder"]["inputs"]["class_tokens"] = "zog"
    assert "3 images" in report(server, graph, ["folder", 1])


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"path": "nowhere"}, "LG-PATH-003"),
        ({"path": "../x"}, "LG-PATH-002"),
        ({"path": "/etc"}, "LG-NODE-020"),
        ({"name": "../../x"}, "LG-PATH-001"),
    ],
)
def test_paths_go_through_the_gate(server: Comfy, videos: Path, settings: dict[str, Any], code: str) -> None:
    status, answer = server.post_prompt(extract(**settings))
    assert status == 400 and code in json.dumps(answer)


def test_a_playlist_is_refused_in_plain_words(server: Comfy) -> None:
    folder = server.base / "input" / "tricks"
    folder.mkdir()
    (folder / "x.mp4").write_text("#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n", "utf-8")
    text = refused(server, extract(path="tricks", name="tricks"))
    assert "LG-DATA-041" in text and "a playlist that names other files" in text


def test_cancel_stops_between_frames_and_leaves_nothing_half_done(server: Comfy, videos: Path) -> None:
    folder = server.base / "input" / "long"
    encode(folder / "long.mp4", [scene(n, (640, 480)) for n in range(400)])
    graph = extract(path="long", name="long", every_n_frames=1, max_frames=0)
    begun = server.mark()
    prompt_id = server.queue(graph)
    server.wait_event(lambda e: e["type"] == "progress" and e["data"]["node"] == "frames", since=begun)
    server.interrupt()
    entry = server.wait(prompt_id)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert not list((server.base / "output/loragraft/datasets/long").rglob("*.png"))


# ---- crop ----


def test_crop_is_an_edit_with_a_preview(server: Comfy, photos: Path) -> None:
    before = contents(photos)
    graph = {
        **load(),
        "crop": prompts.node("LoraGraftCrop", dataset=["folder", 0], **CROP),
        "preview": prompts.node("PreviewImage", images=["crop", 2]),
        "build": prompts.node("LoraGraftBuildDataset", dataset=["crop", 0], **prompts.BUILD),
    }
    outputs = server.run({**graph, "shown": prompts.node("PreviewAny", source=["crop", 3])})
    assert "Cropped (square): 2 of 3 pictures; cut off: 33% to 33%" in outputs["shown"]["text"][0]
    assert contents(photos) == before
    assert len(outputs["crop"]["images"]) == 1 and len(server.view(outputs["preview"]["images"][0])) > 1000
    buckets = report(server, graph, ["build", 1])
    assert "64x64" in buckets and "96" not in buckets.split("caption")[0]


def test_one_box_for_all_and_masks_for_each(server: Comfy, photos: Path) -> None:
    box = {
        **load(),
        "box": prompts.node("PrimitiveBoundingBox", x=0, y=0, width=20, height=20),
        "crop": prompts.node(
            "LoraGraftCrop",
            **{**CROP, "mode": "subject", "dataset": ["folder", 0], "bboxes": ["box", 0]},
            margin=0.5,
            min_side=0,
        ),
    }
    text = report(server, box, ["crop", 3])
    assert "Cropped (subject): 3 of 3 pictures" in text
    assert "The subject touches the edge: a.png (left, top)" in text
    masks = {
        **load(),
        "images": prompts.node(
            "LoraGraftDatasetToImages", dataset=["folder", 0], first=0, count=0, longest_side=32
        ),
        "red": prompts.node("ImageToMask", image=["images", 0], channel="red"),
        "crop": prompts.node(
            "LoraGraftCrop",
            **{**CROP, "mode": "subject", "dataset": ["images", 4], "masks": ["red", 0]},
            margin=0.0,
            min_side=0,
        ),
    }
    text = report(server, masks, ["crop", 3])
    # Red rises from left to right. The bright half is the subject; of the tall picture more than twice as
    # high as wide, so that it is widened.
    assert "Cropped (subject): 3 of 3 pictures; cut off: 25% to 50%" in text
    assert "LG-DATA-057" in refused(
        server,
        {**masks, **box, "crop": _both(masks["crop"])}
        | {"show": prompts.node("PreviewAny", source=["crop", 3])},
    )


def _both(crop: dict[str, Any]) -> dict[str, Any]:
    return {**crop, "inputs": {**crop["inputs"], "bboxes": ["box", 0]}}


def test_refusals_of_crop(server: Comfy, photos: Path) -> None:
    def crop(**inputs: Any) -> str:
        graph = {
            **load(),
            "images": prompts.node(
                "LoraGraftDatasetToImages", dataset=["folder", 0], first=0, count=2, longest_side=0
            ),
            "crop": prompts.node("LoraGraftCrop", **{**CROP, "dataset": ["folder", 0], **inputs}),
            "show": prompts.node("PreviewAny", source=["crop", 3]),
        }
        return refused(server, graph)

    assert "LG-DATA-050" in crop(mode="subject")
    assert "LG-DATA-048" in crop(masks=["images", 1])
    assert "LG-DATA-058" in crop(reg_caption=["images", 2])


def test_the_originals_can_be_trained_as_regularisation(server: Comfy, photos: Path) -> None:
    graph = {
        **load(),
        "crop": prompts.node("LoraGraftCrop", dataset=["folder", 0], reg_caption="girl", **CROP),
        "images": prompts.node(
            "LoraGraftDatasetToImages", dataset=["crop", 1], first=0, count=0, longest_side=0
        ),
        "captions": prompts.node("PreviewAny", source=["images", 2]),
        "names": prompts.node("PreviewAny", source=["images", 3]),
    }
    outputs = server.run(graph)
    assert outputs["captions"]["text"] == ["girl", "girl"]
    assert outputs["names"]["text"] == ["a.png", "b.png"]


# ---- the bridges ----


def test_images_go_through_a_native_node_and_come_back(server: Comfy, photos: Path) -> None:
    out = server.base / "output" / "loragraft" / "datasets" / "inverted"
    graph = {
        **load(),
        "images": prompts.node(
            "LoraGraftDatasetToImages", dataset=["folder", 0], first=1, count=2, longest_side=0
        ),
        "invert": prompts.node("ImageInvert", image=["images", 0]),
        "back": prompts.node(
            "LoraGraftImagesToDataset",
            images=["invert", 0],
            dataset=["images", 4],
            masks=["images", 1],
            name="inverted",
            image_format="png",
        ),
        "build": prompts.node("LoraGraftBuildDataset", dataset=["back", 0], **prompts.BUILD),
        "show": prompts.node("PreviewAny", source=["back", 1]),
    }
    text = server.run(graph)["show"]["text"][0]
    assert "2 written, 0 unchanged" in text
    for name in "bc":
        inverted = 255 - np.asarray(Image.open(photos / f"{name}.png")).astype(int)
        assert abs(np.asarray(Image.open(out / f"{name}.png")).astype(int) - inverted).max() <= 1
        assert (out / f"{name}.txt").read_text("utf-8") == f"words {name}"
    before = contents(out)
    picture((96, 96), shade=9).save(photos / "c.png")
    assert "1 written, 1 unchanged" in server.run(graph)["show"]["text"][0]
    after = contents(out)
    assert {n for n in after if after[n] != before[n] and n.endswith((".png", ".txt"))} == {"c.png"}


def test_new_captions_and_batches(server: Comfy, photos: Path) -> None:
    graph = {
        "one": prompts.node("EmptyImage", width=64, height=48, batch_size=3, color=255),
        **load(),
        "images": prompts.node(
            "LoraGraftDatasetToImages", dataset=["folder", 0], first=0, count=0, longest_side=0
        ),
        "back": prompts.node(
            "LoraGraftImagesToDataset",
            images=["one", 0],
            captions=["images", 2],
            name="new",
            image_format="jpeg",
        ),
        "show": prompts.node("PreviewAny", source=["back", 1]),
    }
    server.run(graph)
    out = server.base / "output" / "loragraft" / "datasets" / "new"
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} == {
        f"0000{n}.{suffix}" for n in (1, 2, 3) for suffix in ("jpg", "txt")
    }
    assert (out / "00002.txt").read_text("utf-8") == "words b"
    graph["back"]["inputs"] |= {"dataset": ["folder", 0], "images": ["images", 0], "masks": ["one", 0]}
    graph["one"] = prompts.node("SolidMask", value=1.0, width=8, height=8)
    text = refused(server, graph)
    assert "LG-DATA-052" in text and "1 masks" in text
    graph["back"]["inputs"].pop("masks")
    graph["back"]["inputs"]["name"] = "../x"
    assert "LG-PATH-001" in refused(server, graph)


# ---- upscaling ----


def tiny_upscaler(path: Path, scale: int = 4) -> None:
    """Write a random model of the real architecture "RealESRGAN Compact" with one inner layer."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.05

    out = 3 * scale * scale
    weights = {"body.0.weight": random(8, 3, 3, 3), "body.0.bias": torch.zeros(8), "body.1.weight": random(8)}
    weights |= {
        "body.2.weight": random(8, 8, 3, 3),
        "body.2.bias": torch.zeros(8),
        "body.3.weight": random(8),
    }
    weights |= {"body.4.weight": random(out, 8, 3, 3), "body.4.bias": torch.zeros(out)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)


def test_small_pictures_are_enlarged_by_comfyuis_upscale_model(server: Comfy, photos: Path) -> None:
    tiny_upscaler(server.base / "models" / "upscale_models" / "tiny.safetensors")
    folder = server.base / "input" / "small"
    fill(folder, {"a.png": (60, 40), "b.png": (300, 300), "a.txt": "x", "b.txt": "y"})
    graph = {
        **load("small"),
        "model": prompts.node("UpscaleModelLoader", model_name="tiny.safetensors"),
        "crop": prompts.node(
            "LoraGraftCrop",
            **{**CROP, "mode": "keep", "dataset": ["folder", 0], "upscale_model": ["model", 0]},
            upscale_to=128,
            name="large",
        ),
        "native": prompts.node("ImageUpscaleWithModel", upscale_model=["model", 0], image=["images", 0]),
        "images": prompts.node(
            "LoraGraftDatasetToImages", dataset=["folder", 0], first=0, count=1, longest_side=0
        ),
        "save": prompts.node("SaveImage", images=["native", 0], filename_prefix="native"),
    }
    outputs = server.run({**graph, "shown": prompts.node("PreviewAny", source=["crop", 3])})
    text = str(outputs["shown"]["text"][0])
    assert "Enlarged, 2.00 to 2.00 times: 1 picture." in text
    out = server.base / "output" / "loragraft" / "datasets" / "large"
    ours = Image.open(out / "a.png")
    assert ours.size == (120, 80) and not (out / "b.png").exists()
    # The same model through ComfyUI's own node, brought to the same size.
    native = Image.open(io.BytesIO(server.view(outputs["save"]["images"][0]))).convert("RGB")
    assert native.size == (240, 160)
    smaller = np.asarray(native.resize((120, 80), Image.Resampling.LANCZOS)).astype(int)
    assert abs(np.asarray(ours).astype(int) - smaller).max() <= 2
    before = contents(out)
    graph["crop"]["inputs"]["reg_caption"] = "changed, so that the node runs again"
    assert "0 written, 1 unchanged" in report(server, graph, ["crop", 3])
    assert contents(out) == before
