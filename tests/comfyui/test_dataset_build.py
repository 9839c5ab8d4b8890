"""Build Dataset, Load Dataset Config and Export Dataset in a real ComfyUI, on real files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy, error_text
from loragraft_tests.trainer.data_folders import fill

TITLES = {
    "LoraGraftLoadDatasetConfig": "Load Dataset Config",
    "LoraGraftExportDataset": "Export Dataset",
}
CONFIG = """
[general]
enable_bucket = true
caption_extension = '.txt'
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 32
[[datasets]]
resolution = 64
batch_size = 2
[[datasets.subsets]]
image_dir = 'kohya/cats'
class_tokens = 'zogi'
num_repeats = 3
[[datasets]]
resolution = 96
[[datasets.subsets]]
image_dir = 'kohya/cats'
class_tokens = 'zogi'
"""


@pytest.fixture(scope="module")
def kohya(server: Comfy) -> Path:
    """Return a folder below input/ with images, captions and a dataset.toml."""
    root = server.base / "input" / "kohya"
    fill(root, {f"cats/{i}.png": (64 + 16 * i, 64) for i in range(4)} | {"cats/0.txt": "zogi, <b>hat</b>"})
    (root / "dataset.toml").write_text(CONFIG, "utf-8")
    return root


def config_node(**inputs: Any) -> dict[str, Any]:
    values = {"file": "kohya/dataset.toml", "resolution": 64, "on_bad": "stop", "missing_captions": "stop"}
    return prompts.node("LoraGraftLoadDatasetConfig", **{**values, **inputs})


def refusal(server: Comfy, graph: prompts.Prompt) -> str:
    """Return what a graph is refused with, before or while it runs."""
    status, answer = server.post_prompt(graph)
    if status != 200 or answer.get("node_errors"):
        return json.dumps(answer)
    return error_text(server.wait(str(answer["prompt_id"])))


@pytest.mark.parametrize("name", TITLES)
def test_a_node_is_listed(server: Comfy, name: str) -> None:
    node = server.object_info()[name]
    assert (node["display_name"], node["category"]) == (TITLES[name], "LoraGraft/dataset")
    assert node["description"] and node["search_aliases"] and all(node["output_tooltips"])
    for group in ("required", "optional"):
        for widget, (_, options) in node["input"].get(group, {}).items():
            assert options.get("tooltip"), widget


def test_the_report_is_shown_on_the_node_alone(server: Comfy) -> None:
    outputs = server.run(prompts.dataset_nodes(balance_concepts=True, kind="character"))
    shown = outputs["build"]
    assert "[few] 16 images" in shown["text"][0]
    assert len(shown["images"]) == 3
    for image in shown["images"]:
        assert image["type"] == "temp"
        assert Image.open(io.BytesIO(server.view(image))).width > 500
    (line,) = [x for x in shown["text"][0].splitlines() if x.startswith("As a page:")]
    page = (server.base / line.removeprefix("As a page: ")).read_text("utf-8")
    assert page.startswith("<!doctype html>") and "<script" not in page


def test_the_report_as_json_with_the_bases_own_tokens(server: Comfy) -> None:
    graph = {"base": prompts.node("LoraGraftLoadDemoBase"), **prompts.dataset_nodes(clip=["base", 1])}
    graph["show"] = prompts.node("PreviewAny", source=["build", 2])
    report = json.loads(server.run(graph)["show"]["text"][0])
    assert report["captions"]["counted_by"] == "the tokenizer"
    assert report["images"]["training"] == 16
    assert str(server.base) not in json.dumps(report)


def test_regularisation_images_from_a_second_folder(server: Comfy) -> None:
    fill(server.base / "input" / "reg", {f"1_thing/{i}.png": (64, 64) for i in range(2)})
    graph = prompts.dataset_nodes(regularisation=["reg", 0], prior_loss_weight=0.3)
    graph["reg"] = prompts.dataset_nodes("reg")["folder"]
    text = server.run(graph)["build"]["text"][0]
    assert "Regularisation: 2 images used 64 times in all, for 64 training samples." in text
    assert "[reg_few]" in text


def test_a_kohya_config_trains(server: Comfy, kohya: Path) -> None:
    graph = prompts.train_prompt(output_name="from_config", max_train_steps=2)
    del graph["folder"], graph["build"]
    graph["build"] = config_node()
    outputs = server.run(graph)
    text = outputs["build"]["text"][0]
    assert "Group 1: 4 images, batch size 2." in text and "Group 2: 4 images" in text
    assert (server.base / "models/loras/from_config.safetensors").is_file()


def test_an_edited_caption_or_config_is_noticed(server: Comfy, kohya: Path) -> None:
    graph = {"build": config_node(), "show": prompts.node("PreviewAny", source=["build", 1])}

    def cached() -> set[str]:
        entry = server.wait(server.queue(graph))
        assert entry["status"]["status_str"] == "success", error_text(entry)
        return set(next(d["nodes"] for k, d in entry["status"]["messages"] if k == "execution_cached"))

    cached()
    assert "build" in cached()
    (kohya / "cats" / "0.txt").write_text("zogi, other words", "utf-8")
    assert "build" not in cached()
    (kohya / "dataset.toml").write_text(CONFIG.replace("num_repeats = 3", "num_repeats = 5"), "utf-8")
    assert "build" not in cached()
    assert "build" in cached()


@pytest.mark.parametrize("around", ['"{}"', "'{}'", " {} ", '"{}" '])
def test_a_path_may_be_pasted_with_what_a_file_manager_puts_around_it(server: Comfy, around: str) -> None:
    fill(server.base / "input" / "a b", {"a.png": (64, 64), "a.txt": "a cat"})
    for path in ("a b", str(server.base / "input" / "a b")):
        server.run(prompts.dataset_nodes(around.format(path)))


HOSTILE = [
    "/etc/passwd",
    "../../../etc/passwd",
    "C:\\x.toml",
    "\\\\host\\share\\x.toml",
    "~/x.toml",
    "$HOME/x.toml",
    "kohya/../../../x.toml",
    "x\x00.toml",
    "",
]


@pytest.mark.parametrize("path", HOSTILE)
def test_a_config_outside_is_refused(server: Comfy, kohya: Path, path: str) -> None:
    text = refusal(server, {"build": config_node(file=path)})
    assert "LG-PATH" in text or "LG-NODE-020" in text, text


def test_a_folder_outside_named_inside_a_config_is_refused(
    server: Comfy, kohya: Path, tmp_path: Path
) -> None:
    fill(tmp_path / "secret", {"a.png": (64, 64), "a.txt": "canary"})
    for number, place in enumerate(
        (str(tmp_path / "secret"), "../../secret", "~/secret", "kohya/cats/../../..")
    ):
        file = kohya / f"hostile{number}.toml"
        file.write_text(CONFIG.replace("'kohya/cats'", f"'{place}'"), "utf-8")
        text = refusal(server, {"build": config_node(file=f"kohya/{file.name}")})
        assert ("LG-PATH" in text or "LG-NODE-020" in text) and "canary" not in text, (place, text)
    (kohya / "hostile.yaml").write_text(
        f"_base_: {tmp_path}/x.yaml\ndata:\n  d:\n    source:\n      s:\n        img_root: {tmp_path}/x\n",
        "utf-8",
    )
    text = refusal(server, {"build": config_node(file="kohya/hostile.yaml")})
    assert "LG-DATA-084" in text and "canary" not in text


def test_export_writes_what_kohya_reads(server: Comfy, kohya: Path) -> None:
    export = prompts.node(
        "LoraGraftExportDataset", train_set=["build", 0], name="for kohya", format="png", quality=97
    )
    graph = {"build": config_node(), "export": export}
    text = server.run(graph)["export"]["text"][0]
    folder = server.base / "output/loragraft/exports/for kohya"
    assert "8 written" in text and (folder / "dataset.toml").is_file()
    assert len(list(folder.rglob("*.png"))) == 8
    for name in ("../x", "a/b", "con", ""):
        bad = {"build": config_node(), "export": {**export, "inputs": {**export["inputs"], "name": name}}}
        assert "LG-PATH-001" in refusal(server, bad), name
