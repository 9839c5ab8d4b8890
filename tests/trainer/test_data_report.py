"""The report: its numbers, its hints, and its forms as text, JSON, HTML and pictures."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.config import DatasetConfig
from loragraft.trainer.data.records import Dataset
from loragraft.trainer.data.report_data import Viewpoint, caption_style, report_data
from loragraft.trainer.data.report_html import report_html, save_report_html
from loragraft.trainer.data.report_images import picture_files, report_pictures
from loragraft.trainer.data.report_text import report_lines, save_report_json
from loragraft.trainer.data.scan import scan_folder
from loragraft.trainer.data.train_set import TrainSet, build_train_set
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import fill
from loragraft_tests.trainer.made_records import records

DOCS = Path(__file__).resolve().parents[2] / "docs" / "dataset-report.md"


def with_captions(*captions: str, concept: str = "zogi", size: tuple[int, int] = (512, 512)) -> Dataset:
    dataset = records(*[size] * len(captions))
    return dataset.replaced(
        dataclasses.replace(r, caption=c, concept=concept, name=f"x/{r.name}")
        for r, c in zip(dataset.records, captions, strict=True)
    )


def hints(dataset: Dataset, view: Viewpoint | None = None, **config: Any) -> dict[str, dict[str, Any]]:
    """Return the hints about a dataset by their id; each says what to do and who says so."""
    report = report_data(build_train_set(dataset, DatasetConfig(**config)), view)
    for hint in report["warnings"]:
        assert hint["fix"] and hint["source"] and hint["text"].endswith(".")
    return {hint["id"]: hint for hint in report["warnings"]}


def many(n: int, caption: str = "zogi, a, b") -> list[str]:
    return [f"{caption} {i}" for i in range(n)]


# ---- numbers ----


def test_counts_and_concepts() -> None:
    dataset = records(*[(512, 512)] * 6, (1024, 256))
    made = [
        dataclasses.replace(r, concept="a" if i < 4 else "b", repeats=2 if i < 4 else 3, is_reg=i == 6)
        for i, r in enumerate(dataset.records)
    ]
    train_set = build_train_set(dataset.replaced(made), DatasetConfig())
    report = report_data(train_set, Viewpoint(batch_size=4, epochs=10))
    assert report["images"] == {
        "used": 7,
        "training": 6,
        "regularisation": 1,
        "validation": 0,
        "masked": 0,
        "samples": 14 + 14,
        "regularisation_samples": 14,
    }
    assert report["concepts"] == [
        {"name": "a", "regularisation": False, "images": 4, "repeats": [2], "samples": 8, "share": 0.5714},
        {"name": "b", "regularisation": False, "images": 2, "repeats": [3], "samples": 6, "share": 0.4286},
        {"name": "b", "regularisation": True, "images": 1, "repeats": [14], "samples": 14, "share": None},
    ]
    (group,) = report["groups"]
    assert [
        (b["size"], b["images"], b["samples"], b["batches"], b["leftover"]) for b in group["buckets"]
    ] == [
        ([512, 512], 6, 14, 4, 2),
        ([1024, 256], 1, 14, 4, 2),
    ]
    steps = report["steps"]
    assert (steps["formula"], steps["steps_per_epoch"], steps["steps"]) == (70.0, 8, 80)
    assert steps["batches_by_size"] == [[1, 28, 28], [2, 14, 14], [4, 8, 7], [8, 4, 4]]
    assert json.loads(json.dumps(report)) == report


def test_tags_and_lengths() -> None:
    dataset = with_captions("zogi, hat, red", "zogi, hat", "zogi, a very special thing")
    report = report_data(build_train_set(dataset, DatasetConfig()))
    assert report["tags"]["top"][:2] == [["zogi", 3], ["hat", 2]]
    assert report["tags"]["in_all"] == ["zogi"]
    assert report["tags"]["num_in_one"] == 2
    assert report["captions"]["within"] == {"75": 3, "150": 3, "225": 3}
    assert "estimate" in report["captions"]["counted_by"]
    view = Viewpoint(num_tokens=lambda text: 80 if "special" in text else 10)
    report = report_data(build_train_set(dataset, DatasetConfig()), view)
    assert report["captions"]["within"] == {"75": 2, "150": 3, "225": 3}
    assert report["captions"]["over"] == ["x/2.png"]
    assert report["captions"]["longest"] == ["x/2.png", 80]
    assert report["captions"]["counted_by"] == "the tokenizer"


@pytest.mark.parametrize(
    ("caption", "style"),
    [
        ("1girl, solo, short hair", "tags"),
        ("a photo of a man who walks along the beach at night", "sentence"),
        ("He sits on a chair.", "sentence"),
        ("zogi", "words"),
        ("", "none"),
    ],
)
def test_styles_of_captions(caption: str, style: str) -> None:
    assert caption_style(caption, ",") == style


# ---- hints ----


def test_a_good_dataset_has_none() -> None:
    assert not hints(with_captions(*many(60)), Viewpoint(kind="character"))


def test_shapes() -> None:
    dataset = with_captions(*many(60))
    made = list(dataset.records)
    made[0] = dataclasses.replace(made[0], size=(400, 1000))
    made[1] = dataclasses.replace(made[1], size=(200, 200))
    found = hints(dataset.replaced(made))
    assert found["aspect"]["names"] == ["x/0.png"] and "1:2" in found["aspect"]["text"]
    assert found["small"]["names"] == ["x/1.png"] and "2.6 times" in found["small"]["text"]
    assert "more than 2 times" in found["small"]["fix"]
    exact = dataset.replaced([dataclasses.replace(made[0], size=(500, 1000)), *made[2:]])
    assert "aspect" not in hints(exact), "1:2 itself is fine"
    found = hints(dataset.replaced(made[2:]), enable_bucket=False, resolution=(512, 448))
    assert found["not_bucketed"]["num_names"] == 58


def test_copies() -> None:
    dataset = with_captions(*many(60))
    made = list(dataset.records)
    made[1] = dataclasses.replace(made[1], content_hash=made[0].content_hash)
    assert hints(dataset.replaced(made))["duplicates"]["names"] == ["x/0.png = x/1.png"]
    made[1] = dataclasses.replace(made[1], crop=(0, 0, 5, 5))
    assert "duplicates" not in hints(dataset.replaced(made)), "another crop is another picture"
    near = Viewpoint(near=[["x/2.png", "x/3.png"]])
    assert hints(dataset, near)["near_duplicates"]["names"] == ["x/2.png ~ x/3.png"]


@pytest.mark.parametrize(
    ("kind", "fewest", "mention"),
    [
        ("character", 50, "50 to 100"),
        ("style", 75, "75 to 150"),
        ("concept", 50, "varied"),
        ("face", 20, "face"),
    ],
)
def test_too_few_for_the_kind(kind: str, fewest: int, mention: str) -> None:
    assert "few" not in hints(with_captions(*many(fewest)), Viewpoint(kind=kind))
    assert mention in hints(with_captions(*many(fewest - 1)), Viewpoint(kind=kind))["few"]["text"]


def test_regularisation_below_thirty_images() -> None:
    for n, expected in ((30, False), (29, True)):
        dataset = with_captions(*many(n))
        made = [*dataset.records, dataclasses.replace(dataset.records[0], name="reg/r.png", is_reg=True)]
        assert ("reg_few" in hints(dataset.replaced(made))) is expected


def test_imbalance() -> None:
    dataset = with_captions(*many(60))
    for n, expected in ((24, False), (23, True)):
        made = [
            dataclasses.replace(r, concept="b" if i < n else "zogi") for i, r in enumerate(dataset.records)
        ]
        assert ("imbalance" in hints(dataset.replaced(made))) is expected
    made = [dataclasses.replace(r, concept="b" if i < 5 else "zogi") for i, r in enumerate(dataset.records)]
    assert "imbalance" not in hints(dataset.replaced(made), balance_concepts=True)


def test_tags_that_tell_of_trouble() -> None:
    captions = many(20)
    captions[0] += ", Watermark"
    captions[1] += ", artist_name"
    captions[2] += ", 6+girls"
    found = hints(with_captions(*captions))
    assert found["watermark"]["names"] == ["x/0.png", "x/1.png"]
    assert found["people"]["names"] == ["x/2.png"]
    common = [f"{c}, white background" if i < 13 else c for i, c in enumerate(many(20))]
    assert "13 of 20" in hints(with_captions(*common))["background"]["text"]
    common[12] = common[12].replace("white", "other")
    assert "background" not in hints(with_captions(*common)), "60 % is not more than 60 %"


def test_words() -> None:
    mixed = many(18)
    for i in range(3):
        mixed[i] = f"zogi walks along the beach in the late evening {i}"
    assert hints(with_captions(*mixed))["styles"]["text"].startswith("15 captions are lists of tags and 3")
    assert "long" in hints(with_captions(*many(15), " ".join(["zogi"] * 80)))
    assert "no_trigger" in hints(with_captions(*many(20, "a, b, c")))
    assert "no_trigger" not in hints(with_captions(*many(19, "a, b, c"), "Zogi, x"))
    assert "no_trigger" not in hints(with_captions(*many(20, "a, b, c")), caption_prefix="zogi,")
    assert "keep_tokens" in hints(with_captions(*many(20)), shuffle_caption=True)
    assert "keep_tokens" not in hints(with_captions(*many(20)), shuffle_caption=True, keep_tokens=1)
    known = Viewpoint(known_word=lambda word: "12,000 pictures are tagged so" if word == "zogi" else None)
    assert "12,000 pictures" in hints(with_captions(*many(20)), known)["known_trigger"]["text"]
    assert "known_trigger" not in hints(with_captions(*many(20), concept="xxx"), known)


def test_batches_larger_than_buckets() -> None:
    dataset = with_captions(*many(20))
    made = [
        dataclasses.replace(r, size=(768, 512) if i < 3 else (512, 512))
        for i, r in enumerate(dataset.records)
    ]
    found = hints(dataset.replaced(made), Viewpoint(batch_size=4))
    assert found["batch"]["names"] == ["384x640 (3)"]
    assert "batch" not in hints(dataset.replaced(made), Viewpoint(batch_size=3))


def test_every_hint_and_every_guide_is_in_the_docs() -> None:
    source = (Path(__file__).resolve().parents[2] / "trainer" / "data" / "advice.py").read_text("utf-8")
    ids = set(re.findall(r'Advice\(\s*"([a-z_]+)"', source))
    guides = set(re.findall(r'^[A-Z_]+ = "([^"]+)"$', source, re.MULTILINE))
    text = DOCS.read_text("utf-8")
    assert len(ids) >= 15 and len(guides) == 4
    assert not [i for i in ids if f"`{i}`" not in text]
    assert not [g for g in guides if g not in text]


# ---- forms ----


def real(tmp_path: Path) -> TrainSet:
    files: dict[str, Any] = {f"2_zogi/{i}.png": (96 + 8 * i, 64) for i in range(5)}
    files |= {f"2_zogi/{i}.txt": f"zogi, tag {i}, \u732b" for i in range(4)}
    config = DatasetConfig(resolution=64, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=32)
    return build_train_set(scan_folder(fill(tmp_path / "set", files)), config)


def test_text_holds_everything(tmp_path: Path) -> None:
    train_set = real(tmp_path)
    report = report_data(train_set, Viewpoint(batch_size=2, epochs=3))
    text = "\n".join(report_lines(report))
    for part in (
        "5 images in set",
        "size  images",
        "most frequent: zogi 5",
        "Caption lengths",
        "Steps: 10 images",
    ):
        assert part in text, part
    assert "What to do:" in text and "[few]" in text
    file = tmp_path / "report.json"
    save_report_json(report, file)
    assert json.loads(file.read_text("utf-8")) == report
    assert str(tmp_path) not in file.read_text("utf-8"), "no absolute path leaves the machine"


def test_pictures_show_what_training_sees(tmp_path: Path) -> None:
    train_set = real(tmp_path)
    report = report_data(train_set)
    seen: list[tuple[int, int]] = []
    pictures = report_pictures(train_set, report, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]
    names = [name for name, _ in picture_files(pictures)]
    assert names == ["what-training-sees.png", "short-sides-of-the-images.png", "most-frequent-tags.png"]
    for _, image in pictures:
        assert image.size[0] > 500 and len(image.getcolors(maxcolors=2**24) or ()) > 10
    (tmp_path / "set" / "2_zogi" / "0.png").unlink()
    assert report_pictures(train_set, report), "a file that is gone leaves a grey field"
    sheet = pictures[0][1]
    top = 8 + 22
    assert sheet.getpixel((8, top + 20))[0] < sheet.getpixel((8 + 100, top + 20))[0], "the gradient is there"


class Page(HTMLParser):
    """What a browser would make of the page: its tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'><iframe src=javascript:alert(1)>",
    "</title><script>alert(1)</script>",
    "</pre></body></html><script>alert(1)</script>",
    "<!--<script>alert(1)//-->",
    "&lt;b&gt;",
    "<style>@import 'http://x'</style>",
    "<meta http-equiv=refresh content=0>",
    "<base href=//x>",
    "\u202e<b>",
]
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "tr", "th", "td"),
    *("pre", "img"),
}


