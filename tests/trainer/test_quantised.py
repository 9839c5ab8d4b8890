"""Quantised weights: ComfyUI's layouts against its own values, and what trains on them unchanged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.engine import file_formats
from loragraft.trainer.engine.file_formats import FILE_FORMATS, fp8_values
from loragraft.trainer.engine.frozen import FROZEN, FrozenEmbedding, FrozenLinear, freeze
from loragraft.trainer.engine.ggml import BLOCK_TYPES
from loragraft.trainer.engine.packed_tensor import PackedTensor, moved, unpacked
from loragraft.trainer.engine.precision import place, resolve
from loragraft.trainer.engine.storage import Packed, stacked
from loragraft.trainer.families import FAMILIES, opening
from loragraft.trainer.families.names import ldm_keys
from loragraft.trainer.families.sources.model_files import read_file
from loragraft.trainer.families.sources.quantised import QuantisedWeights, read_quantised
from loragraft.trainer.safefile import tensor_bytes
from loragraft_tests.trainer import quantised_files as files
from loragraft_tests.trainer import runs, tiny
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.tiny_families import TOKENIZERS, WEIGHTS

GOLDEN = Path(__file__).parents[1] / "golden" / "quantised_layers.safetensors"
CPU = torch.device("cpu")
KINDS = ("gguf", "fp8", "old", "layer", "file")


def write(path: Path, weights: dict[str, torch.Tensor], kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write weights in one of KINDS; return the file and what its values mean."""
    if kind == "gguf":
        path = path.with_suffix(".gguf")
        return path, files.write_gguf(path, weights)
    path = path.with_suffix(".safetensors")
    if kind == "fp8":
        tensors, metadata = files.fp8(weights), {}
        meant = {name: value.float() for name, value in tensors.items()}
    else:
        tensors, metadata, meant = files.scaled_fp8(weights, kind)
    save_file(tensors, path, metadata=metadata)
    return path, {name: value.contiguous() for name, value in meant.items()}


# ---- values ----


