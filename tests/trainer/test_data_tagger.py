"""From scores to captions, through real ONNX graphs with known outputs."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loragraft.trainer.data import tagger_scores
from loragraft.trainer.data.records import Dataset
from loragraft.trainer.data.scan import scan_folder
from loragraft.trainer.data.tagger import Found, TagSettings, choose, mcut, tag_dataset
from loragraft.trainer.data.tagger_models import Labels, TaggerFiles, find_taggers
from loragraft.trainer.data.tagger_scores import Scores, score
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, fill, picture

pytest.importorskip("onnx", reason="pip install -e .[dev]")
pytest.importorskip("onnxruntime", reason="pip install -e .[dev]")

from loragraft_tests.trainer import tagger_files

ROWS = [
    ("general", 9), ("sensitive", 9), ("questionable", 9), ("explicit", 9),
    ("1girl", 0), ("long_hair", 0), ("smile", 0), ("closed_eyes", 0), ("hat", 0), (">_<", 0), ("o_o", 0),
    ("hatsune_miku", 4), ("kagamine_rin_(vocaloid)", 4),
]  # fmt: skip
SCORES = [0.1, 0.7, 0.2, 0.0, 0.99, 0.6, 0.35, 0.5, 0.9, 0.4, 0.36, 0.9, 0.85]


@pytest.fixture
def tagger(tmp_path: Path) -> TaggerFiles:
    """Return a tagger that gives SCORES to every picture."""
    tagger_files.write_tagger(tmp_path / "taggers", ROWS, SCORES)
    return find_taggers([tmp_path / "taggers"], hub_cache=False)["tagger"]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Return three pictures; the last has only its folder's words as a caption."""
    folder = fill(
        tmp_path / "images",
        {
            "2_ohwx cat/a.png": (20, 12),
            "2_ohwx cat/a.txt": "smile, a red scarf",
            "2_ohwx cat/b.png": (9, 30),
            "2_ohwx cat/b.txt": "Hat",
            "2_ohwx cat/c.png": (16, 16),
        },
    )
    return scan_folder(folder)


def captions(dataset: Dataset, tagger: TaggerFiles, **settings: Any) -> list[str]:
    edited = tag_dataset(dataset, [tagger], TagSettings(**settings), device="cpu")
    return [record.caption for record in edited.dataset.records]


# ---- the rules ----


def test_thresholds_order_underscores_and_kaomojis(dataset: Dataset, tagger: TaggerFiles) -> None:
    """Strictly above 0.35 and 0.85; characters first; the surest first; faces keep underscores."""
    expected = "hatsune miku, 1girl, hat, long hair, closed eyes, >_<, o_o"
    assert captions(dataset, tagger) == [expected] * 3


def test_the_settings_of_the_rules(dataset: Dataset, tagger: TaggerFiles) -> None:
    def first(**settings: Any) -> str:
        return captions(dataset, tagger, **settings)[0]

    assert first(general_threshold=0.95) == "hatsune miku, 1girl"
    assert first(general_threshold=0.95, character_threshold=0.8) == (
        "hatsune miku, kagamine rin (vocaloid), 1girl"  # brackets are not escaped: training reads them
    )
    assert first(general_threshold=0.95, character_first=False) == "1girl, hatsune miku"
    assert first(general_threshold=0.55, replace_underscore=False) == "hatsune_miku, 1girl, hat, long_hair"
    assert first(general_threshold=0.95, rating="first") == "sensitive, hatsune miku, 1girl"
    assert first(general_threshold=0.95, rating="last") == "hatsune miku, 1girl, sensitive"


def test_mcut_takes_the_widest_gap() -> None:
    assert mcut([0.9, 0.8, 0.2, 0.1]) == pytest.approx(0.5)
    assert mcut([0.2, 0.9, 0.1, 0.8]) == pytest.approx(0.5)
    assert mcut([0.9, 0.1]) == pytest.approx(0.5)
    assert mcut([1.0, 0.5, 0.0]) == pytest.approx(0.75)  # of equal gaps, the first
    assert mcut([0.3]) == mcut([]) == 0


def test_mcut_in_captions(dataset: Dataset, tagger: TaggerFiles) -> None:
    # General scores 0.99 0.9 | 0.6 0.5 0.4 0.36 0.35: all of the vocabulary passed the floor, no 0 follows.
    assert captions(dataset, tagger, general_mcut=True)[0] == "hatsune miku, 1girl, hat"
    # Characters 0.9 0.85: no third one, so the cut lies between them.
    both = captions(dataset, tagger, general_threshold=0.95, character_mcut=True)[0]
    assert both == "hatsune miku, 1girl"


