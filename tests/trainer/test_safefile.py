"""Our safetensors writer: what the library reads back, byte for byte the same for equal content."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loragraft.trainer import safefile
from loragraft.trainer.safefile import DTYPES, write_atomically, write_safetensors, write_text
from loragraft_tests.trainer.disk import Disk


def varied() -> dict[str, torch.Tensor]:
    """Return tensors of every number format, and of every shape that has surprised a writer."""
    torch.manual_seed(0)
    tensors = {str(d): (torch.rand(3, 5) * 100).to(d) for d in DTYPES}
    wide = torch.randn(6, 8)
    return {
        **tensors,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "one byte": torch.tensor([7], dtype=torch.uint8),
        "transposed": wide.t(),
        "strided": wide[::2, 1::3],
        "expanded": torch.ones(1, 1).expand(3, 4),
        "view": wide[2:4],
        "with gradient": torch.nn.Parameter(torch.randn(2)),
        "\u540d\u524d \U0001f600 \"'\\": torch.ones(2),
    }


TEXTS = {
    "plain": "x",
    "\u952e": "\u503c \U0001f600",
    "quotes": '"\\/\n\t\x00\x7f',
    "empty": "",
    "json": '{"a": [1]}',
}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors, file = varied(), tmp_path / "x.safetensors"
    write_safetensors(file, tensors, TEXTS)
    read = load_file(file)
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype, name
        assert read[name].shape == value.shape, name
        assert torch.equal(read[name], value.detach()), name
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == TEXTS
        assert opened.get_slice("transposed").get_shape() == [8, 6]


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_values_at_the_edges_of_each_format_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        values = [0.0, -0.0, info.max, info.min, info.tiny, info.smallest_normal, float("inf"), float("nan")]
    else:
        values = [0, torch.iinfo(dtype).max, torch.iinfo(dtype).min, 1]
    tensor = torch.tensor(values, dtype=dtype)
    write_safetensors(tmp_path / "x", {"x": tensor})
    found = load_file(tmp_path / "x")["x"]
    assert found.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()


def test_the_file_is_laid_out_as_the_format_wants(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", varied(), TEXTS)
    data = (tmp_path / "x").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    assert data[8:9] == b"{"
    write_safetensors(tmp_path / "none", {})
    assert load_file(tmp_path / "none") == {}


def test_equal_content_gives_equal_bytes_whatever_its_order_and_strides(tmp_path: Path) -> None:
    tensors = {k: v.detach() for k, v in varied().items()}
    copies = {k: v.clone().contiguous() for k, v in reversed(tensors.items())}
    write_safetensors(tmp_path / "a", tensors, TEXTS)
    write_safetensors(tmp_path / "b", copies, dict(reversed(TEXTS.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    copies["scalar"] = torch.tensor(2.6)
    write_safetensors(tmp_path / "c", copies, TEXTS)
    assert (tmp_path / "c").read_bytes() != (tmp_path / "b").read_bytes()


def test_what_the_library_writes_reads_the_same(tmp_path: Path) -> None:
    """Both files hold the same, so ours serves whoever expects theirs."""
    tensors = {k: v.detach().clone().contiguous() for k, v in varied().items()}
    write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert (tmp_path / "ours").stat().st_size <= (tmp_path / "theirs").stat().st_size + 8


def test_other_number_formats_are_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_safetensors(tmp_path / "x", {"x": torch.ones(2, dtype=torch.float64)})
    assert list(tmp_path.iterdir()) == []


# ---- atomic ----


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "x.txt"
    write_text(file, "old \u540d\n")
    assert file.read_bytes() == "old \u540d\n".encode()

    def failing(stream: object) -> None:
        stream.write(b"half of the new")  # type: ignore[attr-defined]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(file, failing)
    assert file.read_bytes() == "old \u540d\n".encode()
    assert [p.name for p in file.parent.iterdir()] == ["x.txt"]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with disk.watching():
        write_text(tmp_path / "x.txt", "content")
    kinds = [kind for kind, _ in disk.calls]
    assert kinds == ["create", "write", "sync file", "rename", "sync folder"]
    created, renamed = (next(p for k, p in disk.calls if k == kind) for kind in ("create", "rename"))
    assert created.startswith("x.txt.tmp-") and renamed == "x.txt"


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Each has a temporary file of its own: the second may finish while the first is writing."""

    def body(stream: object) -> None:
        write_text(tmp_path / "x", "second")
        stream.write(b"first")  # type: ignore[attr-defined]

    write_atomically(tmp_path / "x", body)
    assert (tmp_path / "x").read_text("utf-8") == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["x" * 200 + ".safetensors", "\u540d" * 60 + ".txt"])
def test_names_near_the_limit_leave_room_for_the_temporary_one(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "x")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_virus_scanner_is_waited_for_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    real, refusals = Path.replace, [PermissionError("in use")] * 3

    def held(self: Path, target: Path) -> Path:
        if refusals:
            raise refusals.pop()
        return real(self, target)

    (tmp_path / "a").write_text("x", encoding="utf-8")
    monkeypatch.setattr(Path, "replace", held)
    monkeypatch.setattr(safefile.time, "sleep", waited.append)
    with monkeypatch.context() as patch:
        patch.setattr(safefile, "os", type("Windows", (), {"name": "nt"}))
        safefile.replace(tmp_path / "a", tmp_path / "b")
    assert len(waited) == 3 and sum(waited) < 2
    refusals.append(PermissionError("no right"))
    if os.name != "nt":
        with pytest.raises(PermissionError):
            safefile.replace(tmp_path / "b", tmp_path / "c")
        assert len(waited) == 3
