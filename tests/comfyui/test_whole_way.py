"""Raw downloads and a video through every dataset node of a real ComfyUI, into a trained LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy
from loragraft_tests.comfyui.raw import cached, picture, raw_folder, state
from loragraft_tests.trainer.videos import encode, scene

STEPS = (
    *("load", "twins", "convert", "crop", "tag", "edit", "build", "train"),
    *("frames", "images", "back", "set", "build video"),
)


@pytest.fixture(scope="module")
def folder(server: Comfy) -> Path:
    """Return the raw folder, with broken files in it, a video beside it, and a tagger."""
    pytest.importorskip("onnx", reason="pip install -e .[dev]")
    from loragraft_tests.trainer import tagger_files

    folder = raw_folder(server.base / "input" / "downloads")
    (folder / "3_a cat" / "cut.jpg").write_bytes((folder / "3_a cat" / "1 photo.jpeg").read_bytes()[:400])
    (folder / "dogs" / "page.png").write_text("<html>not found</html>", "utf-8")
    (folder / "dogs" / "empty.webp").write_bytes(b"")
    encode(server.base / "input" / "films" / "2_miri" / "clip.mp4", [scene(n) for n in range(20)])
    models = server.base / "custom_nodes" / "comfyui-wd14-tagger" / "models"
    models.mkdir(parents=True, exist_ok=True)
    rows = [("general", 9), ("1girl", 0), ("long_hair", 0), ("hat", 0), ("miku_(vocaloid)", 4)]
    made = tagger_files.write_tagger(server.base / "whole way", rows, [0.9, 0.8, 0.7, 0.6, 0.1])
    (made / "model.onnx").rename(models / "whole-way.onnx")
    (made / "selected_tags.csv").rename(models / "whole-way.csv")
    return folder


def show(source: list[Any]) -> dict[str, Any]:
    return prompts.node("PreviewAny", source=source)


def graph() -> prompts.Prompt:
    """Return both ways: photos to a trained LoRA, and a video over the bridges to a train set."""
    train = prompts.train_prompt(output_name="whole_way", max_train_steps=2)
    del train["folder"]
    return train | {
        "load": prompts.node(
            "LoraGraftLoadImageFolder",
            path="downloads",
            recursive=True,
            class_tokens="",
            default_repeats=1,
            on_bad="skip",
            masks="folder",
        ),
        "twins": prompts.node(
            "LoraGraftFindDuplicates", dataset=["load", 0], action="skip", near=True, distance=4
        ),
        "convert": prompts.node(
            "LoraGraftConvertImages",
            dataset=["twins", 0],
            format="png",
            quality=0,
            names="number",
            prefix="",
            name="whole_way",
        ),
        "crop": prompts.node(
            "LoraGraftCrop",
            dataset=["convert", 0],
            mode="square",
            align="center",
            width=64,
            height=64,
            reg_caption="animal",
        ),
        "tag": prompts.node(
            "LoraGraftWD14Tag",
            dataset=["crop", 0],
            tagger="whole-way",
            general_threshold=0.35,
            character_threshold=0.85,
            trigger="",
            exclude="",
            existing="append",
            replace_underscore=True,
        ),
        "edit": prompts.node(
            "LoraGraftEditCaptions",
            dataset=["tag", 0],
            preset="none",
            trigger="",
            operations="trigger: ohwx\ndelete: [hair]",
            separator=",",
        ),
        "build": prompts.node(
            "LoraGraftBuildDataset", dataset=["edit", 0], regularisation=["crop", 1], **prompts.BUILD
        ),
        "say load": show(["load", 1]),
        "say convert": show(["convert", 1]),
        "say tag": show(["tag", 2]),
        "say captions": show(["edit", 1]),
        "say build": show(["build", 1]),
        "frames": prompts.node(
            "LoraGraftFrameExtract",
            path="films",
            name="films",
            mode="every_n_frames",
            every_n_frames=5,
            every_n_seconds=1.0,
            start=0.0,
            end=0.0,
            max_frames=10,
            skip_blurred=False,
            skip_similar=False,
            image_format="png",
            recursive=True,
            class_tokens="",
            default_repeats=1,
            on_bad="stop",
        ),
        "images": prompts.node(
            "LoraGraftDatasetToImages", dataset=["frames", 0], first=0, count=0, longest_side=0
        ),
        "inverted": prompts.node("ImageInvert", image=["images", 0]),
        "back": prompts.node(
            "LoraGraftImagesToDataset",
            images=["inverted", 0],
            name="inverted",
            image_format="png",
            dataset=["images", 4],
        ),
        "set": prompts.node(
            "LoraGraftSetCaptions",
            dataset=["back", 0],
            captions=["images", 2],
            template="a film of {caption}",
            trigger="",
        ),
        "build video": prompts.node("LoraGraftBuildDataset", dataset=["set", 0], **prompts.BUILD),
        "say video": show(["build video", 1]),
    }


def text(outputs: dict[str, Any], name: str) -> str:
    return "\n".join(outputs[name]["text"])


def test_every_node_from_raw_files_to_a_lora_and_again(server: Comfy, folder: Path) -> None:
    originals = state(folder)
    outputs = server.run(graph())
    said = text(outputs, "say load")
    for broken in ("cut.jpg", "page.png", "empty.webp"):
        assert broken in said
    assert "14 written, 0 unchanged" in text(outputs, "say convert")
    assert "Tagged 14 images with whole-way." in text(outputs, "say tag")
    captions = outputs["say captions"]["text"]
    assert len(captions) == 14
    assert all(c.startswith("ohwx, ") and "1girl" in c and "hair" not in c for c in captions), captions
    built = text(outputs, "say build")
    assert "regularisation" in built and "14 " in built
    assert outputs["train"]["loragraft"][0]["step"] == 2
    assert (server.base / "models/loras/whole_way.safetensors").is_file()
    assert "4 images" in text(outputs, "say video")
    assert state(folder) == originals, "originals are never written to"

    again = server.wait(server.queue(graph()))
    assert set(STEPS) <= cached(again), "a second run does nothing anew"

    picture((140, 90), 77).save(folder / "3_a cat" / "download.image", "WEBP")
    outputs = server.run(graph())
    assert "1 written, 13 unchanged" in text(outputs, "say convert")
    assert "13" in text(outputs, "say tag"), "thirteen pictures keep their scores"
    (folder / "3_a cat" / "0 photo.txt").write_text("edited words", "utf-8")
    outputs = server.run(graph())
    assert "0 written, 14 unchanged" in text(outputs, "say convert")
    changed = [c for c in outputs["say captions"]["text"] if "edited words" in c]
    assert len(changed) == 1
