"""Over flat buffers, every elementwise optimizer computes what it computes over single tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loragraft.trainer.engine.flat import Flat, FlatOptimizer
from loragraft.trainer.optim.build import build_optimizer
from loragraft.trainer.optim.state import pack, unpack
from loragraft.trainer.settings.optimizers import KNOWN
from loragraft_tests.trainer.test_optim import settings

SHAPES = [(3, 5), (7, 3), (1, 65), (2, 2, 3, 3), (64,)]
NAMES = [name for name, entry in KNOWN.items() if entry.elementwise]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def built(name: str, tensors: list[nn.Parameter]) -> torch.optim.Optimizer:
    config = settings(name, optimizer_args=["weight_decay=0.1"])
    return build_optimizer(config, [(tensors[:2], 1e-2), (tensors[2:], 3e-3)])


def reached_at(number: int) -> set[int]:
    """Return the tensors that have a gradient in a step: one comes later, one never does."""
    return {0, 1, 3} | ({2} if number >= 2 else set())


@pytest.mark.parametrize("name", NAMES)
def test_it_steps_as_over_single_tensors(name: str) -> None:
    ours, theirs = parameters(), parameters()
    flat, plain, optimizer = Flat([[p] for p in ours], torch.float32), built(name, theirs), built(name, ours)
    fused = FlatOptimizer(optimizer, flat, 0)
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        reached = reached_at(number)
        for index in sorted(reached):
            grad = torch.randn(SHAPES[index], generator=generator)
            flat.gradient(ours[index]).copy_(grad)
            theirs[index].grad = grad
        fused.step(0.0, frozenset(reached))
        plain.step()
        plain.zero_grad()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-7)
    assert torch.equal(ours[4], parameters()[4])
    kept, expected = pack(optimizer), pack(plain)
    assert set(kept) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(kept[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_from_a_packed_state_bit_by_bit(name: str) -> None:
    grads, reached = [torch.randn(shape) for shape in SHAPES], frozenset(range(5))

    def stepped(tensors: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
        flat = Flat([[p] for p in tensors], torch.float32)
        fused = FlatOptimizer(optimizer, flat, 0)
        for _ in range(steps):
            for p, g in zip(tensors, grads, strict=True):
                flat.gradient(p).copy_(g)
            fused.step(1.0, reached)

    straight = parameters()
    stepped(straight, built(name, straight), 5)
    first = parameters()
    before = built(name, first)
    stepped(first, before, 3)
    again = [nn.Parameter(p.detach().clone()) for p in first]
    after = built(name, again)
    unpack(after, {k: v.clone() for k, v in pack(before).items()})
    stepped(again, after, 2)
    assert all(torch.equal(a, b) for a, b in zip(again, straight, strict=True))
