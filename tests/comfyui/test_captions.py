"""Tagging and caption nodes in a real ComfyUI: a real ONNX graph, the cache, lists and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy

ROWS = [("general", 9), ("sensitive", 9), ("1girl", 0), ("long_hair", 0), ("hat", 0), ("miku_(vocaloid)", 4)]
SCORES = [0.2, 0.7, 0.9, 0.6, 0.5, 0.95]
FOUND = "miku (vocaloid), 1girl, long hair, hat"


@pytest.fixture(scope="module")
def tagger(server: Comfy) -> Iterator[Path]:
    """Put a real tagger where the WD14 Tagger pack keeps its models."""
    pytest.importorskip("onnx", reason="pip install -e .[dev]")
    from loragraft_tests.trainer import tagger_files

    pack = server.base / "custom_nodes" / "comfyui-wd14-tagger" / "models"
    pack.mkdir(parents=True)
    made = tagger_files.write_tagger(server.base / "made", ROWS, SCORES)
    (made / "model.onnx").rename(pack / "host-test.onnx")
    (made / "selected_tags.csv").rename(pack / "host-test.csv")
    yield pack
    for file in pack.iterdir():
        file.unlink()


@pytest.fixture(scope="module")
def folder(server: Comfy) -> Path:
    """Return two pictures, one of them with a caption."""
    folder = server.base / "input" / "captions" / "1_ohwx cat"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 24), "red").save(folder / "a.png")
    Image.new("RGB", (24, 40), "blue").save(folder / "b.png")
    (folder / "a.txt").write_text("red scarf, hat", "utf-8")
    return folder


def load() -> prompts.Prompt:
    return {
        "folder": prompts.node(
            "LoraGraftLoadImageFolder",
            path="captions",
            recursive=True,
            class_tokens="",
            default_repeats=1,
            on_bad="stop",
        )
    }


def tag(**settings: Any) -> dict[str, Any]:
    given = {
        "tagger": "auto",
        "general_threshold": 0.35,
        "character_threshold": 0.85,
        "trigger": "",
        "exclude": "",
        "existing": "replace",
        "replace_underscore": True,
    }
    return prompts.node("LoraGraftWD14Tag", dataset=["folder", 0], **{**given, **settings})


def show(source: list[Any]) -> dict[str, Any]:
    return prompts.node("PreviewAny", source=source)


def text(outputs: dict[str, Any], name: str) -> list[str]:
    return list(outputs[name]["text"])


def error(server: Comfy, graph: prompts.Prompt) -> str:
    entry = server.wait(server.queue(graph))
    assert entry["status"]["status_str"] == "error", entry["status"]
    return str(next(data for kind, data in entry["status"]["messages"] if kind == "execution_error"))


def test_a_tagger_of_another_pack_captions_the_images(server: Comfy, folder: Path, tagger: Path) -> None:
    graph = load() | {"tag": tag(), "captions": show(["tag", 1]), "report": show(["tag", 2])}
    outputs = server.run(graph)
    assert text(outputs, "captions") == [FOUND, FOUND]
    report = text(outputs, "report")[0]
    assert "Tagged 2 images with host-test." in report and "CPU" in report
    assert (folder / "a.txt").read_text("utf-8") == "red scarf, hat"
    choices = server.object_info()["LoraGraftWD14Tag"]["input"]["required"]["tagger"]
    assert "host-test" in str(choices)


def test_the_settings_arrive(server: Comfy, folder: Path, tagger: Path) -> None:
    settings = {"trigger": "{class}", "exclude": "[features]\n*_(vocaloid)", "existing": "append"}
    advanced = {"rating": "last", "always_first": "hat", "device": "cpu", "batch_size": 1}
    graph = load() | {"tag": tag(**settings, **advanced), "captions": show(["tag", 1])}
    assert text(server.run(graph), "captions") == [
        "ohwx cat, red scarf, hat, 1girl, sensitive",
        "ohwx cat, hat, 1girl, sensitive",
    ]


def test_an_edited_image_is_scored_again_and_only_that(server: Comfy, folder: Path, tagger: Path) -> None:
    graph = load() | {"tag": tag(general_threshold=0.55), "report": show(["tag", 2])}
    server.run(graph)
    Image.new("RGB", (40, 24), "green").save(folder / "a.png")
    assert "host-test: 1 of 2 pictures were scored before." in text(server.run(graph), "report")[0]
    entry = server.wait(server.queue(graph))
    cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    assert {"folder", "tag", "report"} <= set(cached), "a third run does nothing"


def test_the_whole_way_of_captions(server: Comfy, folder: Path, tagger: Path) -> None:
    """Tag, prune by the guides' strategy, and set what a captioning model said over the tags."""
    graph = load() | {
        "tag": tag(),
        "edit": prompts.node(
            "LoraGraftEditCaptions",
            dataset=["tag", 0],
            preset="prune features",
            trigger="ohwx",
            operations="replace: hat -> straw hat\nsort: name",
        ),
        "said": prompts.node("LoraGraftEditCaptions", dataset=["folder", 0], preset="none", trigger="",
                             operations="template: A picture of {class}."),
        "set": prompts.node(
            "LoraGraftSetCaptions",
            dataset=["edit", 0],
            captions=["said", 1],
            template="{trigger}: {caption} {tags}",
            trigger="zz",
        ),
        "build": prompts.node("LoraGraftBuildDataset", dataset=["set", 0], **prompts.BUILD),
        "captions": show(["edit", 1]),
        "prompts": show(["edit", 2]),
        "report": show(["edit", 3]),
        "set report": show(["set", 1]),
        "build report": show(["build", 1]),
    }  # fmt: skip
    outputs = server.run(graph)
    assert text(outputs, "captions") == ["ohwx, 1girl, miku (vocaloid), straw hat"] * 2
    assert text(outputs, "prompts") == ["ohwx, 1girl, miku \\(vocaloid\\), straw hat"] * 2
    assert "       2 -> 0      long hair" in text(outputs, "report")[0]
    assert "Captions set from a list: 2 images" in text(outputs, "set report")[0]
    expected = "zz: A picture of ohwx cat. ohwx, 1girl, miku (vocaloid), straw hat"
    assert expected in text(outputs, "build report")[0]


