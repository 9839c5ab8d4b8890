"""Block swap: the same bits, at most two blocks on the device, and weights that outlive any accident."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from loragraft.trainer.engine.checkpointing import blocks, checkpoint_blocks
from loragraft.trainer.engine.swap import Directly, Swap, frozen, frozen_bytes
from loragraft_tests.trainer import models


class Late(Directly):
    """Copies as late as a stream may, when it is waited for; until then the buffer holds NaN."""

    def __init__(self) -> None:
        self.hosts: list[int] = []  # what was copied
        self.slots: list[int] = []  # and where to
        self.fail_at = -1
        self._pending: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def start(self, slot: int, buffer: torch.Tensor, host: torch.Tensor) -> None:
        if len(self.slots) == self.fail_at:
            self.fail_at = -1
            raise RuntimeError("the copy failed")
        self.hosts.append(host.data_ptr())
        self.slots.append(slot)
        buffer.fill_(255)
        self._pending[slot] = (buffer, host)

    def wait(self, slot: int) -> None:
        if slot in self._pending:
            buffer, host = self._pending.pop(slot)
            buffer.copy_(host)


class Strays(TorchDispatchMode):
    """Finds operations that read given memory: on a GPU, weights at rest would be on the wrong device."""

    def __init__(self, memory: list[torch.Tensor]) -> None:
        super().__init__()
        self.at_rest = {t.untyped_storage().data_ptr() for t in memory}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.ops.aten.copy_.default, torch.ops.aten.detach.default):
            for t in tree_iter((args, kwargs)):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() in self.at_rest:
                    self.found.append(str(func))
        return func(*args, **kwargs)


def hosts(swap: Swap) -> list[torch.Tensor]:
    return [block.host for block in swap._blocks]


class Refetch(torch.autograd.Function):
    """A frozen product that keeps nothing for backward and fetches its weight there again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:  # type: ignore[override]
        ctx.layer = layer
        return x @ layer.weight.detach().t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad @ ctx.layer.weight.detach(), None


