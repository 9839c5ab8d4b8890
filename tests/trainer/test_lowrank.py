"""One function a layer against the plain formula: values, gradients, slices of several runs, what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loragraft.trainer import api
from loragraft.trainer.adapters import network
from loragraft.trainer.adapters.fused import fuse
from loragraft.trainer.engine import grouped, lowrank
from loragraft.trainer.engine.attention import use_attention
from loragraft.trainer.engine.lowrank import Bank
from loragraft_tests.trainer import tiny

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(6, 5),
    "linear without bias": lambda: nn.Linear(6, 5, bias=False),
    "1x1": lambda: nn.Conv2d(6, 5, 1),
    "3x3": lambda: nn.Conv2d(6, 5, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(6, 5, (3, 1), dilation=2),
}


def frozen(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return LAYERS[kind]().to(dtype).requires_grad_(False)


def bank_for(layer: Any, scales: list[float], *, buffers: bool = False, rank: int = 3) -> Bank:
    """Return random adapters, one a scale; with ``buffers`` gradients go into tensors of their own."""
    dtype, kernel, runs = layer.weight.dtype, layer.weight.shape[2:], len(scales)
    down = torch.randn(runs, rank, layer.weight.shape[1], *kernel, dtype=dtype).requires_grad_()
    up = torch.randn(runs, layer.weight.shape[0], rank, *(1 for _ in kernel), dtype=dtype).requires_grad_()
    grads = (torch.zeros_like(down), torch.zeros_like(up)) if buffers else (None, None)
    return Bank(down, up, scales, *grads)


def batch(layer: Any, runs: int, each: int = 2) -> torch.Tensor:
    shape = (4, 6) if isinstance(layer, nn.Linear) else (6, 7, 5)
    return torch.randn(runs * each, *shape, dtype=layer.weight.dtype)


def apply(layer: Any, x: torch.Tensor, bank: Bank, rows: tuple[int, ...]) -> torch.Tensor:
    function = lowrank.linear if isinstance(layer, nn.Linear) else lowrank.convolution
    return function(x, layer, bank, rows)


def plain(layer: Any, x: torch.Tensor, bank: Bank, rows: tuple[int, ...]) -> torch.Tensor:
    """Merge each run's update into the weight: y = (W + s B A) x."""
    outs = []
    for piece, row in zip(x.chunk(len(rows)), rows, strict=True):
        delta = torch.einsum("or,r...->o...", bank.up[row].flatten(1), bank.down[row])
        weight = layer.weight + bank.scales[row] * delta
        if isinstance(layer, nn.Linear):
            outs.append(F.linear(piece, weight, layer.bias))
        else:
            how = (layer.stride, layer.padding, layer.dilation)
            outs.append(F.conv2d(piece, weight, layer.bias, *how))
    return torch.cat(outs)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rows", [(0,), (1,), (0, 1, 2), (1, 2), (0, 2)], ids=str)
def test_value_and_gradients_are_those_of_the_changed_weight(kind: str, rows: tuple[int, ...]) -> None:
    layer = frozen(kind)
    bank = bank_for(layer, [0.5, 0.5, 2.0])
    x = batch(layer, len(rows)).requires_grad_()
    expected = plain(layer, x, bank, rows)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), (x, bank.down, bank.up))
    out = apply(layer, x, bank, rows)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((out * weights).sum(), (x, bank.down, bank.up))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert bank.reached == {(row, slot) for row in rows for slot in (0, 1)}