@settings(max_examples=cases(500), deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=40))
def test_mcut_splits_at_a_widest_gap(values: list[float]) -> None:
    threshold = mcut(values)
    above, below = [v for v in values if v > threshold], [v for v in values if v <= threshold]
    if above and below:
        ranked = sorted(values)
        widest = max(b - a for a, b in itertools.pairwise(ranked))
        assert min(above) - max(below) == pytest.approx(widest, abs=1e-9)


def test_mcut_counts_what_was_not_found_as_zero_and_has_a_floor_for_characters() -> None:
    labels = Labels(("a", "b", "c", "x", "y"), (0, 0, 0, 4, 4))
    on = TagSettings(general_mcut=True, character_mcut=True)
    # 0.5, 0.45 and a third tag at 0: the widest gap is the one above 0.
    assert choose([_scores(labels, {"a": 0.5, "b": 0.45})], [labels], on).general == ("a", "b")
    # Characters 0.12 and 0: the cut at 0.06 is raised to 0.15.
    assert choose([_scores(labels, {"x": 0.12})], [labels], on).characters == ()
    assert choose([_scores(labels, {"x": 0.9})], [labels], on).characters == ("x",)


# ---- several taggers ----


def _scores(labels: Labels, given: dict[str, float]) -> Scores:
    outputs = [i for i, name in enumerate(labels.names) if name in given]
    values = [given[labels.names[i]] for i in outputs]
    return Scores(np.array(outputs, np.int32), np.array(values, np.float32))


def test_union_and_vote_over_different_vocabularies() -> None:
    old = Labels(("general", "sensitive", "a", "b", "only_old"), (9, 9, 0, 0, 0))
    new = Labels(("sensitive", "general", "b", "a", "c"), (9, 9, 0, 0, 4))
    scores = [
        _scores(old, {"general": 0.6, "sensitive": 0.5, "a": 0.9, "b": 0.4, "only_old": 0.5}),
        _scores(new, {"general": 0.1, "sensitive": 0.3, "a": 0.2, "b": 0.95, "c": 0.9}),
    ]
    union = choose(scores, [old, new], TagSettings())
    assert union == Found(("c",), ("b", "a", "only_old"), "sensitive")
    # "a" has one vote of two; "only_old" and "c" have one of the one tagger that knows them.
    vote = choose(scores, [old, new], TagSettings(combine="vote"))
    assert vote == Found(("c",), ("b", "only_old"), "sensitive")


def test_two_taggers_run_one_after_the_other(tmp_path: Path, dataset: Dataset, tagger: TaggerFiles) -> None:
    tagger_files.write_tagger(tmp_path / "taggers", [("general", 9), ("cat", 0), ("1girl", 0)],
                              [1, 0.8, 0.1], name="second")  # fmt: skip
    second = find_taggers([tmp_path / "taggers"], hub_cache=False)["second"]
    seen: list[tuple[int, int]] = []
    edited = tag_dataset(
        dataset,
        [tagger, second],
        TagSettings(general_threshold=0.7),
        device="cpu",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert edited.dataset.records[0].caption == "hatsune miku, 1girl, hat, cat"
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6] and {total for _, total in seen} == {6}
    vote = tag_dataset(dataset, [tagger, second], TagSettings(general_threshold=0.7, combine="vote"))
    # 1girl: one of two; hat, cat and miku: all of the one that knows them.
    assert vote.dataset.records[0].caption == "hatsune miku, hat, cat"


# ---- captions ----


def test_existing_captions(dataset: Dataset, tagger: TaggerFiles) -> None:
    found = "hatsune miku, 1girl, hat, long hair"
    assert captions(dataset, tagger, general_threshold=0.55, existing="append") == [
        f"smile, a red scarf, {found}",
        "Hat, hatsune miku, 1girl, long hair",
        found,  # the folder's words are no caption of the picture's own
    ]
    assert captions(dataset, tagger, general_threshold=0.55, existing="merge") == [
        f"{found}, smile, a red scarf",
        found,
        found,
    ]
    edited = tag_dataset(dataset, [tagger], TagSettings(existing="append"), device="cpu")
    assert any("1 image had no caption of their own" in line for line in edited.lines)


def test_the_trigger_comes_first_and_once(dataset: Dataset, tagger: TaggerFiles) -> None:
    found = captions(
        dataset, tagger, general_threshold=0.95, trigger="{class}, Smile", existing="append", rating="first"
    )
    assert found == [
        "ohwx cat, Smile, a red scarf, sensitive, hatsune miku, 1girl",
        "ohwx cat, Smile, Hat, sensitive, hatsune miku, 1girl",
        "ohwx cat, Smile, sensitive, hatsune miku, 1girl",
    ]
    with Refusal("LG-DATA-071", "{clas}", "{class}"):
        captions(dataset, tagger, trigger="{clas}")


