"""Grids, plots and ranges: what they show, and that no label or loss makes them fail."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loragraft.trainer.api import chart, grid, parse_range
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.preview import MARK, RAW, SMOOTH, smoothed
from loragraft_tests.trainer.data_folders import Refusal

# ---- ranges ----


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1", [1]),
        ("0, 1", [0, 1]),
        ("0.7-1.5 [5]", [0.7, 0.9, 1.1, 1.3, 1.5]),
        ("0.7-1.5[5]", [0.7, 0.9, 1.1, 1.3, 1.5]),
        ("0, 0.7-1.5 [5]", [0, 0.7, 0.9, 1.1, 1.3, 1.5]),
        ("0.2-1", [0.2, 0.4, 0.6, 0.8, 1.0]),
        ("1-0 [3]", [1, 0.5, 0]),
        ("-1-1 [3]", [-1, 0, 1]),
        ("-1--0.5 [2]", [-1, -0.5]),
        ("-0.5", [-0.5]),
        ("1e-1", [0.1]),
        ("2-3 [1]", [2]),
        ("0, 0.5, 0-1 [3]", [0, 0.5, 1]),
        (" 0.1-0.3 [3] , .5 ", [0.1, 0.2, 0.3, 0.5]),
    ],
)
def test_ranges(text: str, values: list[float]) -> None:
    assert parse_range(text) == pytest.approx(values)
    assert len(parse_range(text)) == len(values)


@pytest.mark.parametrize(
    "text",
    ["", " ", ",", "1,", "a", "1-2 [0]", "1-2 [101]", "1-2 [-1]", "1-2 [x]", "1-2 [", "1..2-3", "-", "1-",
     "nan", "inf", "1e999", "0-inf", "5000", "1-2-3", "0x10", "1;2", "0, 1 2", "1-2 [99999999999999999999]",
     ",".join(map(str, range(101))), "__import__('os')", "1" * 5000],
    ids=lambda t: t[:20] or "empty",
)  # fmt: skip
def test_texts_that_are_no_ranges(text: str) -> None:
    with Refusal("LG-NODE-010", "strengths"):
        parse_range(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789.-[] ,e", max_size=30))
def test_any_text_gives_a_few_numbers_or_a_refusal(text: str) -> None:
    try:
        values = parse_range(text)
    except LoraGraftError as error:
        assert error.code == "LG-NODE-010"
    else:
        assert 1 <= len(values) <= 100 and all(abs(v) <= 1000 for v in values)
        assert len(set(values)) == len(values)


# ---- grids ----


def cell(color: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, color)


def places_of(sheet: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return the box (left, top, right, bottom) of the pixels of this colour."""
    rows, columns = np.where((np.asarray(sheet) == color).all(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_every_image_is_whole_and_in_its_place() -> None:
    colors = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)], [(255, 0, 255), (0, 255, 255)]]
    cells = [[Image.new("RGB", (64, 48), c) for c in row] for row in colors]
    sheet = grid(cells, ["seed 1", "seed 2", "seed 3"], ["0", "1"], title="zibu")
    boxes = [[places_of(sheet, c) for c in row] for row in colors]
    assert all((b[2] - b[0], b[3] - b[1]) == (64, 48) for row in boxes for b in row)
    for row in boxes:
        assert row[0][2] <= row[1][0] and row[0][1] == row[1][1]
    for above, below in pairwise(boxes):
        assert above[0][3] <= below[0][1] and above[0][0] == below[0][0]
    labels = np.asarray(sheet)[:, : boxes[0][0][0]]
    assert (labels < 128).any(), "rows are labelled"
    head = np.asarray(sheet)[: boxes[0][0][1]]
    assert (head < 128).any(), "columns are labelled"


LABELS: list[list[str]] = [
    ["\u4e00\u4e2a\u5973\u5b69, \u6234\u5e3d", "\u0434\u0435\u0432\u0430 \U0001f600 \u5973\u306e\u5b50"],
    ["", ""],
    ["word " * 80, "x" * 400],
    ["line\nbreak\ttab", "\u202eright to left \u0634\u0645\u0633"],
    ["null \0 byte", "half \ud800 pair"],
]  # fmt: skip