@pytest.mark.parametrize("kind", LAYERS)
def test_gradcheck(kind: str) -> None:
    layer = frozen(kind)
    bank, x = bank_for(layer, [0.5, 2.0]), batch(layer, 2, 1).requires_grad_()

    def function(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return apply(layer, x, Bank(down, up, bank.scales), (0, 1))

    assert torch.autograd.gradcheck(function, (x, bank.down, bank.up))


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(list(LAYERS)),
    runs=st.integers(1, 4),
    each=st.integers(1, 3),
    rank=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_float32_stays_within_1e_5(kind: str, runs: int, each: int, rank: int, seed: int) -> None:
    layer, rows = frozen(kind, torch.float32), tuple(range(runs))
    torch.manual_seed(seed)
    bank = bank_for(layer, [1.0 / (n + 1) for n in range(runs)], rank=rank)
    x = batch(layer, runs, each).requires_grad_()
    expected = plain(layer, x, bank, rows)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), (x, bank.down, bank.up))
    found = torch.autograd.grad((apply(layer, x, bank, rows) * weights).sum(), (x, bank.down, bank.up))
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_buffers_gather_what_autograd_would_return(kind: str) -> None:
    layer, rows = frozen(kind), (0, 2)
    bank = bank_for(layer, [0.5, 1.0, 2.0])
    into = bank_for(layer, bank.scales, buffers=True)
    into.down.data, into.up.data = bank.down.data, bank.up.data
    for _ in range(2):  # a second micro-batch adds to the first
        x = batch(layer, 2)
        apply(layer, x, bank, rows).square().sum().backward()
        apply(layer, x, into, rows).square().sum().backward()
    assert into.down.grad is None and into.up.grad is None
    torch.testing.assert_close(into.down_grad, bank.down.grad)
    torch.testing.assert_close(into.up_grad, bank.up.grad)
    assert not into.down_grad[1].any()  # type: ignore[index]


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_a_run_meets_its_own_slice_only(kind: str) -> None:
    """A value that is not a number in one run's slice touches no other run."""
    layer = frozen(kind)
    bank, x = bank_for(layer, [1.0, 1.0, 1.0], buffers=True), batch(layer, 3)
    x[2:4] = float("nan")
    out = apply(layer, x, bank, (0, 1, 2))
    out.square().sum().backward()
    assert torch.isfinite(out[:2]).all() and torch.isfinite(out[4:]).all()
    for grads in (bank.down_grad, bank.up_grad):
        assert grads is not None
        assert torch.isfinite(grads[0]).all() and torch.isfinite(grads[2]).all()
        assert torch.isnan(grads[1]).any()


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_checkpointing_and_no_grad(kind: str) -> None:
    layer = frozen(kind)
    bank, x = bank_for(layer, [0.5], buffers=True), batch(layer, 1)
    apply(layer, x, bank, (0,)).square().sum().backward()
    assert bank.down_grad is not None
    once = bank.down_grad.clone()
    bank.down_grad.zero_()
    checkpoint(lambda x: apply(layer, x, bank, (0,)), x, use_reentrant=False).square().sum().backward()  # type: ignore[union-attr]
    assert torch.equal(bank.down_grad, once)
    with torch.no_grad():
        assert not apply(layer, x, bank, (0,)).requires_grad


def test_nothing_is_kept_but_the_input_and_a_x() -> None:
    """The plain formula keeps the weight's copy and several of x; here x, A x and the adapter are saved."""
    layer = nn.Linear(64, 48).half().requires_grad_(False)
    bank = Bank(torch.randn(1, 4, 64).requires_grad_(), torch.randn(1, 48, 4).requires_grad_(), [1.0])
    x = torch.randn(100, 64).requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lowrank.linear(x, layer, bank, (0,))
    assert sum(kept.values()) == 4 * (x.numel() + 100 * 4 + bank.down.numel() + bank.up.numel())


# ---- layers of one input ----


def group_for(scales: list[float], *, buffers: bool = False) -> grouped.Group:
    """Return three random layers of one input; their banks' own down tensors are parts of the joined one."""
    torch.manual_seed(0)
    layers = tuple(nn.Linear(6, n, bias=n > 4).double().requires_grad_(False) for n in (5, 4, 7))
    banks = tuple(bank_for(layer, scales, buffers=buffers) for layer in layers)
    down = torch.cat([bank.down.detach() for bank in banks], 1).requires_grad_()
    return grouped.Group(layers, banks, down, torch.zeros_like(down) if buffers else None)