def check_page(page: str) -> Page:
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags} <= ALLOWED
    for tag, attributes in parsed.tags:
        assert not [a for a in attributes if a.startswith("on") or a in ("href", "action", "formaction")]
        if "src" in attributes:
            assert tag == "img" and str(attributes["src"]).startswith("data:image/jpeg;base64,")
    policies = [a for t, a in parsed.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and str(policies[0]["content"]).startswith("default-src 'none'")
    assert len([t for t, _ in parsed.tags if t == "meta"]) == 3
    return parsed


def test_the_page_shows_hostile_text_as_text(tmp_path: Path) -> None:
    dataset = with_captions(*HOSTILE, concept="<b onmouseover=alert(1)>x</b>")
    made = [
        dataclasses.replace(r, name=f"{HOSTILE[i]}/{i}.png", content_hash="0" * 64)
        for i, r in enumerate(dataset.records)
    ]
    dataset = Dataset(dataset.root, tuple(made), tuple(HOSTILE))
    train_set = build_train_set(dataset, DatasetConfig())
    report = report_data(train_set)
    page = check_page(report_html(report, [(HOSTILE[0], report_pictures(train_set, report)[2][1])]))
    for text in HOSTILE[:2]:
        assert text in page.text, "shown as it is, and run by nobody"
    file = tmp_path / "report.html"
    save_report_html(report, file)
    assert "<script" not in file.read_text("utf-8")


@given(text=st.text(max_size=60).filter(str.strip))
@settings(max_examples=cases(500), deadline=None)
def test_any_text_stays_text(text: str) -> None:
    dataset = with_captions(text, "a", concept=text)
    report = report_data(build_train_set(dataset, DatasetConfig()))
    check_page(report_html(report))
    assert report_lines(report)


def test_a_report_of_the_real_page_says_the_same_numbers(tmp_path: Path) -> None:
    train_set = real(tmp_path)
    report = report_data(train_set)
    page = check_page(report_html(report, report_pictures(train_set, report)))
    assert "5 training images, 10 with repeats" in page.text
    assert [t for t, _ in page.tags].count("img") == 3
    assert "zogi" in page.text and "\u732b" in page.text