def test_exclude_and_always_first(dataset: Dataset, tagger: TaggerFiles) -> None:
    edited = tag_dataset(
        dataset,
        [tagger],
        TagSettings(exclude="HAT, [features], *_miku", always_first="O_O, closed eyes"),
        device="cpu",
    )
    # long hair is a feature; closed eyes are an expression, which a group never takes.
    assert edited.dataset.records[0].caption == "o_o, closed eyes, 1girl, >_<"
    text = "\n".join(edited.lines)
    assert "Excluded: " in text and "hat (3)" in text and "long hair (3)" in text
    assert "Protected, only its full name excludes it: closed eyes (3)" in text
    with Refusal("LG-DATA-070", "haair", "[hair]"):
        captions(dataset, tagger, exclude="[haair]")


def test_images_without_any_tag_are_refused_together(dataset: Dataset, tagger: TaggerFiles) -> None:
    with Refusal("LG-DATA-067", "3 images", "a.png", "b.png", "general_threshold"):
        captions(dataset, tagger, general_threshold=1, character_threshold=1)
    only = captions(dataset, tagger, general_threshold=1, character_threshold=1, trigger="ohwx")
    assert only == ["ohwx"] * 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"general_threshold": 0}, "general_threshold"),
        ({"character_threshold": 1.5}, "character_threshold"),
        ({"general_threshold": float("nan")}, "general_threshold"),
        ({"rating": "maybe"}, "off, first, last"),
        ({"existing": "drop"}, "append"),
        ({"combine": "sum"}, "union"),
    ],
)
def test_impossible_settings_are_refused(
    dataset: Dataset, tagger: TaggerFiles, settings: dict[str, Any], words: str
) -> None:
    with Refusal("LG-CFG-003", words):
        captions(dataset, tagger, **settings)


def test_impossible_arguments_are_refused(dataset: Dataset, tagger: TaggerFiles) -> None:
    for device, batch_size in (("cuda:7", 8), ("auto", 0), ("auto", 10_000)):
        with Refusal("LG-CFG-003"):
            tag_dataset(dataset, [tagger], TagSettings(), device=device, batch_size=batch_size)


def test_only_captions_change_and_files_do_not(dataset: Dataset, tagger: TaggerFiles) -> None:
    before = {p: p.read_bytes() for p in dataset.root.rglob("*") if p.is_file()}
    edited = tag_dataset(dataset, [tagger], TagSettings(), device="cpu").dataset
    assert {p: p.read_bytes() for p in dataset.root.rglob("*") if p.is_file()} == before
    for old, new in zip(dataset.records, edited.records, strict=True):
        assert new.caption_source == "tagger"
        assert dataclasses.replace(new, caption=old.caption, caption_source=old.caption_source) == old
    assert edited.lines[: len(dataset.lines)] == dataset.lines


# ---- running ----


@pytest.mark.parametrize(("batch", "batch_size"), [("n", 1), ("n", 2), ("n", 8), (1, 8), (4, 8)])
def test_batches_do_not_change_scores_and_follow_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int | str, batch_size: int
) -> None:
    tagger_files.write_pixel_tagger(tmp_path / "taggers", batch=batch)
    files = find_taggers([tmp_path / "taggers"], hub_cache=False)["pixels"]
    folder = fill(tmp_path / "x", {f"1_cat/{i}.png": (8, 8) for i in range(5)})
    records = scan_folder(folder).records
    sizes: list[int] = []
    real = tagger_scores._scores_of

    def watched(session: Any, pixels: Any, *others: Any) -> Any:
        sizes.append(len(pixels))
        return real(session, pixels, *others)

    monkeypatch.setattr(tagger_scores, "_scores_of", watched)
    found = score(records, files, device="cpu", batch_size=batch_size)
    for record, one in zip(records, found.scores, strict=True):
        with Image.open(record.path) as image:
            bgr = np.asarray(image)[:, :, ::-1].reshape(-1) / np.float32(255)
        row = np.zeros(tagger_files.NUM_PIXELS, np.float32)
        row[one.outputs] = one.values
        assert np.allclose(row, bgr, atol=1e-3)
    expected = {("n", 1): [1] * 5, ("n", 2): [2, 2, 1], ("n", 8): [5], (1, 8): [1] * 5, (4, 8): [4, 1]}
    assert sizes == expected[batch, batch_size]