def test_refusals_are_readable(server: Comfy, folder: Path, tagger: Path) -> None:
    missing = load() | {"tag": tag(tagger="wd-vit-tagger-v3"), "out": show(["tag", 2])}
    message = error(server, missing)
    assert "LG-DATA-060" in message and "Download Tagger" in message and "loragraft_taggers" in message
    more = load() | {"tag": tag(more_taggers="../../x"), "out": show(["tag", 2])}
    assert "LG-DATA-060" in error(server, more)
    edit = {"preset": "none", "trigger": "", "operations": "delet: x"}
    wrong = load() | {"e": prompts.node("LoraGraftEditCaptions", dataset=["folder", 0], **edit)}
    assert "LG-DATA-072" in error(server, wrong | {"out": show(["e", 3])})
    one = {"captions": "only one", "template": "{caption}", "trigger": ""}
    short = load() | {"s": prompts.node("LoraGraftSetCaptions", dataset=["folder", 0], **one)}
    assert "LG-DATA-075" in error(server, short | {"out": show(["s", 1])})


def test_the_download_node_looks_and_stays_offline(server: Comfy) -> None:
    def graph(download: bool) -> prompts.Prompt:
        return {"d": prompts.node("LoraGraftDownloadTagger", tagger="wd-vit-tagger-v3", download=download)}

    report = "\n".join(server.run(graph(False))["d"]["text"])
    assert "7f6b584d0bd3" in report and "378.5 MB" in report
    assert "LG-DATA-064" in error(server, graph(True)), "HF_HUB_OFFLINE is set for the host tests"
    assert not list((server.base / "models" / "loragraft_taggers").glob("*/*"))
