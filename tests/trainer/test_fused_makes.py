"""Computations that are made again in backward: against the plain formula, alone and before a layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loragraft.trainer.adapters.layers import layer_around
from loragraft.trainer.adapters.lora import LowRank
from loragraft.trainer.adapters.shares import Rows
from loragraft.trainer.engine.lowrank import Bank
from loragraft.trainer.engine.made import made, through
from loragraft.trainer.engine.makes import (
    GEGLU,
    SWIGLU,
    Activated,
    Beside,
    Gelu,
    GroupNormSilu,
    Make,
    Modulated,
    Normed,
    SiluTimes,
)
from loragraft.trainer.engine.meter import measure, track
from loragraft.trainer.families.modules.rotary import rotate, rotation
from loragraft.trainer.families.modules.stream_blocks import cut

EPS = 1e-6
Case = tuple[Make, Callable[..., torch.Tensor], tuple[tuple[int, ...], ...], int]


def _modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def _gated(function: Callable[..., torch.Tensor], gate: int, x: torch.Tensor) -> torch.Tensor:
    halves = x.chunk(2, dim=-1)
    return function(halves[gate]) * halves[1 - gate]


# name -> what is tested, its formula, the sources' shapes, and how many of these can have a gradient
CASES: dict[str, Case] = {
    "modulated": (Modulated(EPS), _modulated, ((1, 5, 6), (1, 1, 6), (1, 1, 6)), 3),
    "modulated, several": (Modulated(EPS), _modulated, ((3, 5, 6), (3, 1, 6), (3, 1, 6)), 3),
    "layer norm": (
        Normed(EPS),
        lambda x, w, b: F.layer_norm(x, (6,), w, b, EPS),
        ((2, 5, 6), (6,), (6,)),
        1,
    ),
    "group norm": (
        GroupNormSilu(2, EPS),
        lambda x, w, b: F.silu(F.group_norm(x, 2, w, b, EPS)),
        ((2, 4, 3, 5), (4,), (4,)),
        1,
    ),
    "gelu": (Activated(Gelu("tanh")), partial(F.gelu, approximate="tanh"), ((2, 5, 6),), 1),
    "swiglu": (Activated(SWIGLU), partial(_gated, F.silu, 0), ((2, 5, 6),), 1),
    "geglu": (Activated(GEGLU), partial(_gated, F.gelu, 1), ((2, 5, 6),), 1),
    "beside": (
        Beside(Gelu("tanh")),
        lambda a, x: torch.cat((a, F.gelu(x, approximate="tanh")), dim=-1),
        ((2, 5, 3), (2, 5, 6)),
        2,
    ),
    "beside, gated": (
        Beside(SWIGLU),
        lambda a, x: torch.cat((a, _gated(F.silu, 0, x)), dim=-1),
        ((2, 5, 3), (2, 5, 6)),
        2,
    ),
    "silu times": (SiluTimes(), lambda a, b: F.silu(a) * b, ((2, 5, 6), (2, 5, 6)), 2),
}


def sources_of(name: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    _, _, shapes, trained = CASES[name]
    torch.manual_seed(0)
    drawn = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [x.requires_grad_(i < trained) for i, x in enumerate(drawn)]


def check_near(ours: torch.Tensor, theirs: torch.Tensor, limit: float = 1e-10) -> None:
    assert (ours - theirs).norm() <= limit * theirs.norm()


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_the_formulas(name: str) -> None:
    make, formula, _, trained = CASES[name]
    sources = sources_of(name)
    ours, theirs = made(make, *sources), formula(*sources)
    check_near(ours, theirs)
    weights = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad(ours, sources[:trained], weights),
        torch.autograd.grad(theirs, sources[:trained], weights),
        strict=True,
    ):
        check_near(a, b)
    assert torch.autograd.gradcheck(partial(made, make), sources)


@pytest.mark.parametrize("name", CASES)
def test_only_gradients_that_are_wanted_are_computed(name: str) -> None:
    make, formula, _, trained = CASES[name]
    for wanted in range(trained):
        sources = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(sources_of(name))]
        (ours,) = torch.autograd.grad(made(make, *sources).sum(), sources[wanted])
        (theirs,) = torch.autograd.grad(formula(*sources).sum(), sources[wanted])
        check_near(ours, theirs, 1e-9)


def test_sums_over_places_stay_exact_in_bf16_on_a_cpu() -> None:
    """torch's kernel for a norm's weight adds up hundreds of bf16 values in bf16: 2 % off."""
    torch.manual_seed(0)
    x, shift, scale = torch.randn(1, 600, 64), torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    grad = torch.randn(1, 600, 64).bfloat16()
    rounded = [s.bfloat16().requires_grad_() for s in (x, shift, scale)]
    exact = [s.detach().double().requires_grad_() for s in rounded]
    ours = torch.autograd.grad(made(Modulated(EPS), *rounded), rounded, grad)
    theirs = torch.autograd.grad(_modulated(*exact), exact, grad.double())
    for a, b in zip(ours, theirs, strict=True):
        check_near(a.double(), b, 5e-3)


def fused_layer(inputs: int, dtype: torch.dtype = torch.float64) -> Any:
    """Return a frozen layer with a LoRA that runs as one function."""
    base = nn.Linear(inputs, 7).to(dtype).requires_grad_(False)
    layer = layer_around(base, [LowRank(base, 2, 1.0)], Rows())
    down, up = torch.randn(1, 2, inputs, dtype=dtype), torch.randn(1, 7, 2, dtype=dtype)
    layer.bank = Bank(down.requires_grad_(), up.requires_grad_(), [0.5])
    return layer


@pytest.mark.parametrize("name", [n for n in CASES if n != "group norm"])
def test_a_layer_behind_it_has_the_same_value_and_gradients(name: str) -> None:
    make, formula, _, trained = CASES[name]
    sources = sources_of(name)
    layer = fused_layer(formula(*sources).shape[-1])
    ours, theirs = through(layer, make, *sources), layer(formula(*sources))
    check_near(ours, theirs)
    weights = torch.randn_like(theirs)
    tensors = (*sources[:trained], layer.bank.down, layer.bank.up)
    for a, b in zip(
        torch.autograd.grad(ours, tensors, weights),
        torch.autograd.grad(theirs, tensors, weights),
        strict=True,
    ):
        check_near(a, b)


def kept(work: Callable[[], torch.Tensor]) -> int:
    """Return how many values autograd keeps, each storage once."""
    found: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        work()
    return sum(found.values())


def test_the_layer_keeps_the_sources_and_not_its_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 500, 64, dtype=torch.float64, requires_grad=True)
    layer = fused_layer(64)
    adapter = layer.bank.down.numel() + layer.bank.up.numel()
    rank = 500 * 2
    plain = kept(lambda: layer(F.gelu(x)))
    ours = kept(lambda: through(layer, Activated(Gelu()), x))
    assert plain == 2 * x.numel() + rank + adapter
    assert ours == x.numel() + rank + adapter


def test_a_layer_without_a_function_of_its_own_is_called_as_it_is() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    layer = nn.Linear(6, 3).double()
    check_near(through(layer, Activated(Gelu()), x), layer(F.gelu(x)))


def _plainly_turned(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * by.real - b * by.imag, a * by.imag + b * by.real), dim=-1)
    return turned.flatten(-2).to(x.dtype)


@pytest.mark.parametrize("batch", [1, 2])
def test_rotation_is_the_formulas_and_turns_gradients_back(batch: int) -> None:
    torch.manual_seed(0)
    places = torch.randint(0, 50, (batch, 5, 2))
    by = rotation(places, (4, 2), 100.0)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    check_near(rotate(x, by), _plainly_turned(x, by))
    assert torch.autograd.gradcheck(lambda x: rotate(x, by), (x,))
    half = x.detach().bfloat16()  # is turned in float32
    assert torch.equal(rotate(half, by), _plainly_turned(half.float(), by).bfloat16())


def test_rotation_can_be_measured_without_data() -> None:
    heads = nn.Linear(6, 6).requires_grad_()
    places = torch.arange(10).view(1, 5, 2)

    def loss_of(tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        x, at = tensors
        assert x is not None and at is not None
        return rotate(heads(x).transpose(1, 2), rotation(at, (4, 2), 100.0)).sum()

    inputs = (torch.randn(2, 5, 3, 6), places)
    cpu = torch.device("cpu")
    assert measure(loss_of, inputs, [heads], cpu).saved == track(loss_of, inputs, [heads], cpu).saved > 0


def test_cutting_gives_views_and_writes_gradients_side_by_side() -> None:
    rows = torch.randn(2, 5, 3 * 8 + 7, dtype=torch.float64, requires_grad=True)
    parts = cut(rows, 2, 8)
    assert [tuple(p.shape) for p in parts] == [(2, 2, 5, 4)] * 3 + [(2, 5, 7)]
    assert all(p.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr() for p in parts)
    assert torch.equal(parts[1], rows[..., 8:16].unflatten(-1, (2, 4)).transpose(1, 2))
    assert torch.equal(parts[3], rows[..., 24:])
    weights = [torch.randn_like(p) for p in parts]
    (grad,) = torch.autograd.grad(parts, rows, weights)
    wanted = torch.cat([w.transpose(1, 2).flatten(2) for w in weights[:3]] + [weights[3]], dim=-1)
    assert torch.equal(grad, wanted)
    assert torch.autograd.gradcheck(lambda rows: cut(rows, 2, 8)[:2], (rows,))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "a part": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
    "a part, channels last": lambda x: torch.cat((x, x), dim=1).contiguous(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
}


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_a_group_norm_reads_any_layout(of_x: str, of_grad: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, 8, generator=draw).double()
    values, grad = torch.randn(2, 3, 8, 4, 6, generator=draw).double()
    grads = []
    for norm in (
        lambda x: made(GroupNormSilu(4, EPS), x, weight, bias),
        lambda x: F.silu(F.group_norm(x.contiguous(), 4, weight, bias, EPS)),
    ):
        x = LAYOUTS[of_x](values).requires_grad_()
        out = norm(x)
        out.backward(LAYOUTS[of_grad](grad))
        assert x.grad is not None
        grads.append((out.detach(), x.grad))
    (ours, dx), (theirs, dx_of_theirs) = grads
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(dx, dx_of_theirs)