def test_one_session_serves_all_pictures(
    dataset: Dataset, tagger: TaggerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = tagger_scores.open_session
    monkeypatch.setattr(tagger_scores, "open_session", lambda *a, **k: (opened.append(a), real(*a, **k))[1])
    tag_dataset(dataset, [tagger], TagSettings(), batch_size=1)
    assert len(opened) == 1


def test_only_changed_pictures_are_scored_again(
    tmp_path: Path, tagger: TaggerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "x", {f"1_cat/{i}.png": (8, 8) for i in range(4)})
    read: list[str] = []
    real = tagger_scores.load_upright
    monkeypatch.setattr(tagger_scores, "load_upright", lambda r: (read.append(r.name), real(r))[1])

    def tag() -> list[str]:
        read.clear()
        edited = tag_dataset(scan_folder(folder), [tagger], TagSettings(), cache=tmp_path / "cache")
        assert all(r.caption.startswith("hatsune miku") for r in edited.dataset.records)
        return list(read)

    assert len(tag()) == 4
    assert tag() == [], "a second run opens nothing"
    image = picture((8, 8), shade=2)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(folder / "1_cat/2.png")
    assert tag() == ["1_cat/2.png"], "one edited pixel, one picture"
    (folder / "1_cat/2.txt").write_text("a caption", "utf-8")
    assert tag() == [], "a caption is no pixel"
    cropped = scan_folder(folder)
    one = dataclasses.replace(cropped.records[0], crop=(0, 0, 4, 8), size=(8, 4))
    read.clear()
    tag_dataset(
        dataclasses.replace(cropped, records=(one, *cropped.records[1:])),
        [tagger],
        TagSettings(),
        cache=tmp_path / "cache",
    )
    assert read == ["1_cat/0.png"], "a crop shows other pixels"


def test_cached_and_fresh_scores_are_the_same(tmp_path: Path) -> None:
    tagger_files.write_pixel_tagger(tmp_path / "taggers")
    files = find_taggers([tmp_path / "taggers"], hub_cache=False)["pixels"]
    records = scan_folder(fill(tmp_path / "x", {"1_cat/a.png": (30, 17)})).records
    fresh = score(records, files, device="cpu", cache=tmp_path / "cache").scores[0]
    again = score(records, files, device="cpu", cache=tmp_path / "cache").scores[0]
    assert np.array_equal(fresh.outputs, again.outputs) and np.array_equal(fresh.values, again.values)
    assert again.outputs.dtype == np.int32 and again.values.dtype == np.float32


def test_cancel_keeps_what_was_scored(tmp_path: Path, tagger: TaggerFiles) -> None:
    class Cancelled(BaseException):
        pass

    folder = fill(tmp_path / "x", {f"1_cat/{i}.png": (8, 8) for i in range(6)})
    dataset = scan_folder(folder)

    def progress(done: int, total: int) -> None:
        if done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        tag_dataset(
            dataset, [tagger], TagSettings(), batch_size=1, cache=tmp_path / "cache", progress=progress
        )
    edited = tag_dataset(dataset, [tagger], TagSettings(), cache=tmp_path / "cache")
    assert "tagger: 3 of 6 pictures were scored before." in edited.lines


def test_a_model_that_does_not_fit_its_labels_is_refused(tmp_path: Path, dataset: Dataset) -> None:
    folder = tagger_files.write_tagger(tmp_path / "taggers", ROWS, SCORES)
    tagger_files.write_labels(folder / "selected_tags.csv", ROWS[:-1])
    files = find_taggers([tmp_path / "taggers"], hub_cache=False)["tagger"]
    with Refusal("LG-DATA-062", "13 outputs", "12"):
        tag_dataset(dataset, [files], TagSettings())


@pytest.mark.parametrize("wrong", [3.5, -2.0, float("nan")])
def test_outputs_that_are_no_probabilities_are_refused(
    tmp_path: Path, dataset: Dataset, wrong: float
) -> None:
    tagger_files.write_tagger(tmp_path / "taggers", ROWS, [wrong, *SCORES[1:]])
    files = find_taggers([tmp_path / "taggers"], hub_cache=False)["tagger"]
    with Refusal("LG-DATA-062", "probabilities"):
        tag_dataset(dataset, [files], TagSettings())


def test_a_failing_run_names_the_pictures(
    dataset: Dataset, tagger: TaggerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tagger_scores.open_session

    class Failing:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.real = real(*args, **options)

        def __enter__(self) -> Any:
            session = self.real.__enter__()

            def run(pixels: Any) -> Any:
                raise RuntimeError("CUDA out of memory")

            return dataclasses.replace(session, run=run)

        def __exit__(self, *args: Any) -> Any:
            return self.real.__exit__(*args)

    monkeypatch.setattr(tagger_scores, "open_session", Failing)
    with Refusal("LG-DATA-066", "a.png", "c.png", "out of memory", "batch_size"):
        tag_dataset(dataset, [tagger], TagSettings())


def test_the_report_says_what_ran_and_what_came_out(dataset: Dataset, tagger: TaggerFiles) -> None:
    text = "\n".join(tag_dataset(dataset, [tagger], TagSettings(trigger="ohwx")).lines)
    parts = ["Tagged 3 images with tagger", "onnxruntime", "CPU", "Ratings: sensitive 3", "In every caption"]
    for part in [*parts, "2 captions replaced", "7.0 on average", "keep_tokens 1"]:
        assert part in text, text
