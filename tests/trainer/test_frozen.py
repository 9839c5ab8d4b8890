"""Frozen layers in another storage: the plain layer's output and gradient, and nothing of the weight kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from loragraft.trainer.engine import frozen as module
from loragraft.trainer.engine.frozen import (
    Frozen,
    FrozenConv2d,
    FrozenEmbedding,
    FrozenLinear,
    dense,
    freeze,
)
from loragraft.trainer.engine.storage import FORMATS, pack
from loragraft_tests.trainer.data_folders import Refusal

CPU = torch.device("cpu")
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "1x1": (lambda: nn.Conv2d(3, 4, 1), (2, 3, 5, 4)),
    "3x3": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 4)),
    "stride": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), (1, 3, 7, 6)),
    "odd": (lambda: nn.Conv2d(4, 6, (3, 1), padding=(0, 2), dilation=(2, 1), groups=2), (2, 4, 9, 5)),
}


def plain(name: str, dtype: torch.dtype = torch.float16) -> tuple[Any, torch.Tensor]:
    """Return a frozen plain layer with weights in ``dtype``, and a float32 input for it."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make().to(dtype).requires_grad_(False), torch.randn(shape)


def frozen(layer: Any, dtype: torch.dtype = torch.float32, storage: str = "as_is") -> Any:
    """Return the layer as `freeze` leaves it."""
    root = nn.Sequential(layer)
    freeze(root, dtype, CPU, storage=storage)
    return root[0]


