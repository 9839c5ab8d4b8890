"""Flat buffers: an optimizer over them computes what it computes over the single tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loragraft.trainer.engine import flat as flat_file
from loragraft.trainer.engine.flat import ALIGNMENT, Flat, FlatOptimizer

SHAPES = [(3, 5), (7, 3), (1, 65), (2, 2, 3, 3), (64,)]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def adamw(params: list[nn.Parameter], rates: tuple[float, float] = (1e-2, 3e-3)) -> torch.optim.Optimizer:
    groups = [
        {"params": params[:2], "lr": rates[0], "base_lr": rates[0]},
        {"params": params[2:], "lr": rates[1], "base_lr": rates[1]},
    ]
    return torch.optim.AdamW(groups, fused=True, weight_decay=0.1)


def one_row(params: list[nn.Parameter], dtype: torch.dtype = torch.float32) -> Flat:
    return Flat([[p] for p in params], dtype)


def step_plain(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], max_norm: float) -> float:
    norm = nn.utils.clip_grad_norm_(params, max_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), max_norm=st.sampled_from([0.0, 0.5, 1e6]), lag=st.integers(0, 4))
def test_it_steps_as_over_single_tensors(seed: int, max_norm: float, lag: int) -> None:
    """Also where some tensors get no gradient (they must not decay), or get one later than others."""
    ours, theirs = parameters(seed), parameters(seed)
    flat, plain = one_row(ours), adamw(theirs)
    optimizer = adamw(ours)
    fused = FlatOptimizer(optimizer, flat, 0)
    for number in range(6):
        reached = {0, 1, 3} | ({2} if number >= lag else set())
        generator = torch.Generator().manual_seed(seed * 100 + number)
        for index in sorted(reached):
            grad = torch.randn(SHAPES[index], generator=generator)
            flat.gradient(ours[index]).copy_(grad)
            theirs[index].grad = grad
        for o in (optimizer, plain):
            o.param_groups[0]["lr"] = 1e-2 / (number + 1)
        norm = fused.step(max_norm, frozenset(reached))
        expected = step_plain(plain, [t for t in theirs if t.grad is not None], max_norm)
        assert norm.item() == pytest.approx(expected, rel=1e-5)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-7)
        assert not flat.grads.any()
    assert torch.equal(ours[4], parameters(seed)[4])
    for a, b in zip(ours, theirs, strict=True):
        assert set(optimizer.state.get(a, {})) == set(plain.state.get(b, {}))
        for key, value in plain.state.get(b, {}).items():
            torch.testing.assert_close(optimizer.state[a][key], value, rtol=1e-5, atol=1e-7)


def test_it_goes_on_from_a_restored_state_bit_by_bit() -> None:
    grads = [torch.randn(shape) for shape in SHAPES]
    reached = frozenset(range(5))

    def stepped(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
        flat = one_row(params)
        fused = FlatOptimizer(optimizer, flat, 0)
        for _ in range(steps):
            for p, g in zip(params, grads, strict=True):
                flat.gradient(p).copy_(g)
            fused.step(1.0, reached)

    straight = parameters()
    stepped(straight, adamw(straight), 5)
    first = parameters()
    before = adamw(first)
    stepped(first, before, 3)
    again = [nn.Parameter(p.detach().clone()) for p in first]
    after = adamw(again)
    for old, new in zip(first, again, strict=True):
        after.state[new] = {k: v.detach().clone() for k, v in before.state[old].items()}
    stepped(again, after, 2)
    assert all(torch.equal(a, b) for a, b in zip(again, straight, strict=True))


def test_parameters_become_views_and_the_padding_stays_zero() -> None:
    params = parameters()
    values = [p.detach().clone() for p in params]
    flat = one_row(params)
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    assert all(p.untyped_storage().data_ptr() == flat.values.untyped_storage().data_ptr() for p in params)
    assert all(slot.start % ALIGNMENT == 0 for slot in flat.slots)
    fused = FlatOptimizer(adamw(params), flat, 0)
    for p in params:
        flat.gradient(p).fill_(1.0)
    fused.step(0.0, frozenset(range(5)))
    inside = sum(p.detach().abs().sum() for p in params)
    torch.testing.assert_close(flat.values.abs().sum(), inside)


def test_runs_of_other_ranks_and_modules_share_a_matrix() -> None:
    """A narrower tensor is the corner of the widest; what a run lacks stays zero in its row."""
    wide, narrow = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(2, 6))
    only = nn.Parameter(torch.randn(3, 3))
    before = narrow.detach().clone()
    flat = Flat([[wide, narrow], [None, only]], torch.float32)
    assert torch.equal(narrow, before)
    stacked = flat.slots[0].view(flat.values)
    assert stacked.shape == (2, 4, 6)
    assert torch.equal(stacked[1, :2], narrow) and not stacked[1, 2:].any()
    assert not flat.slots[1].view(flat.values)[0].any()
    optimizers = [torch.optim.AdamW([wide], lr=0.1), torch.optim.AdamW([narrow, only], lr=0.2)]
    fused = [FlatOptimizer(o, flat, row) for row, o in enumerate(optimizers)]
    flat.gradient(narrow).fill_(1.0)
    fused[1].step(0.0, frozenset({0}))
    assert optimizers[1].state[narrow]["exp_avg"].shape == (2, 6)
    assert not stacked[1, 2:].any()
    assert torch.equal(wide, stacked[0]) and not fused[0].is_settled(frozenset({0}))


def test_the_working_copy_follows_and_gradients_add_up_in_float32() -> None:
    params = parameters()
    flat = one_row(params, torch.bfloat16)
    assert flat.work.dtype == flat.work_grads.dtype == torch.bfloat16
    assert torch.equal(flat.work, flat.values.bfloat16())
    for _ in range(300):  # in bf16 alone the sum would stop at 256
        flat.work_grads.fill_(1.0)
        flat.collect((0,))
    assert flat.grads.eq(300).all()
    assert not flat.work_grads.any()
    FlatOptimizer(adamw(params), flat, 0).step(0.0, frozenset(range(5)))
    assert torch.equal(flat.work, flat.values.bfloat16())


def test_gradients_are_added_piece_by_piece_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_file, "PIECE", 100)
    flat = Flat(
        [[a, b, c] for a, b, c in zip(*(parameters(n) for n in range(3)), strict=True)], torch.bfloat16
    )
    sums, new = torch.randn(flat.grads.shape), torch.randn(flat.grads.shape).bfloat16()
    flat.grads.copy_(sums)
    flat.work_grads.copy_(new)
    flat.collect((1, 2))
    assert torch.equal(flat.grads[0], sums[0]) and torch.equal(flat.grads[1:], sums[1:] + new[1:])
    assert torch.equal(flat.work_grads[0], new[0]) and not flat.work_grads[1:].any()
