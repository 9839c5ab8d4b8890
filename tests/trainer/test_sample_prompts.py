"""Sample prompts are read as kohya's trainer reads them, and what it would ignore is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer.sample_prompts import SamplePrompt, parse_prompt, read_prompts
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a cat, sitting", SamplePrompt("a cat, sitting")),
        (
            "a cat --w 512 --h 768 --d 1 --s 28 --l 7.5 --n bad, worse",
            SamplePrompt("a cat", 512, 768, 1, 28, 7.5, "bad, worse"),
        ),
        ("a cat --N low quality --W 64", SamplePrompt("a cat", width=64, negative="low quality")),
        ("a well--known cat", SamplePrompt("a well--known cat")),
        ("", SamplePrompt("")),
        ("a --d 0 --l 1", SamplePrompt("a", seed=0, cfg=1.0)),
        ("a --n ", SamplePrompt("a", negative="")),
    ],
)
def test_a_line(line: str, expected: SamplePrompt) -> None:
    assert parse_prompt(line) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a --x 1", "--x"),
        ("a --width 512", "--width"),
        ("a --w 500", "multiple of 8"),
        ("a --w 32", "64 to 4096"),
        ("a --w 512 wide", "512 wide"),
        ("a --w", "--w"),
        ("a --s 0", "1 to 1000"),
        ("a --s 1001", "1 to 1000"),
        ("a --l nan", "0 to 100"),
        ("a --l 1,5", "0 to 100"),
        ("a --d -1", "--d -1"),
        ("a --d \u0661", "--d"),
        ("a --d 1 --d 2", "twice"),
        ("a --ss euler", "Euler"),
        ("a --g 3", "--l"),
        ("a --cn x.png", "ControlNet"),
        ("a -- b", "not known"),
    ],
)
def test_what_a_line_cannot_say(line: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_prompt(line)
    assert said in str(caught.value)
    with Refusal("LG-CFG-003", "sample_prompts", said):
        runs.settings(sample_prompts=["fine", line])


def write(folder: Path, name: str, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_text_file(tmp_path: Path) -> None:
    text = "\ufeff# a comment\na cat --d 1\n\n  a dog  \n#--x\n\u732b --n \u72ac\n"
    assert read_prompts(write(tmp_path, "p.txt", text)) == ("a cat --d 1", "a dog", "\u732b --n \u72ac")


def test_a_list_of_tables(tmp_path: Path) -> None:
    items = ["a cat --s 9", {"prompt": "a dog", "seed": 3, "scale": 7.5, "negative_prompt": "bad"}, {}]
    lines = read_prompts(write(tmp_path, "p.json", items))
    assert lines == ("a cat --s 9", "a dog --d 3 --l 7.5 --n bad", "")
    assert parse_prompt(lines[1]) == SamplePrompt("a dog", seed=3, cfg=7.5, negative="bad")


def test_common_values_and_subsets(tmp_path: Path) -> None:
    text = '[prompt]\nwidth = 512\nseed = 1\n[[prompt.subset]]\nprompt = "a"\n'
    text += '[[prompt.subset]]\nprompt = "b"\nseed = 2\nsample_steps = 12\n'
    assert read_prompts(write(tmp_path, "p.toml", text)) == ("a --w 512 --d 1", "b --w 512 --d 2 --s 12")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.csv", "a", ".txt"),
        ("p.txt", "fine\na --x 1", "--x"),
        ("p.json", "{", "line 1"),
        ("p.json", {"prompt": "a"}, "list"),
        ("p.json", [{"promt": "a"}], "did you mean prompt"),
        ("p.json", [1], "a prompt or a table"),
        ("p.json", [{"prompt": "a", "seed": True}], "seed"),
        ("p.json", [{"prompt": "a --w 64"}], "' --'"),
        ("p.json", [{"prompt": "a\nb"}], "line end"),
        ("p.json", [{"prompt": "a", "width": 500}], "multiple"),
        ("p.json", "[" * 100_000, ""),
        ("p.toml", "[prompt]\nseed = 1", "subset"),
        ("p.toml", "a = 1", "prompt"),
        ("p.toml", "[prompt]\nsubset = 1", ""),
        ("p.txt", "a\n" * 1001, "1000"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: Any, said: str) -> None:
    with Refusal("LG-CFG-018", str(tmp_path / name), said):
        read_prompts(write(tmp_path, name, content))


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "big.txt").write_bytes(b"a" * (2**20 + 1))
    for name in ("none.txt", "b.txt", "big.txt"):
        with Refusal("LG-CFG-018", name):
            read_prompts(tmp_path / name)
