"""docs/parity.md has every row of what trainers can do, each with a setting and a test that exist."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from loragraft.trainer.__main__ import parser

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d\.\d\.\d+) \| (.+) \| (.+) \| (.+) \| (.+) \|$", flags=re.MULTILINE)
QUOTED = re.compile(r"`([^`]+)`")
# The rows of each section: networks, block weights, learning, files, remaining arguments, flows.
SECTIONS = {"1.4": 14, "1.5": 15, "1.6": 18, "1.7": 19, "1.8": 14, "1.9": 10}
VERDICTS = ("equal", "better", "refused")
# Rows that no test of a trainer can show.
NOTHING_TO_TEST = ("1.8.14",)


def rows() -> list[tuple[str, ...]]:
    return [match.groups() for match in ROW.finditer(TEXT)]


def known_settings() -> Iterator[str]:
    """Yield every flag of the command line without dashes, and every command."""
    waiting: list[tuple[str, argparse.ArgumentParser]] = [("loragraft", parser())]
    while waiting:
        path, found = waiting.pop()
        yield path
        for action in found._actions:
            yield from (option.lstrip("-") for option in action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                waiting += [(f"{path} {name}", command) for name, command in action.choices.items()]


def test_no_row_is_missing_and_none_stands_twice() -> None:
    expected = [f"{section}.{n}" for section, count in SECTIONS.items() for n in range(1, count + 1)]
    assert [row[0] for row in rows()] == expected


def test_every_setting_exists() -> None:
    known = set(known_settings())
    unknown = [(row[0], name) for row in rows() for name in QUOTED.findall(row[2]) if name not in known]
    assert unknown == []
    assert {row[0] for row in rows() if not QUOTED.search(row[2])} == {
        "1.6.16",
        "1.7.6",
        "1.8.9",
        "1.8.10",
        "1.8.14",
    }


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_row_has_a_verdict_and_a_test_that_exists(row: tuple[str, ...]) -> None:
    number, _, _, tests, verdict = row
    assert verdict.startswith(VERDICTS)
    assert verdict == "equal" or len(verdict) > 12, "better and refused say why"
    named = QUOTED.findall(tests)
    assert named or number in NOTHING_TO_TEST
    for name in named:
        file, _, test = name.partition("::")
        path = ROOT / file if file.startswith("tests/") else ROOT / "tests" / "trainer" / f"test_{file}.py"
        assert path.is_file(), name
        assert re.search(rf"^(async )?def test_{test}\b", path.read_text("utf-8"), flags=re.MULTILINE), name