def both(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and input gradient for one fixed gradient of the output."""
    x = x.clone().requires_grad_()
    out = layer(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


# ---- the same function ----


@pytest.mark.parametrize("name", LAYERS)
def test_equal_to_the_plain_layer(name: str) -> None:
    layer, x = plain(name)
    new = frozen(layer)
    assert type(new) in (FrozenLinear, FrozenConv2d) and new.stored.dtype == torch.float16
    for found, expected in zip(both(new, x), both(layer.float(), x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_packed_equal_to_the_plain_layer_on_the_unpacked_weight(name: str, storage: str) -> None:
    layer, x = plain(name, torch.float32)
    new = frozen(layer, storage=storage)
    layer.weight.data = pack(layer.weight, storage).unpack(torch.float32)
    for found, expected in zip(both(new, x), both(layer, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("storage", ["as_is", *FORMATS])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_hold_against_differences(name: str, storage: str) -> None:
    layer, x = plain(name)
    assert torch.autograd.gradcheck(
        frozen(layer, torch.float64, storage), (x.double().requires_grad_(),), eps=1e-6
    )


def test_an_embedding_brings_its_rows() -> None:
    table = nn.Embedding(7, 3).half().requires_grad_(False)
    new = frozen(table)
    ids = torch.tensor([[1, 6, 1]])
    assert type(new) is FrozenEmbedding and new.weight.shape == (7, 3)
    assert torch.equal(new(ids), F.embedding(ids, table.weight.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_half_arithmetic_is_the_converted_layers(name: str, dtype: torch.dtype) -> None:
    layer, x = plain(name, torch.float32)
    new = frozen(layer, dtype)
    found, expected = both(new, x.to(dtype)), both(layer.to(dtype), x.to(dtype))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other)
    assert new(x).dtype == dtype, "an input of another dtype is brought to the arithmetic's"


# ---- what is kept ----


def kept_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that autograd keeps for backward, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("storage", ["as_is", *FORMATS])
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_kept_for_backward(name: str, storage: str) -> None:
    layer, x = plain(name)
    x.requires_grad_()

    def autocast() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: torch.Tensor = layer(x)
        return result

    assert kept_bytes(autocast) > 0
    new = frozen(layer, torch.bfloat16, storage)
    assert kept_bytes(lambda: new(x.bfloat16())) == 0


@pytest.mark.parametrize("name", ["linear", "3x3"])
def test_a_weight_that_was_brought_is_gone_after_the_product(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = plain(name)
    new, brought = frozen(layer, storage="fp8"), []

    def watched(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        weight = dense(layer, dtype)
        brought.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(module, "dense", watched)
    out = new(x.requires_grad_())
    assert len(brought) == 1 and brought[0]() is None
    out.sum().backward()
    assert len(brought) == 2 and brought[1]() is None


def test_nothing_is_recorded_where_nothing_is_wanted() -> None:
    layer, x = plain("linear")
    new = frozen(layer)
    assert new(x).grad_fn is None
    with torch.no_grad():
        assert new(x.requires_grad_()).grad_fn is None


@pytest.mark.parametrize("storage", ["as_is", "nf4"])
def test_the_same_gradient_under_gradient_checkpointing(storage: str) -> None:
    layer, x = plain("3x3")
    new = frozen(layer, storage=storage)
    body = nn.Sequential(new, nn.SiLU())
    expected = both(body, x)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}

    class Checkpointed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = checkpoint(body, x, **options)
            return result

    for found, plainly in zip(both(Checkpointed(), x), expected, strict=True):
        assert torch.equal(found, plainly)


# ---- what others read ----


def test_dense_of_every_kind() -> None:
    layer, _ = plain("linear")
    half, float_ = layer.weight, layer.weight.float()
    assert dense(layer, torch.float16).data_ptr() == half.data_ptr(), "no copy where none is needed"
    assert torch.equal(dense(layer, torch.float32), float_)
    new = frozen(layer)
    assert dense(new, torch.float16).data_ptr() == half.data_ptr()
    assert torch.equal(dense(new, torch.float32), float_)
    assert dense(frozen(layer, storage="int8"), torch.bfloat16).dtype == torch.bfloat16
    assert not dense(new, torch.float32).requires_grad


@pytest.mark.parametrize("storage", ["as_is", "fp8", "nf4"])
def test_attributes_are_a_plain_layers(storage: str) -> None:
    layer, _ = plain("odd")
    new = frozen(layer, torch.bfloat16, storage)
    assert isinstance(new, nn.Conv2d)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(new, name) == getattr(layer, name)
    assert (new.weight.dtype, new.weight.shape, new.weight.device) == (
        torch.bfloat16,
        layer.weight.shape,
        CPU,
    )
    assert new.bias.dtype == torch.bfloat16 and not new.bias.requires_grad
    linear = frozen(plain("linear")[0], torch.bfloat16, storage)
    assert isinstance(linear, nn.Linear) and (linear.in_features, linear.out_features) == (6, 5)
    assert "in_features=6" in repr(linear) and "kernel_size=(3, 1)" in repr(new)


# ---- a tree of layers ----


class Tree(nn.Module):
    """A few layers of all kinds, half of them in half precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1).half()
        self.inner = nn.ModuleList([nn.Linear(64, 64).half(), nn.Linear(64, 64), nn.GroupNorm(2, 4).half()])
        self.table = nn.Embedding(5, 4).half()
        self.register_buffer("ids", torch.arange(3))
        self.same = self.inner[0]
        self.requires_grad_(False)


def kinds(tree: nn.Module) -> dict[str, type]:
    return {path: type(m) for path, m in tree.named_modules(remove_duplicate=False) if path}


def test_only_layers_of_another_dtype_are_replaced_and_paths_stay() -> None:
    tree = Tree()
    before, held = list(kinds(tree)), {k: v.data_ptr() for k, v in tree.state_dict().items()}
    done = freeze(tree, torch.float32, CPU)
    assert [k for k in kinds(tree) if k in before] == before
    assert (done.num_packed, done.line) == (0, None)
    assert type(tree.inner[0]) is FrozenLinear and tree.same is tree.inner[0]
    assert type(tree.inner[1]) is nn.Linear, "a weight in the arithmetic's dtype needs nothing"
    assert tree.inner[1].weight.data_ptr() == held["inner.1.weight"]
    assert tree.inner[0].stored.data_ptr() == held["inner.0.weight"], "the weight is shared"
    assert tree.inner[2].weight.dtype == torch.float32, "norms are converted"
    assert tree.ids.dtype == torch.int64


