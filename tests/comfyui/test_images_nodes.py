"""Load Image Folder, Find Duplicates and Convert Images in a real ComfyUI, on files of every format."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy, error_text
from loragraft_tests.comfyui.raw import cached, picture, raw_folder, state

SCAN: dict[str, Any] = {"recursive": True, "class_tokens": "", "default_repeats": 1, "on_bad": "stop"}


def graph(path: str, name: str, **load: Any) -> prompts.Prompt:
    return {
        "load": prompts.node("LoraGraftLoadImageFolder", path=path, **{**SCAN, "masks": "folder", **load}),
        "twins": prompts.node(
            "LoraGraftFindDuplicates", dataset=["load", 0], action="skip", near=True, distance=4
        ),
        "convert": prompts.node(
            "LoraGraftConvertImages",
            dataset=["twins", 0],
            format="png",
            quality=0,
            names="number",
            prefix="x_",
            name=name,
        ),
        "build": prompts.node("LoraGraftBuildDataset", dataset=["convert", 0], **prompts.BUILD),
        "say load": prompts.node("PreviewAny", source=["load", 1]),
        "say twins": prompts.node("PreviewAny", source=["twins", 3]),
        "say convert": prompts.node("PreviewAny", source=["convert", 1]),
        "say build": prompts.node("PreviewAny", source=["build", 1]),
    }


def text(outputs: dict[str, Any], name: str) -> str:
    return str(outputs[name]["text"][0])


def test_from_raw_files_to_a_train_set_and_again(server: Comfy) -> None:
    folder = raw_folder(server.base / "input" / "raw")
    copy = server.base / "output/loragraft/datasets/clean"
    originals = state(folder)
    outputs = server.run(graph("raw", "clean"))

    said = text(outputs, "say load")
    assert "16 images in raw, 38 with repeats." in said
    assert "1 from .txt files, 1 from sidecars, 12 from class words" in said
    assert "2 from a JSON of many" in said
    assert "Masks: 1 from the folder masks." in said
    twins = text(outputs, "say twins")
    assert "1 group of duplicates, 2 images too many" in twins and "dogs/twin.bmp" in twins
    shown = outputs["twins"]["images"][0]
    assert server.view(shown).startswith(b"\x89PNG")
    assert "14 written, 0 unchanged" in text(outputs, "say convert")
    files = state(copy)
    assert sorted(n for n in files if n.startswith("dogs") and n.endswith("png")) == [
        f"dogs/x_{number:04}.png" for number in (1, 2, 3)
    ]
    assert files["3_a cat/x_0001.txt"][1] == b"by text"
    with Image.open(copy / "masks/3_a cat/x_0001.png") as mask:
        assert (mask.mode, mask.size) == ("L", (96, 80))
    assert "buckets" in text(outputs, "say build")

    # A second run touches nothing.
    entry = server.wait(server.queue(graph("raw", "clean")))
    assert {"load", "twins", "convert", "build"} <= cached(entry)
    assert state(copy) == files and state(folder) == originals

    # One caption: one text file. One picture: one picture.
    (folder / "3_a cat" / "0 photo.txt").write_text("another text", "utf-8")
    outputs = server.run(graph("raw", "clean"))
    assert "0 written, 14 unchanged" in text(outputs, "say convert")
    after = state(copy)
    assert {n for n in files if files[n] != after[n]} == {"3_a cat/x_0001.txt"}
    picture((140, 90), 16).save(folder / "3_a cat" / "download.image", "WEBP")
    outputs = server.run(graph("raw", "clean"))
    assert "1 written, 13 unchanged" in text(outputs, "say convert")
    last = state(copy)
    changed = {n for n in after if after[n] != last[n]}
    assert len(changed) == 1 and changed.pop().endswith(".png")


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "CON", ".", "a\nb", "x" * 300])
def test_the_copy_never_leaves_its_folder(server: Comfy, name: str) -> None:
    folder = server.base / "input" / "small"
    folder.mkdir(exist_ok=True)
    picture((64, 64), 0).save(folder / "a.png")
    prompt = graph("small", name, class_tokens="x", masks="none")
    before = {p for p in server.base.rglob("*") if "user" not in p.parts and p.suffix != ".log"}
    entry = server.wait(server.queue(prompt))
    assert "LG-PATH-001" in error_text(entry)
    after = {p for p in server.base.rglob("*") if "user" not in p.parts and p.suffix != ".log"}
    assert {p for p in after - before if "temp" not in p.parts} == set()


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"masks": "folder", "mask_folder": "../../output"}, "LG-PATH-002"),
        ({"masks": "folder", "mask_folder": "/etc"}, "LG-NODE-020"),
        ({"masks": "folder", "mask_folder": ' "/etc" '}, "LG-NODE-020"),
        ({"caption_json": "../../../secret.json"}, "LG-PATH-002"),
        ({"caption_json": "/etc/hostname"}, "LG-PATH-002"),
        ({"background": "white"}, "LG-CFG-003"),
        ({"captions": "txt, png"}, "LG-CFG-003"),
    ],
)
def test_widgets_are_checked_when_the_node_runs(server: Comfy, values: dict[str, str], code: str) -> None:
    folder = server.base / "input" / "small"
    folder.mkdir(exist_ok=True)
    picture((64, 64), 0).save(folder / "a.png")
    prompt = graph("small", "", **{"class_tokens": "x", "masks": "none", **values})
    assert code in error_text(server.wait(server.queue(prompt)))


def test_without_a_name_the_copy_is_called_after_its_dataset(server: Comfy) -> None:
    folder = server.base / "input" / "small"
    folder.mkdir(exist_ok=True)
    picture((64, 64), 0).save(folder / "a.png")
    server.run(graph("small", "", class_tokens="x", masks="none"))
    found = [p.name for p in (server.base / "output/loragraft/datasets").iterdir() if "small" in p.name]
    assert len(found) == 1 and found[0].startswith("small converted ")


def test_cancel_stops_a_conversion(server: Comfy) -> None:
    folder = server.base / "input" / "many"
    folder.mkdir()
    for number in range(60):
        picture((1600, 1200), number).save(folder / f"{number}.jpg", quality=60)
    prompt = graph("many", "many", class_tokens="x", masks="none")
    del prompt["twins"]
    prompt["convert"]["inputs"]["dataset"] = ["load", 0]
    for key in ("say twins",):
        del prompt[key]
    begun = server.mark()
    prompt_id = server.queue(prompt)
    server.wait_event(
        lambda e: e["type"] == "progress" and e["data"]["node"] == "convert" and e["data"]["value"] > 0,
        since=begun,
    )
    server.interrupt()
    entry = server.wait(prompt_id)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    copy = server.base / "output/loragraft/datasets/many"
    done = len(list(copy.glob("*.png")))
    assert 0 < done < 60 and not list(copy.glob("*.tmp"))
    outputs = server.run(prompt)
    assert f"{60 - done} written, {done} unchanged" in text(outputs, "say convert")
