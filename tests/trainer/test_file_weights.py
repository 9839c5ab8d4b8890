"""A file's tensors as they are brought when asked for: their values, their pages, and what is refused."""

from __future__ import annotations

import gc
import json
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.engine.precision import place, resolve
from loragraft.trainer.families.weights import DTYPES, FileWeights, Renamed, joined
from loragraft_tests.trainer import tiny
from loragraft_tests.trainer.data_folders import Refusal

MIB = 2**20


def write_raw(path: Path, header: dict[str, object], body: bytes) -> Path:
    """Write a safetensors file by hand, its header padded so that the data starts at an odd place."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def test_every_tensor_is_the_librarys(checkpoint: Path) -> None:
    expected, found = load_file(checkpoint), FileWeights(checkpoint)
    assert set(found) == set(expected) and len(found) == len(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with pytest.raises(KeyError):
        found["other"]


@pytest.mark.parametrize("dtype", sorted({*DTYPES.values()}, key=str))
def test_all_dtypes_empty_tensors_scalars_and_metadata(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "b": torch.tensor([0, 1], dtype=torch.uint8).to(dtype),
        "none": torch.empty(0, 3, dtype=dtype),
        "scalar": torch.ones((), dtype=torch.uint8).to(dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = FileWeights(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape and found[name].dtype == dtype
        assert torch.equal(found[name].float(), tensor.float())


def test_tensors_that_lie_at_odd_places(tmp_path: Path) -> None:
    body = b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    found = FileWeights(write_raw(tmp_path / "x.safetensors", header, body))
    assert found["a"].tolist() == [7] and found["b"].tolist() == [1.5, -2.0]


def test_writing_to_a_tensor_reaches_neither_the_file_nor_the_next_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    before, found = path.read_bytes(), FileWeights(path)
    found["a"].add_(1)
    assert not found["a"].any() and path.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="an open file keeps its name there")
def test_a_file_that_took_the_name_is_not_read(tmp_path: Path) -> None:
    """Else a run could train on other weights than those that were hashed."""
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    found = FileWeights(path)
    save_file({"a": torch.ones(4)}, other)
    other.replace(path)
    assert not found["a"].any()


def test_a_type_that_is_not_known_is_named(tmp_path: Path, tokenizer: Path) -> None:
    header = {"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}
    with Refusal("LG-BASE-001", "x.safetensors"):
        api.open_base(write_raw(tmp_path / "x.safetensors", header, b"\0"), tokenizer=tokenizer)


def test_the_later_of_two_files_counts(tmp_path: Path) -> None:
    files = []
    for i, names in enumerate(("ab", "bc")):
        save_file({n: torch.full((2,), float(i)) for n in names}, tmp_path / f"{i}.safetensors")
        files.append(FileWeights(tmp_path / f"{i}.safetensors"))
    found = joined(files)
    assert {k: float(found[k][0]) for k in found} == {"a": 0.0, "b": 1.0, "c": 1.0}


def test_other_names_and_matrices() -> None:
    kernel = torch.randn(3, 2, 1, 1)
    found = Renamed({"old": kernel, "rest": kernel}, {"new": "old"}, frozenset({"new"}))
    assert list(found) == ["new"] and len(found) == 1
    assert found["new"].shape == (3, 2) and found["new"].data_ptr() == kernel.data_ptr()


# ---- what stays in memory ----


def resident() -> tuple[float, float]:
    """Return this process's memory without files, and its mapped files', in MiB."""
    text = Path("/proc/self/status").read_text("utf-8")
    found = dict(re.findall(r"(RssAnon|RssFile):\s+(\d+)", text))
    return int(found["RssAnon"]) / 1024, int(found["RssFile"]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_pages_go_with_the_tensors(tmp_path: Path, tokenizer: Path) -> None:
    """Opening reads nothing; hashing and converting leave nothing of the file in memory."""
    path = tiny.write_checkpoint(tmp_path / "x.safetensors")
    weights = load_file(path)
    name = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
    weights[name] = torch.zeros(2**19, tiny.TEXT, dtype=torch.float16)  # 64 MiB
    save_file(weights, path)
    del weights
    gc.collect()
    anonymous, file = resident()
    base = api.open_base(path, tokenizer=tokenizer)
    assert resident()[1] - file < 16
    held = base.state_dicts["text_encoder"]["text_model.embeddings.position_embedding.weight"]
    assert not held.any() and resident()[1] - file > 48, "pages in use are in memory"
    del held
    assert resident()[1] - file < 16, "and go with their tensor"
    assert base.weights_hash and resident()[1] - file < 16
    parts = base.load()
    place(parts, resolve("fp32", torch.device("cpu")), owned=base.owned)
    assert resident()[1] - file < 16 and resident()[0] - anonymous > 96, "converted, 128 MiB"
    again = base.load()
    assert torch.equal(again.denoiser.conv_in.weight.float(), parts.denoiser.conv_in.weight)
