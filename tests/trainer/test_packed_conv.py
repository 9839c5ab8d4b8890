"""Convolutions on reordered weights: the same sums as the plain ones, in half precision's rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.engine import packed_conv
from loragraft.trainer.engine.packed_conv import PackedConv2d, pack_convolutions, packed_bytes
from loragraft_tests.trainer import runs

pytestmark = pytest.mark.skipif(not packed_conv.is_possible(), reason="this torch has no oneDNN convolutions")


def plain(channels: tuple[int, int], bias: bool, seed: int) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(*channels, 3, padding=1, bias=bias).bfloat16().requires_grad_(False)


@settings(deadline=None, max_examples=40)
@given(
    channels=st.tuples(st.integers(16, 70), st.integers(16, 70)),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    bias=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_value_and_gradient(
    channels: tuple[int, int], batch: int, size: tuple[int, int], bias: bool, last: bool, seed: int
) -> None:
    base = plain(channels, bias, seed)
    x = torch.randn(batch, channels[0], *size).bfloat16()
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    out = PackedConv2d(base)(x)
    weight = base.weight.double()
    expected = F.conv2d(x.double(), weight, None if base.bias is None else base.bias.double(), padding=1)
    grad = torch.randn_like(expected).bfloat16()
    (found,) = torch.autograd.grad(out, x, grad)
    (wanted,) = torch.autograd.grad(expected, x, grad.double())
    assert (out.double() - expected).norm() <= 4e-3 * expected.norm()
    assert (found.double() - wanted.double()).norm() <= 4e-3 * wanted.double().norm()


def test_only_what_can_gain_is_replaced() -> None:
    kept = {
        "strided": nn.Conv2d(32, 32, 3, stride=2, padding=1).bfloat16(),
        "narrow": nn.Conv2d(4, 32, 3, padding=1).bfloat16(),
        "pointwise": nn.Conv2d(32, 32, 1).bfloat16(),
        "grouped": nn.Conv2d(32, 32, 3, padding=1, groups=2).bfloat16(),
        "full": nn.Conv2d(32, 32, 3, padding=1),
    }
    root = nn.ModuleDict({**kept, "packed": plain((32, 48), True, 0)}).requires_grad_(False)
    trained = nn.Conv2d(32, 32, 3, padding=1).bfloat16()
    root["trained"] = trained
    root["bias trained"] = plain((32, 48), True, 0)
    root["bias trained"].bias.requires_grad_(True)
    assert pack_convolutions(root) == 1 and type(root["bias trained"]) is nn.Conv2d
    assert isinstance(root["packed"], PackedConv2d)
    assert all(root[name] is module for name, module in kept.items()) and root["trained"] is trained
    assert packed_bytes(root) == 2 * 2 * 32 * 48 * 9
    assert torch.equal(root["packed"].weight, plain((32, 48), True, 0).weight)


def test_a_torch_without_the_operations_keeps_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> torch.Tensor:
        raise AttributeError("no such operation")

    packed_conv.is_possible.cache_clear()
    monkeypatch.setattr(packed_conv, "_packed", missing)
    assert not packed_conv.is_possible()
    assert pack_convolutions(nn.ModuleDict({"a": plain((32, 48), True, 0)})) == 0
    packed_conv.is_possible.cache_clear()


def test_an_operation_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = packed_conv._packed
    packed_conv.is_possible.cache_clear()
    monkeypatch.setattr(packed_conv, "_packed", lambda weight: real(weight.flip(3)))
    assert not packed_conv.is_possible()
    packed_conv.is_possible.cache_clear()


@pytest.mark.parametrize("conv_dim", [None, 4])
@pytest.mark.slow
def test_a_bf16_run_learns_the_same_with_them(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch, conv_dim: int | None
) -> None:
    options = {"max_train_steps": 6, "mixed_precision": "bf16", "conv_dim": conv_dim}
    used: list[torch.Size] = []
    real = packed_conv._convolve
    monkeypatch.setattr(packed_conv, "_convolve", lambda x, *a: used.append(x.shape) or real(x, *a))
    packed = training.elsewhere("packed").events(**options)
    assert used
    monkeypatch.setattr(packed_conv, "is_possible", lambda: False)
    used.clear()
    without = training.elsewhere("plain").events(**options)
    assert not used
    modules = [runs.only(events, api.Planned).num_modules for events in (packed, without)]
    assert modules[0] == modules[1]
    assert runs.losses(packed) == pytest.approx(runs.losses(without), rel=2e-2)


@pytest.mark.slow
def test_memory_can_be_predicted_with_them(base: api.Base, training: runs.Training) -> None:
    from loragraft.trainer import fit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "SMALL_BYTES", 0)
        events = training.events(max_train_steps=1, mixed_precision="bf16")
    lines = runs.only(events, api.Planned).lines
    assert [line for line in lines if line.startswith("memory: ") and "predicted" in line]
    assert not [line for line in lines if "cannot be predicted" in line]