def test_comfyuis_layouts_have_its_values() -> None:
    with safe_open(GOLDEN, framework="pt") as file:
        digests = json.loads(file.metadata()["sha256"])
    found = read_file(GOLDEN, where="x")
    assert isinstance(found, QuantisedWeights)
    for layer, digest in digests.items():
        values = unpacked(found[f"{layer}.weight"])
        values = values[:130] if len(values) > 130 else values  # rows are filled up to whole tiles
        assert hashlib.sha256(values.contiguous().numpy().astype("<f4").tobytes()).hexdigest() == digest, (
            layer
        )
    for layer in ("int8_rotated", "int8_rotated_64"):
        values = unpacked(found[f"{layer}.weight"])
        torch.testing.assert_close(values, found[f"{layer}.values"], rtol=0, atol=2e-6)
    assert not [k for k in found if k.endswith(("scale", "scale_2", "comfy_quant"))]


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_as_bits_is_fp8(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way for devices without fp8, over all numbers but those that are none."""
    codes = torch.arange(256, dtype=torch.uint8)
    expected = fp8_values(codes, kind, torch.float32)

    class Elsewhere(torch.Tensor):
        device = torch.device("mps")  # type: ignore[assignment]

    found = fp8_values(codes.as_subclass(Elsewhere), kind, torch.float32).as_subclass(torch.Tensor)
    finite = torch.isfinite(expected)
    assert finite.sum() >= 247 and torch.equal(found[finite], expected[finite])


@pytest.mark.parametrize("kind", KINDS)
def test_files_mean_what_they_were_made_of(
    tmp_path: Path, weights: dict[str, torch.Tensor], kind: str
) -> None:
    path, meant = write(tmp_path / "x", weights, kind)
    found = read_file(path, where="x")
    assert set(found) == set(meant)
    for name, value in found.items():
        assert torch.equal(unpacked(value).float(), meant[name].float()), name
        assert not isinstance(value, PackedTensor) or value.ndim > 1
    assert any(isinstance(value, PackedTensor) for value in found.values())


def test_scales_by_row_and_e5m2(tmp_path: Path) -> None:
    weight = torch.randn(6, 8)
    scale = weight.abs().amax(1, keepdim=True) / 57344
    tensors = {"a.weight": (weight / scale).to(torch.float8_e5m2), "a.weight_scale": scale}
    found = read_quantised(tensors, {}, where="x")
    assert torch.equal(unpacked(found["a.weight"]), tensors["a.weight"].float() * scale)
    assert list(found) == ["a.weight"]


def test_plain_weights_stay_what_they_are(weights: dict[str, torch.Tensor]) -> None:
    assert read_quantised(weights, {"format": "pt"}, where="x") is weights


# ---- a packed tensor ----


@pytest.mark.parametrize("kind", FILE_FORMATS)
def test_rows_shapes_and_stacks_stay_packed(kind: str) -> None:
    weight = files.packed_of(kind)
    values = unpacked(weight)
    assert values.shape == weight.shape and bool(torch.isfinite(values).all())
    cases = {
        "rows": (weight[2:5], values[2:5]),
        "last": (weight[-1:], values[-1:]),
        "none": (weight[3:3], values[3:3]),
        "kernel": (weight[:, :, None, None], values[:, :, None, None]),
        "reshaped": (weight.reshape(6, -1, 2), values.reshape(6, -1, 2)),
        "back": (weight[:, :, None, None].reshape(weight.shape), values),
        "stacked": (torch.cat([weight[4:], weight, weight[:1]]), torch.cat([values[4:], values, values[:1]])),
        "detached": (weight.detach(), values),
    }
    for name, (found, expected) in cases.items():
        assert isinstance(found, PackedTensor), name
        assert found.shape == expected.shape and torch.equal(unpacked(found), expected), name
    ids = torch.tensor([[0, 5], [3, 3]])
    assert torch.equal(torch.nn.functional.embedding(ids, weight), values[ids])


@pytest.mark.parametrize("kind", FILE_FORMATS)
def test_all_else_is_done_with_the_values(kind: str) -> None:
    weight, x = files.packed_of(kind), torch.randn(3, 6)
    values = unpacked(weight)
    for found, expected in (
        (x @ weight, x @ values),
        (weight.T, values.T),
        (weight[:, 3:7], values[:, 3:7]),
        (weight[1], values[1]),
        (weight.bfloat16(), values.bfloat16()),
        (weight * 2, values * 2),
        (weight.clone(), values),
        (weight.chunk(3)[1], values.chunk(3)[1]),
        (torch.cat([weight, values]), torch.cat([values, values])),
        (torch.cat([weight, weight], 1), torch.cat([values, values], 1)),
    ):
        assert type(found) is torch.Tensor and torch.equal(found, expected)
    assert bytes(tensor_bytes(weight)) == values.numpy().tobytes()


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "Q6_K"])
def test_an_embedding_unpacks_the_rows_asked_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, unpack = files.packed_of(kind, rows=40), Packed.unpack
    unpacked_rows: list[int] = []

    def counted(self: Packed, dtype: torch.dtype) -> torch.Tensor:
        unpacked_rows.append(self.shape[0])
        return unpack(self, dtype)

    monkeypatch.setattr(Packed, "unpack", counted)
    torch.nn.functional.embedding(torch.tensor([[3, 39], [3, 0]]), weight)
    assert unpacked_rows == [4]


@pytest.mark.parametrize("kind", [k for k in FILE_FORMATS if k not in BLOCK_TYPES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_rows_change_no_value(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = files.packed_of(kind, rows=7)
    whole = unpacked(weight)
    for slice_ in (3 * weight.shape[1], 1):
        monkeypatch.setattr(file_formats, "SLICE", slice_)
        found = weight.packed.unpack(dtype)
        if dtype == torch.float32:
            assert torch.equal(found, whole)
        torch.testing.assert_close(found.float(), whole, rtol=2**-7, atol=0)


def test_different_formats_are_stacked_by_their_values() -> None:
    one, other = files.packed_of("Q8_0"), files.packed_of("Q4_K")
    assert stacked([one.packed, other.packed]) is None
    assert torch.equal(torch.cat([one, other]), torch.cat([unpacked(one), unpacked(other)]))


def test_blocks_over_a_rows_end_are_cut_by_their_values() -> None:
    data = files.q8_0(torch.randn(8, 4, 3, 3))
    blocks = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 34)
    kernel = PackedTensor(Packed("Q8_0", torch.Size((8, 4, 3, 3)), {"blocks": blocks}))
    assert type(kernel[2:5]) is torch.Tensor and torch.equal(kernel[2:5], unpacked(kernel)[2:5])


def test_it_is_never_written_to() -> None:
    weight = files.packed_of("Q8_0")
    before = weight.packed.get_buffer("blocks").clone()
    for write_to in (weight.add_, weight.fill_, weight.copy_):
        with pytest.raises(TypeError, match="packed weight"):
            write_to(torch.tensor(1.0))
    assert torch.equal(weight.packed.get_buffer("blocks"), before)


# ---- layers ----


@pytest.mark.parametrize("kind", FILE_FORMATS)
def test_a_layer_computes_as_a_plain_one_on_the_values(kind: str) -> None:
    weight = files.packed_of(kind)
    rows, columns = weight.shape
    with torch.device("meta"):
        root = nn.ModuleDict({"linear": nn.Linear(columns, rows), "words": nn.Embedding(rows, columns)})
    bias = torch.randn(rows)
    root.load_state_dict({"linear.weight": weight, "linear.bias": bias, "words.weight": weight}, assign=True)
    root.requires_grad_(False)
    x, ids = torch.randn(4, columns, requires_grad=True), torch.tensor([1, 0, 5])

    def outcome() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x.grad = None
        y = root["linear"](x)
        y.square().sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad.clone(), root["words"](ids)

    plain = nn.Linear(columns, rows)
    plain.load_state_dict({"weight": unpacked(weight), "bias": bias})
    y = plain(x)
    y.square().sum().backward()
    assert x.grad is not None
    expected = (y.detach(), x.grad.clone(), unpacked(weight)[ids])
    before = outcome()
    freeze(root, torch.float32, CPU)
    assert isinstance(root["linear"], FrozenLinear) and isinstance(root["words"], FrozenEmbedding)
    assert root["linear"].stored is root["words"].stored, "shared still"
    assert root["words"].weight.shape == (rows, columns)
    for found in (before, outcome()):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_weights_of_other_modules_are_unpacked() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.empty(6, 512, device="meta"))

    own, weight = Own(), files.packed_of("Q8_0")
    own.load_state_dict({"table": weight}, assign=True)
    own.requires_grad_(False)
    freeze(own, torch.bfloat16, CPU)
    assert type(own.table) is nn.Parameter and torch.equal(own.table, unpacked(weight).bfloat16())


def test_moving_makes_new_memory_only_elsewhere() -> None:
    packed = files.packed_of("Q8_0").packed
    assert moved(packed, CPU) is packed and moved(packed, None) is packed
    away = moved(packed, torch.device("meta"))
    assert away.device.type == "meta" and packed.device == CPU


# ---- a base ----


@pytest.mark.parametrize(("kind", "engine"), [("gguf", "fused"), ("fp8", "eager"), ("layer", "fused")])
def test_training_is_that_on_the_values(
    kind: str, engine: str, weights: dict[str, torch.Tensor], tokenizer: Path, train_set: api.TrainSet,
    tmp_path: Path,
) -> None:  # fmt: skip
    path, meant = write(tmp_path / "x", weights, kind)
    save_file(meant, tmp_path / "plain.safetensors")
    made = {}
    for name, file in (("packed", path), ("plain", tmp_path / "plain.safetensors")):
        base = api.open_base(file, tokenizer=tokenizer)
        places = api.Places(tmp_path / name / "runs", tmp_path / name / "loras", tmp_path / name / "cache")
        events = runs.Training(base, train_set, places).events(max_train_steps=2, conv_dim=2, engine=engine)
        made[name] = (
            [e.loss for e in events if isinstance(e, api.Step)],
            load_file(runs.only(events, api.Finished).lora_file),
        )
        assert any("stay packed" in note for note in base.notes) == (name == "packed")
    assert made["packed"][0] == made["plain"][0]
    assert all(torch.equal(v, made["plain"][1][k]) for k, v in made["packed"][1].items())


@pytest.mark.parametrize("kind", ["gguf", "fp8"])
def test_what_is_loaded_takes_the_files_size(
    kind: str, weights: dict[str, torch.Tensor], tokenizer: Path, tmp_path: Path
) -> None:
    path, meant = write(tmp_path / "x", weights, kind)
    parts = api.open_base(path, tokenizer=tokenizer).load()
    place(parts, resolve("fp32", CPU))
    modules = (parts.denoiser, parts.vae, *parts.text_encoders.values())
    layers = [m for module in modules for m in module.modules() if isinstance(m, FROZEN)]
    assert len(layers) > 150
    held = {t.data_ptr(): t.nbytes for m in modules for t in (*m.parameters(), *m.buffers())}
    vectors = sum(v.nbytes for v in meant.values() if v.ndim < 2)
    assert sum(held.values()) <= path.stat().st_size + 4 * vectors
    assert sum(held.values()) < 0.35 * sum(v.numel() * 4 for v in meant.values())
    assert all(isinstance(layer.stored, Packed) for layer in layers)


def test_the_hash_is_over_the_stored_bytes(
    weights: dict[str, torch.Tensor], tokenizer: Path, tmp_path: Path
) -> None:
    hashes = set()
    for kind in KINDS[:4]:
        path, meant = write(tmp_path / kind, weights, kind)
        base = api.open_base(path, tokenizer=tokenizer)
        hashes.add(base.weights_hash)
        assert base.weights_hash == api.open_base(path, tokenizer=tokenizer).weights_hash
        save_file(meant, tmp_path / "plain.safetensors")
        hashes.add(api.open_base(tmp_path / "plain.safetensors", tokenizer=tokenizer).weights_hash)
    assert len(hashes) == 2 * 3, "how scaled fp8 is marked is no part of it"


def test_the_format_is_part_of_the_hash(
    weights: dict[str, torch.Tensor], tokenizer: Path, tmp_path: Path
) -> None:
    """The same bytes mean other numbers in another format."""
    name, hashes = ldm_keys.UNET_PREFIX + "middle_block.1.transformer_blocks.0.attn1.to_q.weight", set()
    codes = weights[name].to(torch.float8_e4m3fn)
    for number, dtype in enumerate((torch.float8_e4m3fn, torch.float8_e5m2)):
        path = tmp_path / f"{number}.safetensors"
        save_file({**weights, name: codes.view(dtype)}, path)
        hashes.add(api.open_base(path, tokenizer=tokenizer).weights_hash)
    assert len(hashes) == 2


@pytest.mark.parametrize("at_once", [1000, 2**22])
def test_the_hash_of_plain_weights_is_that_of_their_values(
    checkpoint: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Run folders and caches are named after it, so it must not change; nor do pieces of a tensor matter."""
    monkeypatch.setattr(opening, "HASHED_AT_ONCE", at_once)
    base = api.open_base(checkpoint, tokenizer=tokenizer)
    vae = base.state_dicts["vae"]
    digests = []
    for name in sorted(vae):
        values = hashlib.sha256(vae[name].float().contiguous().numpy().tobytes()).digest()
        digests.append(hashlib.sha256(f"{name}{tuple(vae[name].shape)}".encode() + values).digest())
    assert base.part_hash("vae") == hashlib.sha256(b"".join(digests)).hexdigest()[:20]


def test_a_host_with_fp8_weights_makes_the_same_base(
    weights: dict[str, torch.Tensor], tokenizer: Path, tmp_path: Path
) -> None:
    tensors, _, _ = files.scaled_fp8(weights, "layer")
    save_file(tensors, tmp_path / "x.safetensors")
    from_file = api.open_base(tmp_path / "x.safetensors", tokenizer=tokenizer)
    shared = api.open_base_from_weights(tensors, name="x", tokenizers={"clip": tokenizer})
    assert shared.weights_hash == from_file.weights_hash == api.hash_weights(tensors)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    own = shared.state_dicts["denoiser"][name]
    assert isinstance(own, PackedTensor)
    old = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    assert own.packed.get_buffer("codes").data_ptr() == tensors[old].data_ptr()


# ---- refusals ----


LAYER = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({f"{LAYER}.weight.absmax": torch.zeros(4)}, "bitsandbytes"),
        ({f"{LAYER}.qweight": torch.zeros(4, dtype=torch.int32)}, "GPTQ"),
        ({f"{LAYER}.weight_scale_inv": torch.zeros(4)}, "squares"),
        ({f"{LAYER}.comfy_quant": files.as_bytes({"format": "convrot_w4a4"})}, "convrot_w4a4"),
        ({f"{LAYER}.comfy_quant": files.as_bytes({"format": "new"})}, "new"),
    ],
)
def test_formats_that_are_not_read_are_named(
    weights: dict[str, torch.Tensor], tokenizer: Path, tmp_path: Path, extra: Any, named: str
) -> None:
    save_file({**weights, **extra}, tmp_path / "x.safetensors")
    with Refusal("LG-BASE-005", named, "x.safetensors"):
        api.open_base(tmp_path / "x.safetensors", tokenizer=tokenizer)


