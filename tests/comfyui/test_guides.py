"""The workflows of the guides run as they stand but for their length, and make what each guide makes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from loragraft.trainer import api
from loragraft_tests.comfyui import guides, prompts
from loragraft_tests.comfyui.harness import Comfy
from loragraft_tests.comfyui.sheet import to_prompt
from loragraft_tests.trainer.videos import encode, scene

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
STEPS = 2
TRAIN, GRID, BUILD = "LoraGraftTrainLoRA", "LoraGraftPreviewWithLoRA", "LoraGraftBuildDataset"
FEWER = (  # of Kohya Settings, written in a command line
    ("--max_train_epochs=16", "--max_train_epochs=2"),
    ("--save_every_n_epochs=4", "--save_every_n_epochs=1"),
    ('"T_0=40"', '"T_0=8"'),
    ('"warmup_steps=10"', '"warmup_steps=2"'),
    ('"cycle_warmup=5"', '"cycle_warmup=1"'),
)


@pytest.fixture(scope="module")
def info(server: Comfy) -> dict[str, Any]:
    return server.object_info()


class Guide:
    """A guide's workflow as a quick prompt; ``outputs`` and ``log`` are there once it ran."""

    def __init__(self, name: str, info: dict[str, Any]) -> None:
        self.name, self.info = name, info
        self.workflow = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
        self.outputs: dict[str, Any] = {}
        self.log = ""

    def node(self, kind: str, title: str = "") -> dict[str, Any]:
        """Return a node of the workflow, by its type or by its title too."""
        return next(n for n in self.workflow["nodes"] if n["type"] == kind and title in ("", n.get("title")))

    def prompt(self) -> prompts.Prompt:
        """Return what is queued: all as it stands, but few steps."""
        graph = to_prompt(self.workflow, self.info)
        for node in graph.values():
            given = node["inputs"]
            if node["class_type"] == TRAIN:
                given |= {"max_train_steps": STEPS, "sample_steps": 2, "preview_image": False}
            if node["class_type"] in (GRID, "KSampler"):
                given["steps"] = 2
            if "config" in given:
                for long, short in FEWER:
                    assert long in given["config"]
                    given["config"] = given["config"].replace(long, short)
        return graph

    def run(self, server: Comfy, graph: prompts.Prompt | None = None) -> Guide:
        """Run it; return self."""
        before = len(server.log)
        self.outputs = server.run(graph or self.prompt(), self.workflow, timeout_s=600)
        self.log = server.log[before:]
        assert "not loaded" not in self.log.lower()
        return self

    def text(self, kind: str, title: str = "") -> str:
        """Return what a node said."""
        return "\n".join(self.outputs[str(self.node(kind, title)["id"])]["text"])

    def done(self) -> dict[str, Any]:
        """Return what Train LoRA told its panel at the end."""
        found: dict[str, Any] = self.outputs[str(self.node(TRAIN)["id"])]["loragraft"][0]
        return found

    def grid(self, title: str = "") -> dict[str, Any]:
        """Return what a grid's rows and columns are."""
        found = self.outputs[str(self.node(GRID, title)["id"])]
        assert found["images"]
        grid: dict[str, Any] = found["loragraft"][0]
        return grid

    def settings(self, server: Comfy) -> dict[str, Any]:
        """Return the settings that the trained file says it was trained with."""
        file = self.done()["file"].splitlines()[0]
        return api.lora_metadata(server.base / "models/loras" / file)


def keys(file: Path) -> list[str]:
    with safe_open(str(file), "pt") as opened:
        return list(opened.keys())


def one_repeat(server: Comfy) -> str:
    """Return a folder below input with the samples, each once an epoch."""
    folder = server.base / "input" / "once"
    shutil.copytree(api.demo_dataset() / "4_zogi", folder / "1_zogi", dirs_exist_ok=True)
    return folder.name


def test_photos_become_a_dataset_for_kohya(server: Comfy, info: dict[str, Any]) -> None:
    guide = Guide(guides.PHOTOS, info).run(server)
    assert "16 images" in guide.text("PreviewAny", "Report")
    folder = server.base / "output/loragraft/exports/my_photos"
    assert "dataset.toml" in guide.text("PreviewAny", "What was written")
    toml = (folder / "dataset.toml").read_text("utf-8")
    assert "enable_bucket = true" in toml and "resolution" in toml
    captions = sorted(folder.rglob("*.txt"))
    assert len(captions) == 16 and {c.read_text("utf-8").strip() for c in captions} == {"zogi"}
    assert len(list(folder.rglob("*.jpg"))) == 16
    copies = [f.name for f in (server.base / "output/loragraft/datasets").rglob("photo_*.jpg")]
    assert sorted(copies) == [f"photo_{n:04}.jpg" for n in range(1, 17)]


