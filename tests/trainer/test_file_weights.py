"""A file's tensors as they are brought when asked for: their values, their pages, and what is refused."""

from __future__ import annotations

import gc
import json
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.engine.precision import place, resolve
from loragraft.trainer.families.sources import weights
from loragraft.trainer.families.sources.weights import DTYPES, FileWeights, Renamed, joined
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


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    before, found = path.read_bytes(), FileWeights(path)
    found["a"].add_(1)
    assert path.read_bytes() == before and not found["a"].any()
    held = found["a"]
    held.add_(1)
    assert path.read_bytes() == before and not FileWeights(path)["a"].any()


# ---- stretches ----


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileWeights:
    """Return a file of 200 tensors of 4 KiB in stretches of 64 KiB, at most 7 of these."""
    monkeypatch.setattr(weights, "STRETCH", 2**16)
    monkeypatch.setattr(weights, "MOST_STRETCHES", 7)
    save_file({f"{i:03}": torch.full((1024,), float(i)) for i in range(200)}, tmp_path / "x.safetensors")
    return FileWeights(tmp_path / "x.safetensors")


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_model_opens_where_few_files_may_be_open(checkpoint: Path) -> None:
    """Each map holds a descriptor; some systems allow 256, and a model has more than 1,000 tensors."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [FileWeights(checkpoint) for _ in range(2)]
    assert sum(map(len, opened)) > 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        held = [dict(one) for one in opened]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(torch.equal(held[0][k], held[1][k]) for k in held[0])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in /proc")
def test_neighbours_share_a_descriptor_which_goes_with_the_last(many: FileWeights) -> None:
    before = descriptors()
    first = many["000"].tolist()
    assert first == [0] * 1024 and descriptors() == before
    held = dict(many)
    assert all(bool((v == float(k)).all()) for k, v in held.items())
    assert 2 <= descriptors() - before <= 7
    del held["000"]
    assert 2 <= descriptors() - before <= 7, "others of its stretch are in use"
    again = many["001"]
    assert again.data_ptr() == held["001"].data_ptr(), "mapped once"
    held.clear()
    assert descriptors() - before == 1 and bool((again == 1).all())
    del again
    assert descriptors() == before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in /proc")
def test_threads_share_stretches_too(many: FileWeights) -> None:
    before = descriptors()
    with ThreadPoolExecutor(16) as pool:
        held = list(pool.map(many.__getitem__, sorted(many) * 5))
    assert [int(v[0]) for v in held] == [*range(200)] * 5
    assert descriptors() - before <= 7


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 3 * 2**20), max_size=200), big=st.integers(0, 2**33))
def test_stretches_hold_every_tensor_and_are_few(sizes: list[int], big: int) -> None:
    ends = list(accumulate([*sizes, big], initial=100))
    places = {str(i): (a, b) for i, (a, b) in enumerate(pairwise(ends))}
    found = weights.stretches(places)
    assert set(found) == {k for k, (a, b) in places.items() if a < b}
    for name, (start, end) in found.items():
        assert start <= places[name][0] and places[name][1] <= end
    ordered = sorted(set(found.values()))
    assert len(ordered) <= weights.MOST_STRETCHES
    assert all(a[1] <= b[0] for a, b in pairwise(ordered)), "they do not overlap"
    assert all(end - start >= weights.STRETCH for start, end in ordered[:-1])


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
    header = {"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    with Refusal("LG-BASE-001", "x.safetensors"):
        api.open_base(write_raw(tmp_path / "x.safetensors", header, b"\0\0\0"), tokenizer=tokenizer)


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
    tensors = load_file(path)
    name = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
    tensors[name] = torch.zeros(2**19, tiny.TEXT, dtype=torch.float16)  # 64 MiB
    save_file(tensors, path)
    del tensors
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