def test_what_need_not_be_kept_is_converted_once() -> None:
    tree = Tree()
    weight = tree.inner[0].weight.detach()
    freeze(tree, torch.bfloat16, CPU, keeps=lambda weight: False)
    assert {p.dtype for p in tree.parameters()} == {torch.bfloat16}
    assert set(kinds(tree).values()).isdisjoint((FrozenLinear, FrozenConv2d, FrozenEmbedding))
    assert weight.dtype == torch.float16, "the weight given is as it was"
    assert torch.equal(tree.inner[0].weight, weight.bfloat16())


def test_trained_layers_are_left_alone() -> None:
    tree = Tree()
    tree.inner[0].requires_grad_(True)
    tree.inner[2].requires_grad_(True)
    freeze(tree, torch.float32, CPU, storage="int8")
    assert type(tree.inner[0]) is nn.Linear
    assert tree.inner[0].weight.dtype == tree.inner[2].weight.dtype == torch.float16


def test_convolutions_that_pad_otherwise_are_converted() -> None:
    tree = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Conv2d(2, 2, 3, padding="same")
    )
    freeze(tree.half().requires_grad_(False), torch.float32, CPU)
    assert set(kinds(tree).values()) == {nn.Conv2d}
    assert tree(torch.zeros(1, 2, 4, 4)).dtype == torch.float32


def test_packing_says_what_it_costs() -> None:
    tree = Tree()
    tree.inner[1].weight.data[0] *= 1000  # one scale for the row, but the blocks of nf4 lie in rows too
    weights = {i: tree.inner[i].weight.detach().float() for i in (0, 1)}
    done = freeze(tree, torch.float32, CPU, storage="int8", skip=("conv_in",))
    assert type(tree.conv_in) is FrozenConv2d and tree.conv_in.stored.dtype == torch.float16
    assert done.num_packed == 2
    errors = {i: tree.inner[i].weight - weights[i] for i in (0, 1)}
    all_errors, all_weights = (torch.cat(list(x.values())) for x in (errors, weights))
    relative = f"{float(all_errors.norm() / all_weights.norm()):.2%}"
    of_each = {i: float(errors[i].norm() / weights[i].norm()) for i in (0, 1)}
    worst = max(of_each, key=lambda i: of_each[i])
    assert done.line is not None
    assert done.line.startswith("base_storage int8: 2 layers")
    assert f"linear {relative}" in done.line and f"worst inner.{worst} {of_each[worst]:.2%}" in done.line


def no_float64(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    raise TypeError("the MPS framework doesn't support float64")


def test_the_error_is_measured_in_float32_and_precisely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have no float64; a plain sum in float32 would lose the small terms."""
    layer = nn.Linear(1, 1, bias=False).requires_grad_(False)
    layer.weight.data = torch.full((4099, 1031), 0.1)
    layer.weight.data[0, 0] = 300.0
    packed = pack(layer.weight, "int8")
    weight = layer.weight.double()
    error = float((packed.unpack(torch.float32).double() - weight).norm() / weight.norm())
    monkeypatch.setattr(torch.Tensor, "double", no_float64)
    done = Frozen("int8")
    done.measure("here", layer, packed)
    assert done._worst[0] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("storage", ["fp8"])
def test_a_storage_that_the_device_lacks_is_refused_before_anything_moves(storage: str) -> None:
    tree = Tree()
    before = kinds(tree)
    with Refusal("LG-RUN-012", f"base_storage {storage}", "mps"):
        freeze(tree, torch.float32, torch.device("mps"), storage=storage)
    assert kinds(tree) == before and tree.conv_in.weight.dtype == torch.float16


def test_a_damaged_weight_is_named() -> None:
    tree = Tree()
    tree.inner[1].weight.data[3, 3] = torch.inf
    with Refusal("LG-BASE-009", "inner.1"):
        freeze(tree, torch.float32, CPU, storage="nf4")