def test_videos_become_a_dataset_for_kohya(server: Comfy, info: dict[str, Any], tmp_path: Path) -> None:
    """As the note says: switch Frame Extract on, and link it in the place of Load Image Folder."""
    videos = server.base / "input" / "videos_of_the_guide"
    videos.mkdir()
    encode(videos / "a.mp4", [scene(n // 30) for n in range(90)])
    guide = Guide(guides.PHOTOS, info)
    frames, convert = guide.node("LoraGraftFrameExtract"), guide.node("LoraGraftConvertImages")
    assert str(frames["id"]) not in guide.prompt()
    frames["mode"] = 0
    graph = guide.prompt()
    graph[str(frames["id"])]["inputs"]["path"] = videos.name
    graph[str(convert["id"])]["inputs"]["dataset"] = [str(frames["id"]), 0]
    export = graph[str(guide.node("LoraGraftExportDataset")["id"])]["inputs"]
    export["name"] = "my_frames"
    guide.run(server, graph)
    folder = server.base / "output/loragraft/exports/my_frames"
    assert len(list(folder.rglob("*.jp*g"))) == 3, "one of 30 frames"
    assert (folder / "dataset.toml").is_file()


def test_three_networks_of_a_character_are_compared(server: Comfy, info: dict[str, Any]) -> None:
    guide = Guide(guides.CHARACTER, info).run(server)
    said = guide.outputs[str(guide.node(BUILD)["id"])]["text"][0]
    assert "9 uncropped originals, as regularisation" in said and "'creature'" in said
    done = guide.done()
    assert [run["step"] for run in done["runs"]] == [STEPS] * 3
    files = [server.base / "models/loras" / run["file"] for run in done["runs"]]
    trained = [api.lora_metadata(file) for file in files]
    assert [t["ss_network_dim"] for t in trained] == ["32", "32", "6"]
    plain, locon, loha = (keys(file) for file in files)
    assert not any("resnets" in key for key in plain) and any("resnets" in key for key in locon)
    assert any(key.endswith("hada_w1_a") for key in loha)
    assert [row["lora"] for row in guide.grid()["rows"]] == [None, *(file.name for file in files)]


def test_dreambooth_draws_its_class_and_trains_layers_at_their_rates(
    server: Comfy, info: dict[str, Any]
) -> None:
    guide = Guide(guides.DREAMBOOTH, info).run(server)
    said = guide.outputs[str(guide.node(BUILD)["id"])]["text"][0]
    assert "Regularisation: 16 images used 64 times" in said and "5 buckets" in said
    assert "template: {pt1}, {caption}: 16 captions changed." in said
    assert "sampler_name" in guide.grid()["settings"]
    log = next((server.base / "output/loragraft").glob("dreambooth_zogi-*/run.toml")).read_text("utf-8")
    assert "resnets" in log and "to_k" in log
    converted = server.base / "models/loras/dreambooth_zogi_diffusers.safetensors"
    assert any(key.startswith("unet.") for key in keys(converted))


def test_dreambooth_with_the_words_embedding(server: Comfy, info: dict[str, Any]) -> None:
    guide = Guide(guides.DREAMBOOTH, info)
    guide.node("LoraGraftText")["mode"] = 0
    graph = guide.prompt()
    for node in graph.values():
        if node["class_type"] == TRAIN:
            node["inputs"]["output_name"] = "dreambooth_word"
        if node["class_type"] == "LoraGraftConvertLoRA":
            node["inputs"]["output_name"] = "dreambooth_word_diffusers"
    guide.run(server, graph)
    file = server.base / "models/embeddings/dreambooth_word-zogi.safetensors"
    assert keys(file) == ["emb_params"]
    assert f"embedding:{file.stem}" in guide.log
    before = len(server.log)
    outputs = server.run(
        {
            "base": prompts.node("LoraGraftLoadDemoBase"),
            "grid": prompts.preview_node(
                lora_name="dreambooth_word.safetensors", prompts="embedding:dreambooth_word-zogi, large"
            ),
        }
    )
    assert outputs["grid"]["images"] and "does not exist" not in server.log[before:]


def test_a_style_is_balanced_and_trained_as_loha_on_a_cosine_with_restarts(
    server: Comfy, info: dict[str, Any]
) -> None:
    """On two concepts of unequal size, so that there is something to balance."""
    concepts = server.base / "input" / "concepts_of_the_guide"
    sample = api.demo_dataset() / "4_zogi"
    for name, numbers in (("1_forest", range(1, 13)), ("1_city", range(13, 17))):
        (concepts / name).mkdir(parents=True)
        for file in sample.iterdir():
            if int(file.stem[-2:]) in numbers:
                shutil.copyfile(file, concepts / name / file.name)
    guide = Guide(guides.STYLE, info)
    graph = guide.prompt()
    graph[str(guide.node("LoraGraftLoadImageFolder")["id"])]["inputs"]["path"] = concepts.name
    guide.run(server, graph)
    report = guide.text("PreviewAny", "Report")
    assert re.search(r"city: 4 x 3 = 12, 50%", report) and re.search(r"forest: 12 x 1 = 12, 50%", report)
    assert "deduplicate: changed nothing." in guide.text("PreviewAny", "What the edits did")
    trained = guide.settings(server)
    assert trained["ss_lr_scheduler"] == "cosine_with_restarts" and trained["ss_network_dim"] == "8"
    assert "loha" in str(trained).lower() and guide.done()["step"] == STEPS
    assert [row["label"] for row in guide.grid()["rows"]]


def test_a_style_runs_as_it_stands(server: Comfy, info: dict[str, Any]) -> None:
    guide = Guide(guides.STYLE, info).run(server)
    assert "balance_concepts does nothing" in guide.text("PreviewAny", "Report")
    assert guide.done()["step"] == STEPS


def test_a_command_line_is_trained_tested_shrunk_and_checked(server: Comfy, info: dict[str, Any]) -> None:
    guide = Guide(guides.KOHYA, info)
    graph = guide.prompt()
    graph[str(guide.node("LoraGraftLoadImageFolder")["id"])]["inputs"]["path"] = one_repeat(server)
    guide.run(server, graph)
    said = guide.text("PreviewAny", "What the config says to other nodes")
    assert "resolution: in a graph" in said and "train_data_dir: in a graph" in said
    trained = guide.settings(server)
    assert (trained["ss_network_dim"], trained["ss_clip_skip"], trained["ss_min_snr_gamma"]) == (
        "64",
        "2",
        "5.0",
    )
    assert "conv_dim" in trained["ss_network_args"] and trained["ss_max_token_length"] == "225"
    loras = server.base / "models/loras"
    assert (loras / "my_best_lora-000001.safetensors").is_file(), "the first epoch, as kohya names it"
    rows = guide.grid("Epochs and weights")["rows"]
    assert {row["strength_model"] for row in rows} == {0.7, 0.9, 1.1, 1.3, 1.5}
    assert len({row["lora"] for row in rows}) == 2, "both epochs"
    columns = guide.grid("Seeds and backgrounds")["columns"]
    assert [c["seed"] for c in columns] == list(range(1, 9)) and len({c["prompt"] for c in columns}) > 1
    assert guide.text("PreviewAny", "The check").startswith(
        "418 tensors; 6 have a least absolute value of 0.0"
    )
    small, large = (loras / f"my_best_lora{end}.safetensors" for end in ("_32rank", ""))
    assert small.stat().st_size < large.stat().st_size / 2


def test_what_a_command_line_leaves_out_has_kohyas_default(server: Comfy, info: dict[str, Any]) -> None:
    """The widgets of Train LoRA do not count for it."""
    trained = trained_by(
        "--network_module=networks.lora --network_dim=4 --learning_rate=1e-3 --clip_skip=2"
        " --max_train_steps=1 --output_name=left_out",
        server,
        info,
    )
    assert trained["ss_min_snr_gamma"] == "None" and trained["ss_lr_warmup_steps"] == "0"
    assert "conv_dim" not in trained.get("ss_network_args", "") and trained["ss_lr_scheduler"] == "constant"


def test_what_the_gui_of_kohya_ss_saves_is_trained(server: Comfy, info: dict[str, Any]) -> None:
    """What the file leaves out is what the GUI's window shows."""
    saved = {"LoRA_type": "Kohya LoCon", "network_dim": 4, "conv_dim": 2, "clip_skip": "2", "lr_warmup": 0}
    more = {
        "max_train_steps": "1",
        "mixed_precision": "no",
        "output_name": "from_the_gui",
        "optimizer": "AdamW",
    }
    trained = trained_by(json.dumps({**saved, **more}), server, info)
    assert (trained["ss_network_dim"], trained["ss_clip_skip"], trained["ss_steps"]) == ("4", "2", "1")
    assert json.loads(trained["ss_network_args"])["conv_dim"] in (2, "2")
    assert trained["ss_min_snr_gamma"] == "None" and trained["ss_lr_scheduler"] == "cosine"


def trained_by(config: str, server: Comfy, info: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of what Kohya Config trains in its guide's graph, grids left out."""
    guide = Guide(guides.KOHYA, info)
    graph = guide.prompt()
    train = next(node for node in graph.values() if node["class_type"] == TRAIN)
    train["inputs"] |= {"min_snr_gamma": 5.0, "lr_warmup_steps": 0.1, "conv_dim": 4, "clip_skip": 1}
    graph = {i: node for i, node in graph.items() if node["class_type"] not in (GRID, "PreviewAny")}
    pasted = next(node for node in graph.values() if node["class_type"] == "LoraGraftKohyaConfig")
    pasted["inputs"]["config"] = config
    guide.run(server, graph)
    return guide.settings(server)
