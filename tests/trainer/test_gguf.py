"""GGUF files: every type against the reference, the container's rules, and files that lie."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer.engine import ggml
from loragraft.trainer.engine.ggml import BLOCK_TYPES, unpack_blocks
from loragraft.trainer.engine.packed_tensor import PackedTensor, unpacked
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.families.sources.gguf_file import DamagedGGUF, GGUFWeights
from loragraft.trainer.families.sources.model_files import read_file
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer import quantised_files as files
from loragraft_tests.trainer.data_folders import Refusal

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf_blocks.json"


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def blocks_of(data: bytes, kind: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, BLOCK_TYPES[kind].size)


# ---- values ----


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_type_has_the_references_values(kind: str) -> None:
    expected = json.loads(GOLDEN.read_text("utf-8"))[kind]
    found = unpack_blocks(kind, blocks_of(bytes.fromhex(expected["blocks"]), kind), torch.float32)
    assert found[:8].tolist() == expected["first"]
    assert digest(found) == expected["sha256"]


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_and_dtypes_change_no_value(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = blocks_of(files.random_blocks(kind, 256 * 7), kind)
    whole = unpack_blocks(kind, blocks, torch.float32)
    monkeypatch.setattr(ggml, "SLICE", 512)
    assert torch.equal(unpack_blocks(kind, blocks, dtype), whole.to(dtype))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_the_package_agrees_on_other_blocks(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    data = files.random_blocks(kind, 256 * 40, seed=7)
    expected = gguf.quants.dequantize(blocks_of(data, kind).numpy(), gguf.GGMLQuantizationType[kind])
    found = unpack_blocks(kind, blocks_of(data, kind), torch.float32)
    assert torch.equal(found, torch.from_numpy(expected).view(-1))


# ---- the container ----


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def f32(*shape: int) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", shape, torch.arange(float(torch.Size(shape).numel())).numpy().tobytes()


def test_names_shapes_types_and_metadata(tmp_path: Path) -> None:
    tensors = {
        "plain": f32(3, 32),
        "half": ("F16", (4,), torch.arange(4).half().numpy().tobytes()),
        "brain": ("BF16", (2,), torch.tensor([1.5, -2]).bfloat16().view(torch.int16).numpy().tobytes()),
        "packed": ("Q8_0", (4, 64), files.q8_0(torch.randn(4, 64))),
        "vector": ("Q4_0", (64,), files.random_blocks("Q4_0", 64)),
        "kernel": ("Q8_0", (9, 32), files.q8_0(torch.randn(8, 4, 3, 3))),
        "last": f32(1),
    }
    told: dict[str, Any] = {
        "general.architecture": "flux",
        "tokenizer.ggml.tokens": ["a", "bc"],
        "comfy.gguf.orig_shape.kernel": [8, 4, 3, 3],
        "count": 7,
        "flag": True,
        "rate": 0.5,
    }
    found = GGUFWeights(write(tmp_path / "x.gguf", files.gguf_bytes(tensors, told)))
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        "plain": (3, 32),
        "half": (4,),
        "brain": (2,),
        "packed": (4, 64),
        "vector": (64,),
        "kernel": (8, 4, 3, 3),
        "last": (1,),
    }
    assert found.metadata["general.architecture"] == "flux" and found.metadata["count"] == 7
    assert found.metadata["flag"] is True and found.metadata["rate"] == 0.5
    assert "tokenizer.ggml.tokens" not in found.metadata
    assert found["plain"].tolist() == torch.arange(96.0).view(3, 32).tolist()
    assert found["half"].tolist() == [0, 1, 2, 3] and found["brain"].tolist() == [1.5, -2]
    packed, vector = found["packed"], found["vector"]
    assert isinstance(packed, PackedTensor) and isinstance(found["kernel"], PackedTensor)
    assert type(vector) is torch.Tensor and vector.dtype == torch.float32
    assert torch.equal(
        unpacked(packed).view(-1),
        unpack_blocks("Q8_0", blocks_of(tensors["packed"][2], "Q8_0"), torch.float32),
    )


@pytest.mark.parametrize("alignment", [1, 32, 64])
def test_the_files_own_alignment_counts(tmp_path: Path, alignment: int) -> None:
    data = files.gguf_bytes({"a": f32(5)}, {"general.alignment": alignment})
    head = len(data) - 32  # the body, filled up to 32 bytes
    header, body = header_of(data, head), data[head:]
    found = GGUFWeights(write(tmp_path / "x.gguf", header + bytes(-len(header) % alignment) + body))
    assert found["a"].tolist() == [0, 1, 2, 3, 4]


def header_of(data: bytes, head: int) -> bytes:
    """Return a header without its filling: a tensor's entry ends with its place, eight zeros here."""
    at = data.rindex(b"a" + struct.pack("<I", 1), 0, head)
    return data[: at + 1 + 4 + 8 + 4 + 8]


