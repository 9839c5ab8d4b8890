"""Every node, widget and output is translated into all four languages, and every node has a help page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from loragraft.nodes import widgets
from loragraft.nodes.settings_groups import GROUPS, Group
from loragraft.trainer.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh", "zh-TW", "ru")
OTHERS = LANGUAGES[1:]
DEFS: dict[str, dict[str, Any]] = {
    lang: json.loads((ROOT / "locales" / lang / "nodeDefs.json").read_text("utf-8")) for lang in LANGUAGES
}
MAIN: dict[str, dict[str, Any]] = {
    lang: json.loads((ROOT / "locales" / lang / "main.json").read_text("utf-8")) for lang in LANGUAGES
}
NODES = (
    *("LoadDemoBase", "LoadImageFolder", "FrameExtract", "ConvertImages", "FindDuplicates", "Crop"),
    *("WD14Tag", "DownloadTagger", "EditCaptions", "SetCaptions", "DatasetToImages", "ImagesToDataset"),
    *("BuildDataset", "LoadDatasetConfig", "ExportDataset", "Sweep", "TrainLoRA", "PreviewWithLoRA"),
    *("ResizeLoRA", "MergeLoRAs", "MergeIntoCheckpoint", "ExtractLoRA", "CheckLoRA", "LoRAMetadata"),
    *("ConvertLoRA", "ConvertCheckpoint"),
    *("Network", "Blocks", "Optimizer", "Schedule", "Loss", "Text", "Saving", "KohyaConfig"),
)
TABLES = {"LoraGraftBuildDataset": widgets.dataset_widgets(), "LoraGraftTrainLoRA": widgets.train_widgets()}
# The frontend reads these as vue-i18n messages, in which they are syntax.
SYNTAX = re.compile(r"[{}@|]")
# Character sets that lack the signs of the other script.
SCRIPTS = {"zh": "gb2312", "zh-TW": "big5"}


def leaves(value: Any, path: str = "") -> dict[str, str]:
    """Flatten nested objects into {"a/b/c": text}."""
    if isinstance(value, dict):
        return {k: v for name, child in value.items() for k, v in leaves(child, f"{path}/{name}").items()}
    assert isinstance(value, str), path
    return {path: value}


def test_every_node_is_there() -> None:
    for lang in LANGUAGES:
        assert list(DEFS[lang]) == [f"LoraGraft{name}" for name in NODES]


@pytest.mark.parametrize("lang", OTHERS)
def test_the_same_entries_as_in_english(lang: str) -> None:
    assert leaves(DEFS[lang]).keys() == leaves(DEFS["en"]).keys()
    assert leaves(MAIN[lang]).keys() == leaves(MAIN["en"]).keys()


@pytest.mark.parametrize("node", TABLES)
def test_every_setting_has_an_entry(node: str) -> None:
    for widget in TABLES[node]:
        assert DEFS["en"][node]["inputs"][widget.name] == {"name": widget.name, "tooltip": widget.tooltip}
        for lang in OTHERS:
            entry = DEFS[lang][node]["inputs"][widget.name]
            # The English guides speak of network_dim, so the translated tooltip names it too.
            assert widget.name in entry["tooltip"], f"{lang} {widget.name}"


def keys_of(group: Group) -> dict[str, str]:
    """Return {key: setting} of a settings node's widgets.

    What a choice shows is a widget called "algo.conv_dim"; the frontend looks for its texts under that name
    with "_" for ".".
    """
    shown = {f"{group.choice}_{name}": name for names in group.options.values() for name in names}
    return {name: name for name in (group.choice, *group.always) if name} | shown


@pytest.mark.parametrize("group", GROUPS.values(), ids=lambda group: group.node_id)
def test_every_setting_of_the_settings_nodes_has_an_entry(group: Group) -> None:
    table = {w.name: w for w in widgets.widgets_of(TrainConfig, group.names)}
    node, keys = DEFS["en"][group.node_id], keys_of(group)
    assert (node["display_name"], node["description"]) == (group.title, group.description)
    assert node["inputs"].keys() == {*keys, "settings"}
    for key, name in keys.items():
        assert node["inputs"][key] == {"name": name, "tooltip": table[name].tooltip}
        for lang in OTHERS:
            assert name in DEFS[lang][group.node_id]["inputs"][key]["tooltip"], f"{lang} {name}"


@pytest.mark.parametrize("lang", OTHERS)
def test_a_setting_is_called_the_same_on_every_node(lang: str) -> None:
    on_train = DEFS[lang]["LoraGraftTrainLoRA"]["inputs"]
    for group in GROUPS.values():
        for key, name in keys_of(group).items():
            if name in on_train:
                assert DEFS[lang][group.node_id]["inputs"][key] == on_train[name]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_texts_can_be_shown(lang: str) -> None:
    for path, text in {**leaves(DEFS[lang]), **leaves(MAIN[lang])}.items():
        assert text.strip() == text and text, f"{lang} {path} is empty or has spaces around it"
        assert not SYNTAX.search(text), f"{lang} {path}: {text}"


@pytest.mark.parametrize("lang", OTHERS)
def test_nothing_stayed_english(lang: str) -> None:
    english = leaves(DEFS["en"])
    for path, text in leaves(DEFS[lang]).items():
        if path.endswith(("/tooltip", "/description", "/display_name")):
            assert text != english[path], f"{lang} {path}"


@pytest.mark.parametrize("lang", SCRIPTS)
def test_the_two_chinese_scripts_are_not_mixed_up(lang: str) -> None:
    texts = [json.dumps(DEFS[lang], ensure_ascii=False), json.dumps(MAIN[lang], ensure_ascii=False)]
    texts += [page.read_text("utf-8") for page in (ROOT / "js" / "docs").glob(f"*/{lang}.md")]
    for sign in sorted(set(re.findall("[\u4e00-\u9fff]", "".join(texts)))):
        assert sign.encode(SCRIPTS[lang], "ignore"), f"{lang}: {sign}"


@pytest.mark.parametrize("node", [f"LoraGraft{name}" for name in NODES])
@pytest.mark.parametrize("lang", LANGUAGES)
def test_help_page(node: str, lang: str) -> None:
    page = (ROOT / "js" / "docs" / node / f"{lang}.md").read_text("utf-8")
    english = (ROOT / "js" / "docs" / node / "en.md").read_text("utf-8")
    assert page.splitlines()[0] == f"# {DEFS[lang][node]['display_name']}"
    assert page.count("\n## ") == english.count("\n## "), "the same sections"
    assert page.count("\n- ") == english.count("\n- "), "the same entries"
    assert set(re.findall(r"LG-[A-Z]+-\d{3}", page)) == set(re.findall(r"LG-[A-Z]+-\d{3}", english))
    for output in DEFS["en"][node]["outputs"].values():
        assert f"`{output['name']}`" in page, f"the output {output['name']} is not explained"


def test_help_pages_name_only_what_exists() -> None:
    source = "".join(p.read_text("utf-8") for d in ("nodes", "trainer") for p in (ROOT / d).rglob("*.py"))
    known = {entry["name"] for node in DEFS["en"].values() for entry in node.get("inputs", {}).values()}
    known |= {output["name"] for node in DEFS["en"].values() for output in node["outputs"].values()}
    for page in (ROOT / "js" / "docs").glob("*/*.md"):
        text = page.read_text("utf-8")
        for code in re.findall(r"LG-[A-Z]+-\d{3}", text):
            assert f'"{code}"' in source, f"{page.parent.name}/{page.name}: {code}"
        for entry in re.findall(r"^- ([^:：]*)[:：]", text, re.MULTILINE):
            for name in re.findall(r"`([a-z_]+)`", entry):
                assert name in known, f"{page.parent.name}/{page.name}: {name}"
