"""The workflow inside a LoRA file tells of no folder of this machine."""

from __future__ import annotations

import json

import pytest

from loragraft.nodes.workflow import portable

ROOTS = {"/srv/comfy/input": "", "/srv/comfy/output": " [output]", "/srv/comfy": "", "D:\\sets": ""}


def cleaned(text: str) -> str:
    result = portable({"nodes": [{"widgets_values": [text]}]}, ROOTS)
    assert result is not None
    value: str = json.loads(result)["nodes"][0]["widgets_values"][0]
    return value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/comfy/input/faces", "faces"),
        ("/srv/comfy/input/faces/", "faces"),
        ("/srv/comfy/input", "."),
        ("/srv/comfy/output/runs/a", "runs/a [output]"),
        ("/srv/comfy/models/x.safetensors", "models/x.safetensors"),
        ("D:\\sets\\mine", "mine"),
        ("d:/SETS/mine/two", "mine/two"),
        ("/srv/comfy/inputs/x", "inputs/x"),
        ("/home/me/photos/cat", "cat"),
        ("C:\\Users\\me\\cat", "cat"),
        ("\\\\nas\\me\\cat", "cat"),
        ("faces", "faces"),
        ("[demo]", "[demo]"),
        ("a/b, c", "a/b, c"),
        ("/imagine a cat", "/imagine a cat"),
        ("see /srv/comfy/input/faces there", "see faces there"),
    ],
)
def test_paths_become_relative(text: str, expected: str) -> None:
    assert cleaned(text) == expected


def test_everything_else_stays_and_the_text_is_compact_json() -> None:
    workflow = {"id": "x", "nodes": [], "n": 1, "f": 0.5, "t": True, "none": None, "deep": [{"a": ["ü"]}]}
    text = portable(workflow, ROOTS)
    assert text is not None and json.loads(text) == workflow
    assert ": " not in text and "ü" in text


def test_without_a_workflow_there_is_none() -> None:
    assert portable(None, ROOTS) is None and portable({}, ROOTS) is None


def test_numbers_that_are_no_json_become_null() -> None:
    text = portable({"a": float("nan"), "b": float("inf")}, ROOTS)
    assert text is not None and json.loads(text) == {"a": None, "b": None}