@pytest.mark.parametrize("labels", LABELS, ids=["letters of the world", "none", "long", "control", "broken"])
def test_no_label_makes_a_grid_fail(labels: list[str]) -> None:
    cells = [[cell("red"), cell("blue")], [cell("lime"), cell("black")]]
    for sheet in (
        grid(cells, labels, ["a", "b"]),
        grid(cells, ["a", "b"], labels),
        grid(cells, labels, labels, labels[0]),
    ):
        assert places_of(sheet, (255, 0, 0))[2:] != (0, 0)
        assert sheet.width < 2000 and sheet.height < 20_000


def test_a_long_file_name_stays_beside_the_pictures() -> None:
    name = "creature_algo_lokr_network_dim32_network_alpha16_conv_dim4_conv_alpha2_learning_rate0.0025"
    sheet = grid([[cell("red"), cell("red")]], [name], ["a", "b"])
    left, top, _, bottom = places_of(sheet, (255, 0, 0))
    pictures = np.asarray(sheet)[top:bottom, left:].astype(int)
    assert (pictures.sum(axis=2) >= 255).all(), "nothing dark is drawn between or over the pictures"


def test_grids_of_one_and_of_many_and_of_mixed_sizes() -> None:
    assert grid([[cell("red")]], ["a"], ["b"]).size >= (64, 48)
    mixed = grid([[cell("red", (10, 90)), cell("blue", (90, 10))]], ["a"], ["b", "c"])
    left, top, right, bottom = places_of(mixed, (255, 0, 0))
    assert (right - left, bottom - top) == (10, 90)
    many = grid(
        [[cell("red", (8, 8))] * 30] * 30, [str(i) for i in range(30)], [f"{i / 10:g}" for i in range(30)]
    )
    red = (np.asarray(many) == (255, 0, 0)).all(axis=2)
    assert red.sum() == 900 * 64
    transparent = grid([[Image.new("RGBA", (8, 8), (0, 255, 0, 255))]], ["a"], ["b"])
    assert places_of(transparent, (0, 255, 0))


# ---- the loss plot ----


def drawn(sheet: Image.Image, color: str) -> int:
    """Count the pixels of a colour."""
    wanted = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    return int((np.asarray(sheet) == wanted).all(axis=2).sum())


@pytest.mark.parametrize(
    "losses", [[], [0.5], [0.5, 0.5], [0.1] * 500, [0.0, 0.0], [1e-30, 2e-30], [1e30, 2e30]]
)
def test_no_losses_make_a_plot_fail(losses: list[float]) -> None:
    assert chart(losses).size == (900, 420)
    assert chart(losses, saves=[1] if losses else [], size=(200, 120)).size == (200, 120)


def test_a_plot_shows_both_lines_and_the_saves() -> None:
    rng = random.Random(0)
    losses = [1 / (1 + i / 50) + rng.random() / 10 for i in range(300)]
    plain, marked = chart(losses), chart(losses, saves=[100, 300])
    assert drawn(plain, RAW) > 300 and drawn(plain, SMOOTH) > 300
    assert drawn(plain, MARK) == 0 and drawn(marked, MARK) > 300
    columns = np.where((np.asarray(marked) == (0x3A, 0x9A, 0x5C)).all(axis=2))[1]
    first = 70 + (900 - 20 - 70) * 99 / 299
    assert abs(columns.min() - first) <= 2 and columns.max() >= 877
    smooth = np.asarray(chart([1.0, 0.0]))
    assert (smooth[24] != 255).any() and (smooth[380] != 255).any(), "highest and lowest touch the frame"


def test_smoothing_starts_at_the_first_value_and_follows() -> None:
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    values: list[Any] = smoothed([1.0] * 50 + [0.0] * 200)
    assert values[0] == 1.0
    assert values[49] == pytest.approx(1.0)
    assert 0 < values[-1] < 0.001
    assert smoothed([]) == []
