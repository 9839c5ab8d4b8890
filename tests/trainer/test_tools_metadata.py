"""What a LoRA file says of itself: shown, changed, and its tensors left as they are."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.tools import edit_metadata as edit
from loragraft_tests.trainer.data_folders import Refusal

TOLD = {
    "modelspec.title": "old",
    "modelspec.hash_sha256": "0xabc",
    "sshs_model_hash": "abc",
    "workflow": '{"nodes": []}',
    "ss_tag_frequency": "x" * 500,
}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    tensors = {
        f"lora_unet_{n}.lora_{e}.weight": torch.randn(3, 3).half() for n in "ab" for e in ("up", "down")
    }
    save_file(tensors, tmp_path / "x.safetensors", TOLD)
    return tmp_path / "x.safetensors"


def bytes_of_tensors(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_fields_are_set_and_removed_and_tensors_stay(lora: Path, tmp_path: Path) -> None:
    before, target = bytes_of_tensors(lora), tmp_path / "y.safetensors"
    picture = Image.effect_noise((900, 300), 90)
    changes = {
        "title": "neu é",
        "trigger_phrase": "zibu",
        "modelspec.date": "2026",
        "comment": "a",
        "tags": "",
    }
    told = api.edit_metadata(lora, {**changes, "tags": "x"}, thumbnail=picture, output=target)
    assert told == api.lora_metadata(target)
    assert told["modelspec.title"] == "neu é" and told["modelspec.date"] == "2026"
    assert told["ss_training_comment"] == "a" and told["modelspec.tags"] == "x"
    for key in ("workflow", "modelspec.hash_sha256", "sshs_model_hash", "ss_tag_frequency"):
        assert told[key] == TOLD[key]
    assert bytes_of_tensors(target) == before
    assert all(torch.equal(v, load_file(lora)[k]) for k, v in load_file(target).items())
    kind, _, data = told["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (256, 85) and len(data) < 140_000
    assert api.lora_metadata(lora) == TOLD, "the old file is as it was"
    told = api.edit_metadata(target, {"tags": ""}, remove=["title"], overwrite=True)
    assert "modelspec.tags" not in told and "modelspec.title" not in api.lora_metadata(target)
    assert bytes_of_tensors(target) == before


def test_the_header_stays_one_that_the_library_reads(lora: Path) -> None:
    for text in ("", "x", "日本" * 3, '"\\\n'):
        api.edit_metadata(lora, {"title": text, "author": "a"}, overwrite=True)
        length = int.from_bytes(lora.read_bytes()[:8], "little")
        assert length % 8 == 0
        header = json.loads(lora.read_bytes()[8 : 8 + length])
        assert next(iter(header)) == "__metadata__"
        assert api.lora_metadata(lora).get("modelspec.title", "") == text
        assert len(load_file(lora)) == 4


def test_what_cannot_be_changed(lora: Path) -> None:
    with Refusal("LG-TOOL-004", "x.safetensors"):
        api.edit_metadata(lora, {"title": "x"})
    for changes, remove, why in (
        ({"sshs_model_hash": "1"}, [], "computed"),
        ({"titel": "x"}, [], "did you mean title"),
        ({"": "x"}, [], "no such field"),
        ({}, ["author"], "does not hold"),
        ({}, ["modelspec.hash_sha256"], "computed"),
        ({"title": "x" * (edit.MAX_VALUE + 1)}, [], "longer"),
    ):
        with Refusal("LG-TOOL-014", why):
            api.edit_metadata(lora, changes, remove=remove, overwrite=True)
    assert api.lora_metadata(lora) == TOLD


def test_lines_to_read() -> None:
    lines = api.metadata_lines(TOLD, width=20)
    assert lines[0] == "modelspec.title: old"
    assert f"ss_tag_frequency: {'x' * 20}... (500 characters)" in lines
