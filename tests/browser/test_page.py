"""The nodes in the real page: there, translated, explained, without errors, in both renderers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loragraft_tests.browser.conftest import Open
from loragraft_tests.comfyui.harness import Comfy
from loragraft_tests.comfyui.node_table import NODES as TABLE
from loragraft_tests.comfyui.sheet import DYNAMIC, WIDGETS

ROOT = Path(__file__).resolve().parents[2]
NODES = list(TABLE)
LANGUAGES = ("en", "zh", "zh-TW", "ru")


def defs(language: str) -> dict[str, Any]:
    """Return our node translations."""
    found: dict[str, Any] = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    return found


@pytest.mark.parametrize("nodes2", [False, True], ids=["canvas", "nodes2"])
@pytest.mark.parametrize("light", [False, True], ids=["dark", "light"])
def test_all_nodes_open_without_errors(open_comfy: Open, nodes2: bool, light: bool) -> None:
    with open_comfy(nodes2=nodes2, light=light) as page:
        ids = page.build(*NODES)
        assert len(ids) == len(NODES)
        train = ids[NODES.index("LoraGraftTrainLoRA")]
        page.frame()
        page.wait("phase(a[0]) === 'idle'", train)
        page.wait("panel(a[0]).clientWidth > 100", train)
        assert (
            page.raw.evaluate(
                "() => window.probe.app.extensions.filter((e) => e.name === 'LoraGraft').length"
            )
            == 1
        )
        page.shoot(f"nodes-{'nodes2' if nodes2 else 'canvas'}-{'light' if light else 'dark'}")
        assert page.our_errors() == [] and page.dialogs == []


@pytest.mark.parametrize("language", ["zh", "zh-TW", "ru"])
def test_titles_and_widgets_are_translated(open_comfy: Open, language: str) -> None:
    with open_comfy(locale=language) as page:
        ids = page.build(*NODES)
        page.frame()
        wanted = defs(language)
        for name, number in zip(NODES, ids, strict=True):
            assert page.ask("node(a[0]).title", number) == wanted[name]["display_name"]
            for widget, label in page.ask("labels(a[0])", number):
                entry = wanted[name].get("inputs", {}).get(widget.replace(".", "_"))
                assert entry is None or label == entry["name"], f"{name}.{widget} reads {label}"
        train = ids[NODES.index("LoraGraftTrainLoRA")]
        page.wait("phase(a[0]) === 'idle'", train)
        idle = {"zh": "尚未训练", "zh-TW": "尚未訓練", "ru": "Ещё не обучалось"}[language]
        assert page.ask("part(a[0], 'phase')", train) == idle
        page.shoot(f"nodes-{language}")
        assert page.our_errors() == []


def test_the_running_page_changes_language(open_comfy: Open) -> None:
    with open_comfy() as page:
        page.build("LoraGraftTrainLoRA")
        page.set("Comfy.Locale", "zh")
        page.wait("part(app.rootGraph.nodes[0].id, 'phase') === a[0]", "尚未训练")


def inputs_of(groups: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a schema by the key of their texts; what a choice shows is "choice_name"."""
    found = {**groups.get("required", {}), **groups.get("optional", {})}
    for name, (kind, options) in list(found.items()):
        for option in options["options"] if kind == DYNAMIC else ():
            found |= {f"{name}_{key}": spec for key, spec in inputs_of(option["inputs"]).items()}
    return found


def test_locales_fit_the_live_schema(server: Comfy) -> None:
    """Every input and output that ComfyUI knows has an entry, and no entry is left over."""
    info = {name: schema for name, schema in server.object_info().items() if name.startswith("LoraGraft")}
    assert sorted(info) == sorted(NODES)
    served = server.get("/i18n")
    for language in LANGUAGES:
        for name, schema in info.items():
            entry = defs(language)[name]
            inputs = inputs_of(schema["input"])
            extra = (
                {"control_after_generate"}
                if any(s[1].get("control_after_generate") for s in inputs.values())
                else set()
            )
            assert set(entry.get("inputs", {})) == set(inputs) | extra, f"{language} {name}"
            assert len(entry["outputs"]) == len(schema["output"]), f"{language} {name}"
            assert served[language]["nodeDefs"][name] == entry
            if language == "en":
                assert entry["description"] == schema["description"]
                for widget, (_, options) in inputs.items():
                    assert entry["inputs"][widget]["tooltip"] == options["tooltip"], f"{name}.{widget}"
                tooltips = [entry["outputs"][str(i)]["tooltip"] for i in range(len(schema["output"]))]
                assert tooltips == schema["output_tooltips"]


def test_help_pages_are_served(server: Comfy) -> None:
    for name in NODES:
        for language in LANGUAGES:
            status, page = server.request("GET", f"/extensions/ComfyUI-LoraGraft/docs/{name}/{language}.md")
            assert status == 200 and page["text"].startswith("# ")


def test_the_help_opens(open_comfy: Open) -> None:
    with open_comfy(locale="zh") as page:
        page.build("LoraGraftTrainLoRA")
        page.frame()
        page.ask("app.canvas.ds.offset.splice(1, 1, a[0])", 250)  # the toolbox is above the node
        page.ask("app.canvas.selectNode(probe.app.rootGraph.nodes[0])")
        page.raw.get_by_test_id("info-button").click()
        page.raw.get_by_text("取消不会丢失进度").wait_for(timeout=20_000)
        page.shoot("help-zh")


def test_no_socket_of_ours_becomes_a_widget(open_comfy: Open, server: Comfy) -> None:
    """The page makes a widget of some socket types, and then sends a value that nobody chose."""
    schemas = server.object_info()
    ours = {kind: schemas[kind]["input"] for kind in NODES}
    with open_comfy() as page:
        ids = page.build(*ours)
        output = page.ask("app.graphToPrompt()")["output"]
    for node, (kind, inputs) in zip(ids, ours.items(), strict=True):
        every = {**inputs.get("required", {}), **inputs.get("optional", {})}
        sockets = {
            name for name, spec in every.items() if spec[0] not in WIDGETS and isinstance(spec[0], str)
        }
        sent = output[node]["inputs"].keys() & sockets
        assert not sent, f"{kind} sends {sorted(sent)} unlinked"
