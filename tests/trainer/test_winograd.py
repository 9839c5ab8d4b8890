"""Winograd's form gives the plain convolution's output and input gradient, with about its rounding error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from loragraft.trainer.engine import winograd
from loragraft.trainer.engine.winograd import Scratch, convolution, input_gradient


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@settings(deadline=None, max_examples=60)
@given(
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    tiles=st.sampled_from((1, 5, 16, 256)),
    numbers=st.sampled_from((1, 400, 7_000_000)),
    bias=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_value_and_gradient_whatever_the_parts(
    channels: tuple[int, int],
    batch: int,
    size: tuple[int, int],
    tiles: int,
    numbers: int,
    bias: bool,
    last: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    height, width = 2 * size[0], 2 * size[1]
    x, grad = draw(batch, channels[0], height, width), draw(batch, channels[1], height, width)
    weight, offset = draw(channels[1], channels[0], 3, 3), draw(channels[1]) if bias else None
    if last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    exact_offset = None if offset is None else offset.double()
    exact = F.conv2d(x.double(), weight.double(), exact_offset, padding=1)
    exact_into = F.conv_transpose2d(grad.double(), weight.double(), padding=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "TILES", tiles)
        patch.setattr(winograd, "FILTER_NUMBERS", numbers)
        out, into = convolution(x, weight, offset, Scratch()), input_gradient(grad, weight, Scratch())
    assert out.shape == exact.shape and into.shape == exact_into.shape
    assert relative(out, exact) < 2e-6 and relative(into, exact_into) < 2e-6


def test_its_error_is_near_a_plain_convolutions() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 320, 16, 16), torch.randn(320, 320, 3, 3)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    plain = relative(F.conv2d(x, weight, padding=1), exact)
    assert relative(convolution(x, weight, None, Scratch()), exact) < 4 * plain


def test_scratch_of_another_call_changes_nothing() -> None:
    torch.manual_seed(0)
    scratch = Scratch()
    calls = [
        (torch.randn(b, c, s, s), torch.randn(d, c, 3, 3)) for b, c, d, s in ((2, 9, 30, 8), (1, 30, 4, 4))
    ]
    alone = [convolution(x, weight, None, Scratch()) for x, weight in calls]
    shared = [convolution(x, weight, None, scratch) for x, weight in (*calls[::-1], *calls)]
    for found, wanted in zip(shared, (*alone[::-1], *alone), strict=True):
        assert torch.equal(found, wanted), (
            "what a call returns is not scratch, and scratch is written before it is read"
        )


def test_a_prediction_leaves_the_scratch_alone() -> None:
    torch.manual_seed(0)
    scratch = Scratch()
    x, weight = torch.randn(2, 9, 8, 8), torch.randn(30, 9, 3, 3)
    for _ in range(2):
        with FakeTensorMode() as fake:
            predicted = convolution(fake.from_tensor(x), fake.from_tensor(weight), None, scratch)
            assert predicted.shape == (2, 30, 8, 8)
        assert torch.equal(convolution(x, weight, None, scratch), convolution(x, weight, None, Scratch()))
