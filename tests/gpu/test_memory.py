"""Memory on a GPU: the prediction against the allocator, and weights that stream from the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer.engine import predictor
from loragraft.trainer.engine.checkpointing import checkpoint_blocks
from loragraft.trainer.engine.meter import measure
from loragraft.trainer.engine.planner import is_out_of_memory
from loragraft.trainer.engine.swap import Swap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

GPU = torch.device("cuda")
MIB = 2**20
WIDTH, ROWS, BLOCKS = 2048, 8192, 8


class Block(nn.Module):
    """A frozen layer with a trained low-rank one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 16, bias=False)
        self.up = nn.Linear(16, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.frozen(x) + self.up(self.down(x)))


@pytest.fixture
def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS))).to(GPU)


def loss(stack: nn.Sequential) -> Any:
    return lambda tensors: stack(tensors[0]).square().mean()


def gradients(stack: nn.Sequential) -> list[torch.Tensor]:
    stack.zero_grad(set_to_none=True)
    loss(stack)((torch.linspace(-1, 1, 64 * WIDTH, device=GPU).view(64, WIDTH),)).backward()
    return [p.grad for p in stack.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointed", [0, BLOCKS])
def test_the_prediction_is_what_the_allocator_counts(stack: nn.Sequential, checkpointed: int) -> None:
    undo = checkpoint_blocks(list(stack)[:checkpointed])
    fed = (torch.randn(ROWS, WIDTH, device=GPU),)
    predictor.dry_run(loss(stack), fed, stack.parameters(), GPU)  # cuBLAS takes its workspace
    needed = predictor.dry_run(loss(stack), fed, stack.parameters(), GPU)
    predicted = measure(loss(stack), fed, [stack], GPU).peak
    undo()
    assert needed == pytest.approx(predicted, rel=0.02, abs=4 * MIB)
    assert all(p.grad is None for p in stack.parameters())


def test_a_prediction_takes_no_memory(stack: nn.Sequential) -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    measure(loss(stack), (torch.empty(ROWS, WIDTH, device="meta"),), [stack], GPU)
    assert torch.cuda.max_memory_allocated() - before < MIB


def test_swapped_weights_give_the_same_gradients_in_less_memory(stack: nn.Sequential) -> None:
    undo = checkpoint_blocks(stack)
    plain = [g.clone() for g in gradients(stack)]
    undo()
    stack.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    swap = Swap(list(stack), GPU)
    saved = before - torch.cuda.memory_allocated()
    assert saved >= (BLOCKS - 2) * WIDTH * WIDTH * 4 - MIB
    undo = checkpoint_blocks(stack)
    for _ in range(3):
        for ours, theirs in zip(gradients(stack), plain, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-9)
    stack.zero_grad(set_to_none=True)
    undo()
    swap.undo()
    assert all(p.device.type == "cuda" for p in stack.parameters())


def test_weights_at_rest_are_on_the_host(stack: nn.Sequential) -> None:
    swap = Swap(list(stack), GPU)
    with torch.no_grad():
        stack(torch.ones(1, WIDTH, device=GPU))
    where = [block.frozen.weight.device.type for block in stack]
    assert where.count("cuda") == 2 and where.count("cpu") == BLOCKS - 2
    assert all(block.down.weight.device.type == "cuda" for block in stack)
    assert stack[0].frozen.weight.is_pinned()
    swap.undo()


def test_free_memory_and_a_real_shortage() -> None:
    free = predictor.free_bytes(GPU)
    assert free is not None and 0 < free <= torch.cuda.get_device_properties(GPU).total_memory
    with pytest.raises(RuntimeError) as shortage:
        torch.empty(4 * free, dtype=torch.uint8, device=GPU)
    assert is_out_of_memory(shortage.value)