def rotated(group: int) -> torch.Tensor:
    return files.as_bytes({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group})


BYTES = torch.zeros(64, 64, dtype=torch.uint8)
DAMAGED: dict[str, dict[str, torch.Tensor]] = {
    "no JSON": {"comfy_quant": torch.tensor(list(b"{{{"), dtype=torch.uint8)},
    "no object": {"comfy_quant": files.as_bytes([1])},
    "deep": {"comfy_quant": torch.tensor(list(b"[" * 100000), dtype=torch.uint8)},
    "no format": {"comfy_quant": files.as_bytes({})},
    "a format of no text": {"comfy_quant": files.as_bytes({"format": 5})},
    "many scales": {"weight": BYTES.to(torch.float8_e4m3fn), "weight_scale": torch.ones(7)},
    "plain with a mark": {"comfy_quant": files.as_bytes({"format": "float8_e4m3fn"})},
    "int8 without a scale": {
        "comfy_quant": files.as_bytes({"format": "int8_tensorwise"}), "weight": BYTES.to(torch.int8)
    },
    "groups that do not fit": {
        "comfy_quant": rotated(256),
        "weight": BYTES.to(torch.int8), "weight_scale": torch.ones(()),
    },
    "groups of no size": {
        "comfy_quant": rotated(0),
        "weight": BYTES.to(torch.int8), "weight_scale": torch.ones(()),
    },
    "mxfp8 without scales": {"comfy_quant": files.as_bytes({"format": "mxfp8"}), "weight": BYTES},
    "mxfp8 with few scales": {
        "comfy_quant": files.as_bytes({"format": "mxfp8"}), "weight": BYTES,
        "weight_scale": torch.zeros(3, 2, dtype=torch.uint8),
    },
    "nvfp4 of a vector": {
        "comfy_quant": files.as_bytes({"format": "nvfp4"}), "weight": BYTES[0],
        "weight_scale": BYTES, "weight_scale_2": torch.ones(()),
    },
    "nvfp4 without its second scale": {
        "comfy_quant": files.as_bytes({"format": "nvfp4"}), "weight": BYTES,
        "weight_scale": torch.zeros(128, 8, dtype=torch.uint8),
    },
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged_descriptions_are_refused(fault: str) -> None:
    tensors = {"a.weight": torch.ones(4, 4)} | {f"a.{k}": v for k, v in DAMAGED[fault].items()}
    with Refusal("LG-BASE-001", "a", "x.safetensors"):
        unpacked(read_quantised(tensors, {}, where="x.safetensors")["a.weight"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": {"a": 5}}', "[" * 10**5])
def test_damaged_metadata_is_refused(text: str) -> None:
    with Refusal("LG-BASE-001", "x"):
        read_quantised({"a.weight": torch.ones(4, 4)}, {"_quantization_metadata": text}, where="x")


def test_a_quantised_layer_of_another_shape_is_refused(
    weights: dict[str, torch.Tensor], tokenizer: Path, tmp_path: Path
) -> None:
    tensors, _, _ = files.scaled_fp8(weights, "layer")
    name = ldm_keys.UNET_PREFIX + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    tensors[name] = tensors[name][:5].contiguous()
    save_file(tensors, tmp_path / "x.safetensors")
    with Refusal("LG-BASE-003", "attn1.to_q"):
        api.open_base(tmp_path / "x.safetensors", tokenizer=tokenizer).load()


# ---- every family ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gguf", "fp8"])
@pytest.mark.parametrize("family", WEIGHTS)
def test_every_family_trains_on_packed_weights(family: str, kind: str, tmp_path: Path) -> None:
    path, meant = write(tmp_path / "x", WEIGHTS[family](tmp_path), kind)
    save_file(meant, tmp_path / "plain.safetensors")
    given = [TOKENIZERS[k](tmp_path / k) for k in sorted(set(FAMILIES[family].encoders.values()))]
    tiny.write_images(tmp_path / "images" / "2_zibu", [(64, 64), (64, 64)])
    sizes = {"resolution": 64, "min_bucket_reso": 64, "max_bucket_reso": 64, "bucket_reso_steps": 64}
    train_set = runs.train_set(tmp_path / "images", **sizes)
    losses = []
    for file in (path, tmp_path / "plain.safetensors"):
        base = api.open_base(file, tokenizer=given)
        assert base.family.name == family
        places = api.Places(*(tmp_path / file.stem / name for name in ("runs", "loras", "cache")))
        events = runs.Training(base, train_set, places).events(max_train_steps=2, train_batch_size=2)
        losses.append([e.loss for e in events if isinstance(e, api.Step)])
    assert losses[0] == losses[1] and len(losses[0]) == 2