def test_the_package_reads_and_writes_the_same(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "flux")
    weight = torch.randn(6, 64)
    packed = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("a", packed, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("b", weight.numpy())
    writer.add_array("tokens", ["x", "y"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFWeights(tmp_path / "x.gguf")
    assert torch.equal(found["b"], weight)
    expected = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q5_1))
    assert torch.equal(unpacked(found["a"]), expected)
    ours = write(tmp_path / "y.gguf", files.gguf_bytes({"b": f32(3, 32)}, {"n": 5}))
    (theirs,) = gguf.GGUFReader(str(ours)).tensors
    assert theirs.data.tolist() == torch.arange(96.0).view(3, 32).tolist()


# ---- refusals ----


@pytest.mark.parametrize("kind", ["IQ4_XS", "MXFP4"])
def test_types_that_are_not_read_are_named(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "x.gguf", files.gguf_bytes({"a.weight": (kind, (2, 256), bytes(4096))}))
    with Refusal("LG-BASE-005", kind, "x.gguf", "a.weight", "Q8_0"):
        read_file(path, where="x.gguf")


def patched(data: bytes, at: int, kind: str, value: int) -> bytes:
    size = struct.calcsize(kind)
    return data[:at] + struct.pack(kind, value) + data[at + size :]


GOOD = files.gguf_bytes({"a": f32(8), "b": f32(8)})
LIES: dict[str, bytes] = {
    "empty": b"",
    "another file": b"PK\x03\x04" + bytes(100),
    "magic alone": b"GGUF",
    "version 1": patched(GOOD, 4, "<I", 1),
    "other byte order": patched(GOOD, 4, ">I", 3),
    "many tensors": patched(GOOD, 8, "<Q", 2**63),
    "a tensor more": patched(GOOD, 8, "<Q", 3),
    "many keys": patched(GOOD, 16, "<Q", 2**40),
    "a key more": patched(GOOD, 16, "<Q", 2),
    "long key": patched(GOOD, 24, "<Q", 2**62),
    "cut": GOOD[:-33],
    "cut in the header": GOOD[:60],
    "beyond the end": files.gguf_bytes({"a": f32(8)}, offsets={"a": 2**40}),
    "beyond all numbers": files.gguf_bytes({"a": f32(8)}, offsets={"a": 2**64 - 1}),
    "over another": files.gguf_bytes({"a": f32(8), "b": f32(8)}, offsets={"b": 0}),
    "huge shape": files.gguf_bytes({"a": ("F32", (2**62, 4), bytes(32))}),
    "no size": files.gguf_bytes({"a": ("F32", (0, 4), b"")}),
    "no dimensions": files.gguf_bytes({"a": ("F32", (), bytes(32))}),
    "many dimensions": files.gguf_bytes({"a": ("F32", (1,) * 9, bytes(32))}),
    "rows of no whole blocks": files.gguf_bytes({"a": ("Q8_0", (4, 48), bytes(34 * 6))}),
    "an alignment of 0": files.gguf_bytes({"a": f32(8)}, {"general.alignment": 0}),
    "an alignment of text": files.gguf_bytes({"a": f32(8)}, {"general.alignment": "x"}),
    "another original shape": files.gguf_bytes({"a": f32(8)}, {"comfy.gguf.orig_shape.a": [3, 3]}),
    "a smaller original shape": files.gguf_bytes({"a": f32(8)}, {"comfy.gguf.orig_shape.a": [2, 2]}),
    "a negative original shape": files.gguf_bytes({"a": f32(8)}, {"comfy.gguf.orig_shape.a": [-2, -4]}),
    "an original shape of text": files.gguf_bytes({"a": f32(8)}, {"comfy.gguf.orig_shape.a": "8"}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    path = write(tmp_path / "x.gguf", LIES[lie])
    with Refusal("LG-BASE-001", "x.gguf", "GGUF"):
        read_file(path, where="x.gguf")


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    data = GOOD.replace(b"\x01" + bytes(7) + b"b\x01", b"\x01" + bytes(7) + b"a\x01")
    assert data != GOOD
    with pytest.raises(DamagedGGUF, match="two tensors"):
        GGUFWeights(write(tmp_path / "x.gguf", data))


def test_values_of_unknown_types_and_lists_of_lists(tmp_path: Path) -> None:
    key = files.text("general.architecture") + struct.pack("<I", 8)
    at = GOOD.index(key) + len(key) - 4
    for kind, message in ((99, "unknown type 99"), (9, "texts|numbers|unknown|lists|ends")):
        with pytest.raises(DamagedGGUF, match=message):
            GGUFWeights(write(tmp_path / "x.gguf", patched(GOOD, at, "<I", kind)))


def test_changed_bytes_end_in_an_error_or_in_tensors(tmp_path: Path) -> None:
    """No change of a file's bytes may end in anything but a refusal, or in tensors of its own bytes."""
    data = files.gguf_bytes(
        {"a": f32(2, 8), "b": ("Q4_K", (2, 256), files.random_blocks("Q4_K", 512))},
        {"comfy.gguf.orig_shape.b": [4, 128], "general.alignment": 32, "list": ["x", "y"]},
    )
    header = data.index(b"b" + struct.pack("<I", 2)) + 40
    generator = random.Random(0)
    for _ in range(cases(4000)):
        changed = bytearray(data)
        for _ in range(generator.choice((1, 1, 2, 8))):
            changed[generator.randrange(header)] = generator.choice(
                (0, 1, 255, 128, generator.randrange(256))
            )
        if generator.random() < 0.2:
            del changed[generator.randrange(len(changed)) :]
        path = write(tmp_path / "x.gguf", bytes(changed))
        try:
            for tensor in read_file(path, where="x").values():
                unpacked(tensor)
        except LoraGraftError as error:
            assert error.code in ("LG-BASE-001", "LG-BASE-005")


# ---- a base ----


def test_a_model_is_opened_from_gguf(
    tmp_path: Path, weights: dict[str, torch.Tensor], tokenizer: Path
) -> None:
    """Names with and without the checkpoint's prefix; the hash is over the bytes as they are stored."""
    meant = files.write_gguf(tmp_path / "x.gguf", weights)
    base = api.open_base(tmp_path / "x.gguf", tokenizer=tokenizer)
    assert base.family.name == "sd15" and "Q8_0" in " ".join(base.notes)
    packed = base.state_dicts["denoiser"]["conv_in.weight"]
    assert isinstance(packed, PackedTensor)
    assert torch.equal(unpacked(packed), meant["model.diffusion_model.input_blocks.0.0.weight"])
    again = api.open_base(tmp_path / "x.gguf", tokenizer=tokenizer)
    assert again.weights_hash == base.weights_hash
    content = bytearray((tmp_path / "x.gguf").read_bytes())
    content[-40] ^= 1
    (tmp_path / "y.gguf").write_bytes(content)
    assert api.open_base(tmp_path / "y.gguf", tokenizer=tokenizer).weights_hash != base.weights_hash
