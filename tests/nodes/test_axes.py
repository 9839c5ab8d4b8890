"""A preview's rows and columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from loragraft.nodes import axes
from loragraft.trainer.errors import LoraGraftError

A, B = axes.Weights(Path("a.safetensors"), "step 1"), axes.Weights(Path("b.safetensors"), "final")


def table(rows: list[axes.Row]) -> list[tuple[str | None, float, float]]:
    return [(r.weights.label if r.weights else None, r.strength_model, r.strength_clip) for r in rows]


def test_zero_draws_the_base_once_and_first() -> None:
    assert table(axes.rows([A, B], "0, 0.5, 1", "same")) == [
        (None, 0, 0),
        ("step 1", 0.5, 0.5),
        ("step 1", 1, 1),
        ("final", 0.5, 0.5),
        ("final", 1, 1),
    ]


def test_without_zero_there_is_no_base_row() -> None:
    assert table(axes.rows([B], "1", "same")) == [("final", 1, 1)]


def test_a_range_is_evenly_spaced() -> None:
    assert [r.strength_model for r in axes.rows([B], "0, 0.7-1.5 [5]", "same")] == [
        0,
        0.7,
        0.9,
        1.1,
        1.3,
        1.5,
    ]


def test_own_clip_strengths_are_crossed_and_one_zero_is_no_base() -> None:
    assert table(axes.rows([B], "0, 1", "0, 0.5")) == [
        (None, 0, 0),
        ("final", 0, 0.5),
        ("final", 1, 0),
        ("final", 1, 0.5),
    ]


def test_labels() -> None:
    assert axes.Row(None, 0, 0).label == "without LoRA"
    assert axes.Row(B, 0.8, 0.8).label == "final\nstrength 0.8"
    assert axes.Row(B, 0.8, 0.5).label == "final\nmodel 0.8\nCLIP 0.5"
    assert axes.Column("a cat", 7).label == "a cat\nseed 7"


def test_columns_are_prompts_times_seeds() -> None:
    assert axes.columns("a\n\n b \n", "1, 3-4") == [axes.Column(p, s) for p in ("a", "b") for s in (1, 3, 4)]
    assert axes.columns("", "5") == [axes.Column("", 5)]


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("1", [1]),
        (" 1 , 2,", [1, 2]),
        ("5-8", [5, 6, 7, 8]),
        ("2,2", [2]),
        ("18446744073709551615", [2**64 - 1]),
    ],
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert axes.parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", " ", "one", "-1", "1.5", "9-1", "1-99999", "1;2", "18446744073709551616", "1 2", "0x10", "١"]
)
def test_seeds_refused(text: str) -> None:
    with pytest.raises(LoraGraftError) as caught:
        axes.parse_seeds(text)
    assert caught.value.code == "LG-NODE-011"


def test_finished_files_are_labelled_by_name_and_a_single_one_is_final() -> None:
    def shown(*names: str) -> list[str]:
        return [w.label for w in axes.finished([Path("loras") / f"{n}.safetensors" for n in names])]

    assert shown("cat_learning_rate1e-4") == ["final"]
    assert shown("cat", "dog") == ["cat", "dog"]
    assert shown("cat_seed1", "cat_seed2") == ["cat_seed1", "cat_seed2"], "short ones stay whole"
    assert shown("my_cat_learning_rate1e-4_seed1", "my_cat_learning_rate3e-4_seed1") == [
        "learning_rate1e-4_seed1",
        "learning_rate3e-4_seed1",
    ]
    assert [w.path.name for w in axes.finished([Path("a.safetensors"), Path("b.safetensors")])] == [
        "a.safetensors",
        "b.safetensors",
    ]


def test_several_files_share_one_row_without_lora() -> None:
    files = axes.finished([Path("a.safetensors"), Path("b.safetensors")])
    assert table(axes.rows(files, "0, 0.5, 1", "same")) == [
        (None, 0, 0),
        ("a", 0.5, 0.5),
        ("a", 1, 1),
        ("b", 0.5, 0.5),
        ("b", 1, 1),
    ]


def test_too_many_cells_are_refused() -> None:
    axes.check_size(10, 40, 1)
    with pytest.raises(LoraGraftError, match="LG-NODE-015"):
        axes.check_size(10, 41, 1)


def test_checkpoints_are_spread_with_the_last_among_them() -> None:
    files = [axes.Weights(Path(f"{i}"), f"step {i}") for i in range(10)]
    assert [f.label for f in axes.spread(files, 4)] == ["step 0", "step 3", "step 6", "step 9"]
    assert axes.spread(files, 1) == [files[-1]]
    assert axes.spread(files[:3], 4) == files[:3]


def test_wildcards_make_columns() -> None:
    def of(*how: str) -> list[tuple[str, int]]:
        return [(c.prompt, c.seed) for c in axes.columns("a {x|y}\nb", "1, 2", *how)]

    assert of() == of("off") == [("a {x|y}", 1), ("a {x|y}", 2), ("b", 1), ("b", 2)]
    assert of("all") == [("a x", 1), ("a x", 2), ("a y", 1), ("a y", 2), ("b", 1), ("b", 2)]
    picked = of("by seed")
    assert len(picked) == 4 and {p for p, _ in picked} <= {"a x", "a y", "b"} and picked == of("by seed")


def test_prompts_with_trigger_words_get_columns_without_them() -> None:
    found = axes.columns("zibu, a cat\na dog", "1, 2", "off", "zibu")
    assert [(c.prompt, c.seed, c.untriggered) for c in found] == [
        ("zibu, a cat", 1, False),
        ("zibu, a cat", 2, False),
        ("a cat", 1, True),
        ("a cat", 2, True),
        ("a dog", 1, False),
        ("a dog", 2, False),
    ]
    assert found[2].label == "a cat\nwithout trigger\nseed 1"