class Block(nn.Module):
    """A frozen layer, a trained one, and a frozen one last that looks for its weight in backward."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(8, width).requires_grad_(False)
        self.trained = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, 8).requires_grad_(False)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.trained(torch.tanh(self.first(x))))
        return x + Refetch.apply(hidden, self.last) + self.shift  # type: ignore[no-untyped-call]


@pytest.fixture
def stack() -> nn.Sequential:
    return nn.Sequential(*(Block(8 + 4 * i, i) for i in range(5)))


def gradients(stack: nn.Sequential) -> list[torch.Tensor]:
    stack.zero_grad(set_to_none=True)
    loss = stack(torch.ones(3, 8)).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in stack.parameters() if p.grad is not None)]


@pytest.fixture
def swapped(stack: nn.Sequential) -> Iterator[tuple[nn.Sequential, Swap, Late]]:
    copier = Late()
    swap = Swap(list(stack)[1:], models.CPU, copier)
    undo = checkpoint_blocks(stack)
    yield stack, swap, copier
    undo()


def test_the_bits_are_the_same(stack: nn.Sequential) -> None:
    plain = gradients(stack)
    swap = Swap(list(stack)[1:], models.CPU, Late())
    undo = checkpoint_blocks(stack)
    for _ in range(3):
        assert models.equal(gradients(stack), plain)
    undo()
    swap.undo()
    assert models.equal(gradients(stack), plain)
    assert not any("forward" in vars(block) for block in stack)


def test_the_same_on_the_unet_with_a_lora() -> None:
    model = models.model()
    plain = model.gradients(models.inputs())
    found = blocks(model.parts.denoiser)
    swap = Swap(found[5:], models.CPU, Late())
    undo = checkpoint_blocks(found)
    with Strays(hosts(swap)) as strays:
        again = model.gradients(models.inputs())
    assert models.equal(plain, again) and strays.found == []
    with torch.no_grad():
        assert torch.equal(model.loss(models.inputs()), plain[0])
    undo()
    swap.undo()
    assert models.equal(plain, model.gradients(models.inputs()))


def test_weights_at_rest_are_never_computed_with(
    swapped: tuple[nn.Sequential, Swap, Late],
) -> None:
    stack, swap, _ = swapped
    with Strays(hosts(swap)) as strays:
        gradients(stack)
        with torch.no_grad():
            stack(torch.ones(3, 8))
            stack(torch.ones(3, 8))
        gradients(stack)
    assert strays.found == []


def test_blocks_travel_in_the_direction_of_the_step(swapped: tuple[nn.Sequential, Swap, Late]) -> None:
    stack, swap, copier = swapped
    order = [h.data_ptr() for h in hosts(swap)]

    def copied() -> list[int]:
        found = [order.index(h) for h in copier.hosts]
        copier.hosts.clear()
        return found

    gradients(stack)
    # Forward 0 1 2 3; back from 3, where 3 and 2 are still there.
    assert copied() == [0, 1, 2, 3, 1, 0]
    gradients(stack)
    assert copied() == [2, 3, 1, 0]  # backward ended with 0 and 1 on the device
    with torch.no_grad():
        stack(torch.ones(3, 8))
        assert copied() == [2, 3]
        stack(torch.ones(3, 8))
        assert copied() == [0, 1, 2, 3]
    assert copier.slots[:4] == [0, 1, 0, 1]  # two buffers, in turns


def test_at_most_two_blocks_are_resident(swapped: tuple[nn.Sequential, Swap, Late]) -> None:
    stack, swap, _ = swapped
    seen: set[tuple[int, ...]] = set()
    for block in stack:
        block.first.register_forward_hook(lambda *_: seen.add(swap.resident))
    gradients(stack)
    assert {(0, 1), (1, 2), (2, 3)} == {s for s in seen if s}
    sizes = [frozen_bytes(b) for b in list(stack)[1:]]
    assert swap.device_bytes == 2 * max(sizes) and swap.host_bytes == sum(sizes)
    at_rest = {h.untyped_storage().data_ptr() for h in hosts(swap)}
    moved = [{t.untyped_storage().data_ptr() for t in frozen(block)} <= at_rest for block in list(stack)[1:]]
    assert moved.count(False) == 2 and all(moved[i] is (i not in swap.resident) for i in range(4))


def test_trained_tensors_stay(stack: nn.Sequential) -> None:
    before = [p.data_ptr() for p in stack.parameters() if p.requires_grad]
    swap = Swap(list(stack), models.CPU)
    assert [p.data_ptr() for p in stack.parameters() if p.requires_grad] == before
    swap.undo()


def test_a_tensor_that_two_blocks_share_stays(stack: nn.Sequential) -> None:
    stack[2].shift = stack[3].shift
    shared = stack[2].shift.data_ptr()
    plain = gradients(stack)
    swap = Swap(list(stack), models.CPU)
    undo = checkpoint_blocks(stack)
    assert stack[2].shift.data_ptr() == shared
    assert models.equal(gradients(stack), plain)
    undo()
    swap.undo()


def test_layouts_and_dtypes_are_kept() -> None:
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last).requires_grad_(False)
    conv.register_buffer("codes", torch.arange(5, dtype=torch.uint8))
    conv.register_buffer("halves", torch.ones(3, dtype=torch.bfloat16))
    conv.register_buffer("none", torch.ones(0))
    values, stride = conv.weight.clone(), conv.weight.stride()
    swap = Swap([conv], models.CPU)
    x = torch.randn(1, 4, 5, 5)
    out = conv(x)
    assert torch.equal(out, nn.functional.conv2d(x, values, conv.bias))
    assert conv.weight.stride() == stride and torch.equal(conv.weight, values)
    assert conv.codes.tolist() == [0, 1, 2, 3, 4] and conv.halves.dtype == torch.bfloat16
    swap.undo()
    assert conv.weight.stride() == stride and torch.equal(conv.weight, values)


@pytest.mark.parametrize("start", range(6))
def test_a_copy_that_fails_leaves_the_weights_intact(stack: nn.Sequential, start: int) -> None:
    accident(stack, start, None)


@pytest.mark.parametrize("block", range(5))
def test_an_error_in_a_block_leaves_the_weights_intact(stack: nn.Sequential, block: int) -> None:
    accident(stack, -1, block)


def accident(stack: nn.Sequential, start: int, block: int | None) -> None:
    """Let a step fail in the middle; the next one must be right, and so must the weights at the end."""
    plain = gradients(stack)
    kept = {name: t.clone() for name, t in stack.state_dict().items()}
    copier = Late()
    copier.fail_at = start
    swap = Swap(list(stack), models.CPU, copier)
    undo = checkpoint_blocks(stack)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = None if block is None else stack[block].trained.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match=r"copy failed|in the middle"):
        gradients(stack)
    if hook is not None:
        hook.remove()
    with Strays(hosts(swap)) as strays:
        assert models.equal(gradients(stack), plain)
    assert strays.found == []
    undo()
    swap.undo()
    assert all(torch.equal(t, kept[name]) for name, t in stack.state_dict().items())


def test_one_block_and_none() -> None:
    block = Block(8, 0)
    for chosen in ([block], []):
        swap = Swap(chosen, models.CPU)
        undo = checkpoint_blocks(chosen)
        assert len(gradients(nn.Sequential(block))) == 2
        undo()
        swap.undo()


def test_weights_may_stay_in_host_memory_or_go(stack: nn.Sequential) -> None:
    plain = gradients(stack)
    swap = Swap(list(stack), models.CPU)
    swap.undo(models.CPU)
    assert models.equal(gradients(stack), plain)
    assert swap.host_bytes == swap.device_bytes == 0
    swap = Swap(list(stack), models.CPU)
    swap.undo(let_go=True)
    assert all(t.numel() == 0 for block in stack for t in frozen(block))
    assert not any("forward" in vars(block) for block in stack)


def test_tensors_without_data_are_left_alone() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    layer.register_parameter("shape", nn.Parameter(torch.empty(9, 9, device="meta"), requires_grad=False))
    assert frozen_bytes(layer) == 2 * 256
    Swap([layer], models.CPU).undo()
    assert isinstance(layer.shape, nn.Parameter) and layer.shape.is_meta
