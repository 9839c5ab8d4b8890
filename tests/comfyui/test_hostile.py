"""A shared workflow is untrusted: no text in any widget reaches a file outside the folders it may reach.

The oracle: canary files outside every root, an audit hook inside the server that notes who touches
them (or opens a socket, a program, a pickle), and the list of files that appeared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy, error_text

PATHS = [
    "../canary",
    "..",
    "../..",
    "a/../../canary",
    "./../canary",
    "{canary}",
    "{canary}/",
    "//{canary}",
    "/etc",
    "/",
    "~",
    "~/canary",
    "~root",
    "$HOME/canary",
    "${{HOME}}",
    "%USERPROFILE%",
    "..\\canary",
    "a\\..\\..\\canary",
    "C:\\Windows",
    "C:canary",
    "D:/canary",
    "\\\\host\\share",
    "//host/share",
    "file:///etc",
    "http://127.0.0.1/canary",
    "link",
    "link/inner",
    "link/../link",
    "CON",
    "nul",
    "COM1.png",
    "a:stream",
    "name.",
    "name ",
    "new\nline",
    "tab\tname",
    "nul\x00byte",
    "{long}",
    "{huge}",
    "{{{{7*7}}}}",
    "<img src=x onerror=alert(1)>",
    "a|b",
    "*",
    "?",
    "",
    " ",
    "[demo]/../../canary",
    "[output]",
    "../canary [output]",
    "{base}/input/../canary",
    "{base}/input/link",
    "{base}/inputs",
    "{base}/models",
    "{base}",
    "{base}/user",
]
# As one file's name these are odd, but they stay below models/loras.
HARMLESS_NAMES = ("~", "~root", "${{HOME}}", "%USERPROFILE%", "link", "{{{{7*7}}}}", "[output]")


@pytest.fixture(scope="module")
def canary(server: Comfy) -> Iterator[Path]:
    folder = server.base.parent / "canary"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "secret.png")
    (folder / "secret.txt").write_text("canary caption", "utf-8")
    (folder / "secret.safetensors").write_bytes(b"canary")
    inside = server.base / "input" / "link"
    inside.symlink_to(folder, target_is_directory=True)
    (server.base / "models/loras" / "link").symlink_to(folder, target_is_directory=True)
    audit(server)
    before = tree(folder)
    yield folder
    assert tree(folder) == before


def tree(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*"))


def audit(server: Comfy, plant: str = "") -> list[str]:
    found: list[str] = prompts.answer(
        server.run({"audit": prompts.node("ProbeAudit", plant=plant)}), "audit"
    )["found"]
    return found


def payload(text: str, server: Comfy, canary: Path) -> str:
    return text.format(canary=canary, base=server.base, long="a" * 300, huge="b/" * 500_000)


def outcome(server: Comfy, graph: prompts.Prompt) -> str:
    """Post a graph; return "" where it ran, else the refusal, which must be one of ours."""
    status, answer = server.post_prompt(graph)
    if status != 200 or answer.get("node_errors"):
        errors = [e for n in answer["node_errors"].values() for e in n["errors"]]
        assert errors and all(
            e["type"] in ("custom_validation_failed", "value_not_in_list") for e in errors
        ), errors
        return str(errors[0]["details"])
    entry = server.wait(answer["prompt_id"])
    if entry["status"]["status_str"] == "success":
        return ""
    message = next(data for kind, data in entry["status"]["messages"] if kind == "execution_error")
    assert "LoraGraftError" in message["exception_type"], (
        message["exception_type"] + message["exception_message"]
    )
    return error_text(entry)


def test_the_oracle_sees_a_planted_hole(server: Comfy, canary: Path) -> None:
    assert any("secret.txt" in line for line in audit(server, str(canary / "secret.txt")))


def test_no_path_leaves_the_roots(server: Comfy, canary: Path) -> None:
    for linked in (False, True):  # a linked text is only seen when the node runs
        for text in PATHS:
            path = payload(text, server, canary)
            graph = prompts.dataset_nodes(path)
            if linked:
                graph["text"] = prompts.node("PrimitiveString", value=path)
                graph["folder"]["inputs"]["path"] = ["text", 0]
            graph["show"] = prompts.node("PreviewAny", source=["folder", 1])
            said = outcome(server, graph)
            assert said and ("LG-PATH" in said or "LG-NODE-020" in said or "LG-DATA" in said), (text, said)
            assert "canary caption" not in said
    assert audit(server) == []


def test_an_outside_folder_is_answered_with_the_line_to_add(server: Comfy, canary: Path) -> None:
    graph = prompts.dataset_nodes(str(canary)) | {"show": prompts.node("PreviewAny", source=["folder", 1])}
    said = outcome(server, graph)
    listed = server.base / "user" / "__loragraft" / "folders.txt"
    assert "LG-NODE-020" in said and f"add the line {canary} to {listed}" in said
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text(f"# my folders\n{canary}\nrelative/is/ignored\n", "utf-8")
    try:
        assert outcome(server, graph) == ""
        graph["folder"]["inputs"]["path"] = f"{canary}/../input"
        assert outcome(server, graph)
    finally:
        listed.unlink()
    assert "LG-NODE-020" in outcome(
        server,
        prompts.dataset_nodes(str(canary)) | {"show": prompts.node("PreviewAny", source=["folder", 1])},
    )
    audit(server)


def test_folders_below_the_roots_are_read_by_any_spelling(server: Comfy) -> None:
    for root, spellings in (
        ("input", ("fine", "./fine/", "{base}/input/fine", "fine [input]")),
        ("output", ("fine [output]", "{base}/output/fine/")),
    ):
        folder = server.base / root / "fine"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), "blue").save(folder / "a.png")
        (folder / "a.txt").write_text("a blue square", "utf-8")
        for text in spellings:
            path = text.format(base=server.base)
            graph = prompts.dataset_nodes(path) | {"show": prompts.node("PreviewAny", source=["folder", 1])}
            assert outcome(server, graph) == "", path


def test_no_name_writes_outside_the_loras_folder(server: Comfy, canary: Path) -> None:
    before = {f for f in server.base.parent.rglob("*") if f.is_file()}
    for text in (p for p in PATHS if p not in HARMLESS_NAMES):
        name = payload(text, server, canary)
        said = outcome(server, prompts.train_prompt(output_name=name, max_train_steps=1))
        assert "LG-PATH" in said or "LG-CFG" in said, (text, said)
    new = {f for f in server.base.parent.rglob("*") if f.is_file()} - before
    new = {f for f in new if not f.is_relative_to(server.base / "temp")}  # Build Dataset shows its report
    assert not {f for f in new if f.suffix in (".safetensors", ".txt", ".png")}, new
    assert audit(server) == []


def test_no_lora_name_reads_outside_the_loras_folder(server: Comfy, canary: Path) -> None:
    for text in PATHS:
        for suffix in ("", "/secret.safetensors", ".safetensors"):
            name = payload(text, server, canary) + suffix
            graph = {
                "base": prompts.node("LoraGraftLoadDemoBase"),
                "preview": prompts.preview_node(lora_name=name),
            }
            assert outcome(server, graph), text
    assert audit(server) == []


def test_hostile_words_in_every_text_stay_words(server: Comfy, canary: Path) -> None:
    words = (
        f"../{canary.name} {{{{7*7}}}} <script>alert(1)</script> ${{HOME}} \x07 embedding:../../canary/secret"
    )
    graph = prompts.demo_prompt(
        train={
            "output_name": "words",
            "max_train_steps": 1,
            "seed": 81,
            "metadata_title": words,
            "training_comment": words,
            "metadata_trigger_phrase": words,
            "sample_prompts": words,
        },
        preview={"prompts": words, "negative": words, "steps": 1},
    )
    graph["folder"]["inputs"]["class_tokens"] = words
    assert outcome(server, graph) == ""
    assert audit(server) == []
    assert (server.base / "models/loras/words.safetensors").is_file()


def test_widgets_of_a_wrong_kind_are_refused(server: Comfy) -> None:
    wrong: list[tuple[str, str, Any]] = [
        ("folder", "on_bad", "delete"),
        ("train", "lr_scheduler", "__import__('os')"),
        ("train", "mixed_precision", "fp4"),
        ("train", "network_dim", "many"),
        ("train", "learning_rate", "NaN"),
        ("train", "max_train_steps", 10**30),
        ("train", "seed", -1),
    ]
    for name, widget, value in wrong:
        graph = prompts.train_prompt(output_name="never", max_train_steps=1)
        graph[name]["inputs"][widget] = value
        status, answer = server.post_prompt(graph)
        if status == 200:  # Build Dataset can run by itself, whatever is wrong with Train LoRA
            entry = server.wait(answer["prompt_id"])
            assert name in answer["node_errors"] or "LG-" in error_text(entry), (widget, value)


# ---- the dataset's nodes ----

PLACES = (
    *("mask_folder", "caption_json", "convert name", "convert prefix", "frames path", "frames name"),
    *("images name", "config file", "export name"),
)


@pytest.fixture(scope="module")
def small(server: Comfy) -> Path:
    """Return a folder with one picture and a video."""
    from loragraft_tests.trainer.videos import encode, scene

    folder = server.base / "input" / "hostile" / "1_x"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), "blue").save(folder / "a.png")
    encode(server.base / "input" / "hostile_films" / "a.mp4", [scene(n) for n in range(3)])
    return folder


def dataset_graph(place: str, text: str) -> prompts.Prompt:
    """Return a graph in which one text of one dataset node is hostile."""
    graph = {"folder": prompts.dataset_nodes("hostile")["folder"]}
    source: list[Any] = ["folder", 0]
    if place == "mask_folder":
        graph["folder"]["inputs"] |= {"masks": "folder", "mask_folder": text}
    elif place == "caption_json":
        graph["folder"]["inputs"]["caption_json"] = text
    elif place.startswith("convert"):
        values = {"name": "hostile", "prefix": "", place.removeprefix("convert "): text}
        graph["node"] = prompts.node(
            "LoraGraftConvertImages", dataset=source, format="png", quality=0, names="number", **values
        )
    elif place.startswith("frames"):
        values = {"path": "hostile_films", "name": "hostile_films", place.removeprefix("frames "): text}
        graph["node"] = prompts.node(
            "LoraGraftFrameExtract",
            mode="every_n_frames",
            every_n_frames=1,
            every_n_seconds=1.0,
            start=0.0,
            end=0.0,
            max_frames=2,
            skip_blurred=False,
            skip_similar=False,
            image_format="png",
            recursive=True,
            class_tokens="x",
            default_repeats=1,
            on_bad="stop",
            **values,
        )
    elif place == "images name":
        graph["pictures"] = prompts.node("EmptyImage", width=64, height=64, batch_size=1, color=0)
        graph["node"] = prompts.node(
            "LoraGraftImagesToDataset",
            images=["pictures", 0],
            name=text,
            image_format="png",
            class_tokens="x",
        )
    elif place == "config file":
        graph = {
            "node": prompts.node(
                "LoraGraftLoadDatasetConfig", file=text, resolution=64, on_bad="stop", missing_captions="stop"
            )
        }
    elif place == "export name":
        graph |= {"build": prompts.dataset_nodes("hostile")["build"]}
        graph["node"] = prompts.node(
            "LoraGraftExportDataset",
            train_set=["build", 0],
            name=text,
            format="png",
            quality=97,
            relative=False,
        )
    shown = "node" if "node" in graph else "folder"
    return graph | {"show": prompts.node("PreviewAny", source=[shown, 1])}


@pytest.mark.parametrize("place", PLACES)
def test_no_text_of_a_dataset_node_leaves_the_roots(
    server: Comfy, canary: Path, small: Path, place: str
) -> None:
    outside = [p for p in server.base.parent.iterdir() if p != server.base and not p.is_symlink()]
    before = {p: tree(p) for p in outside}
    refused = 0
    for text in PATHS:
        path = payload(text, server, canary)
        said = outcome(server, dataset_graph(place, path))
        if said:
            assert "LG-" in said, (text, said)
            refused += 1
        assert "canary caption" not in said
    assert refused > len(PATHS) / 2, "most of these name nothing that a workflow may touch"
    assert audit(server) == []
    assert {p: tree(p) for p in outside} == before