@pytest.mark.parametrize("rows", [(0,), (1,), (0, 1, 2), (0, 2)], ids=str)
def test_a_group_is_its_layers(rows: tuple[int, ...]) -> None:
    group = group_for([0.5, 0.5, 2.0])
    x = torch.randn(len(rows) * 4, 6, dtype=torch.float64).requires_grad_()
    single = [
        lowrank.linear(x, layer, bank, rows) for layer, bank in zip(group.layers, group.banks, strict=True)
    ]
    outs = grouped.linears(x, group, rows)
    weights = [torch.randn_like(out) for out in outs]
    for out, expected in zip(outs, single, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    ups = [bank.up for bank in group.banks]

    def gradients(values: Any, *inputs: torch.Tensor) -> Any:
        total = sum((v * w).sum() for v, w in zip(values, weights, strict=True))
        return torch.autograd.grad(total, inputs)

    wanted = gradients(single, x, *ups, *(bank.down for bank in group.banks))
    found = gradients(outs, x, *ups, group.down)
    for a, b in zip(found[:4], wanted[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[4], torch.cat(wanted[4:], 1), rtol=1e-11, atol=1e-11)


def test_a_groups_gradients_go_into_the_buffers() -> None:
    plain, into = group_for([0.5, 1.0]), group_for([0.5, 1.0], buffers=True)
    for _ in range(2):
        x = torch.randn(8, 6, dtype=torch.float64)
        for group in (plain, into):
            torch.autograd.backward([out.square().sum() for out in grouped.linears(x, group, (0, 1))])
    torch.testing.assert_close(into.down_grad, plain.down.grad)
    for ours, theirs in zip(into.banks, plain.banks, strict=True):
        torch.testing.assert_close(ours.up_grad, theirs.up.grad)
        assert ours.reached == {(row, slot) for row in (0, 1) for slot in (0, 1)}


def test_gradcheck_of_a_group() -> None:
    group = group_for([0.5, 2.0])
    x = torch.randn(4, 6, dtype=torch.float64).requires_grad_()

    def function(x: torch.Tensor, down: torch.Tensor, *ups: torch.Tensor) -> Any:
        banks = tuple(Bank(b.down, up, b.scales) for b, up in zip(group.banks, ups, strict=True))
        return grouped.linears(x, grouped.Group(group.layers, banks, down), (0, 1))

    assert torch.autograd.gradcheck(function, (x, group.down, *(b.up for b in group.banks)))


def test_self_attention_of_a_model_is_grouped(base: api.Base) -> None:
    """All three products of the tiny U-Net's self-attentions are one, and the sums are the same."""
    parts = base.load()
    for module in (parts.denoiser, parts.text_encoder):
        module.float()
    targets = base.family.targets(parts, convolutions=False)
    adapter = network.inject(parts, network.Settings(4, 2.0, None, 1.0, seed=0), targets)
    for m in adapter.modules:
        m.low.up.data.normal_(std=0.1)
    x, t, cond = torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.randn(1, 77, tiny.TEXT)

    def run() -> tuple[torch.Tensor, int]:
        counter = OpCount()
        with counter:
            out = base.family.predict(parts, x, t, (cond,))
            out.square().sum().backward()
        return out.detach(), counter.products

    use_attention(parts.denoiser, "sdpa")
    plain, products = run()
    expected = [p.grad.clone() for p in adapter.parameters("denoiser") if p.grad is not None]
    flat, _ = fuse(parts, [adapter], torch.float32)
    attentions = [m for m in parts.denoiser.modules() if hasattr(m, "grouped_qkv")]
    assert len(attentions) == sum(m.target.path.endswith("attn1.to_q") for m in adapter.modules) > 0
    fused, fewer = run()
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    for p, grad in zip(adapter.parameters("denoiser"), expected, strict=True):
        assert (flat.gradient(p) - grad).norm() <= 1e-4 * grad.norm() + 1e-6
    assert fewer < products
    network.remove(parts, adapter)
    assert not any(hasattr(m, "grouped_qkv") for m in attentions)


class OpCount(TorchDispatchMode):
    """Count matrix products."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += any(name in str(func) for name in ("mm", "bmm"))
        return func(*args, **(kwargs or {}))
