"""Every node, widget and output is translated into all four languages, and every node has a help page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from loragraft.nodes import widgets

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
SIMPLIFIED, TRADITIONAL = set("训练图类词损学习层缩显"), set("訓練圖類詞損學習層縮顯")


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


def test_the_two_chinese_scripts_are_not_mixed_up() -> None:
    for folder, wrong in (("zh", TRADITIONAL - SIMPLIFIED), ("zh-TW", SIMPLIFIED - TRADITIONAL)):
        texts = [json.dumps(DEFS[folder], ensure_ascii=False), json.dumps(MAIN[folder], ensure_ascii=False)]
        texts += [page.read_text("utf-8") for page in (ROOT / "js" / "docs").glob(f"*/{folder}.md")]
        for text in texts:
            assert not wrong & set(text), f"{folder}: {wrong & set(text)}"


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
    known = {name for node in DEFS["en"].values() for name in node.get("inputs", {})}
    known |= {output["name"] for node in DEFS["en"].values() for output in node["outputs"].values()}
    for page in (ROOT / "js" / "docs").glob("*/*.md"):
        text = page.read_text("utf-8")
        for code in re.findall(r"LG-[A-Z]+-\d{3}", text):
            assert f'"{code}"' in source, f"{page.parent.name}/{page.name}: {code}"
        for entry in re.findall(r"^- ([^:：]*)[:：]", text, re.MULTILINE):
            for name in re.findall(r"`([a-z_]+)`", entry):
                assert name in known, f"{page.parent.name}/{page.name}: {name}"
