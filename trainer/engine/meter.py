"""Predict a step's memory without computing it: forward and backward on tensors without data.

A dispatch mode sees every operation and follows the storages of its results: allocated when they first
appear, freed when the last tensor on them goes. The same mode counts a real step, which is how the
prediction is tested. Kernels' own workspaces (cuDNN, oneDNN) are not seen; the planner has a margin for them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..errors import one_line

Tensors = tuple[torch.Tensor | None, ...]
Loss = Callable[[Tensors], torch.Tensor]  # tensors of a micro-batch -> one number
SAVED, GRADIENTS, TRANSIENT = "saved", "gradients", "transient"
_ASKS_DEVICE = torch.ops.prim.device.default  # fake tensors dispatch even this, many thousand times a step


class CannotMeasure(RuntimeError):
    """The loss cannot run on tensors without data, e.g. because it reads a value; the text says which."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one micro-batch above what was there before it.

    ``peak`` is the most alive at once, and ``at_peak`` what it consists of: "saved" for the backward pass,
    "gradients" of the trained tensors, "transient". ``saved`` and ``gradients`` are the whole of each.
    ``blocks`` is what each of the given blocks leaves behind in the forward pass.
    """

    peak: int
    saved: int
    gradients: int
    at_peak: Mapping[str, int]
    blocks: tuple[int, ...] = ()


class Meter(TorchDispatchMode):
    """Follows storages on one kind of device while it is active; what enters from outside is not counted."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.live = 0
        self._changes: list[tuple[int, int]] = []  # (serial number, bytes; negative when freed)
        self._serials: dict[int, int] = {}  # by address, while alive; -1 came from outside
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._count = 0

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alive.clear()  # what goes from here on is not followed
        super().__exit__(kind, value, trace)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ASKS_DEVICE:
            return func(*args, **kwargs)
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, new=False)
        results = func(*args, **kwargs)
        # What an operation writes in place is old, also where a real tensor is written as if it had no data.
        new = not all(result.alias_info for result in func._schema.returns)
        for tensor in tree_iter(results):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, new=new)
        return results

    def serials(self, tensors: Iterable[torch.Tensor]) -> set[int]:
        """Return the serial numbers of the storages that these tensors lie on, if they were counted."""
        found = {self._serials.get(_storage(t)._cdata, -1) for t in tensors}
        return found - {-1}

    def alive(self) -> set[int]:
        """Return the serial numbers of all storages that are alive now."""
        return set(self._serials.values()) - {-1}

    def peak(self, kind_of: Callable[[int], str]) -> tuple[int, dict[str, int]]:
        """Return the most bytes alive at once, and how they divide into kinds."""
        now: dict[str, int] = {}
        most, at_peak, total = 0, dict[str, int](), 0
        for serial, size in self._changes:
            kind = kind_of(serial)
            now[kind] = now.get(kind, 0) + size
            total += size
            if total > most:
                most, at_peak = total, dict(now)
        return most, at_peak

    def bytes_of(self, serials: set[int]) -> int:
        """Return the size of the storages with these serial numbers."""
        return sum(size for serial, size in self._changes if size > 0 and serial in serials)

    def _see(self, tensor: torch.Tensor, *, new: bool) -> None:
        storage = _storage(tensor)
        address = storage._cdata
        if address in self._serials:
            return
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        size, serial = storage.nbytes(), -1
        if new and device.type == self.device.type:
            serial = self._count
            self._count += 1
            self.live += size
            self._changes.append((serial, size))

        def gone(_: object) -> None:
            del self._serials[address], self._alive[address]
            if serial >= 0:
                self.live -= size
                self._changes.append((serial, -size))

        self._serials[address] = serial
        # A storage's Python object lives as long as the storage does, also when only autograd holds it.
        self._alive[address] = weakref.ref(storage, gone)


def measure(
    loss_of: Loss,
    inputs: Tensors,
    modules: Sequence[nn.Module],
    device: torch.device,
    *,
    blocks: Sequence[nn.Module] = (),
    backward: bool = True,
) -> Footprint:
    """Predict the footprint of a micro-batch on ``device`` without data; raises CannotMeasure.

    inputs: only shapes and dtypes count, so they may be meta tensors. All that the loss computes with should
    be in ``modules``; their tensors, gradients and device stay as they are. ``backward`` False runs without
    gradients, as sampling does.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        fed = tuple(None if x is None else _fake(x, mode, device) for x in inputs)
        with _faked(modules, mode, device) as trained:
            return _footprint(loss_of, fed, trained, device, blocks, backward)
    except Exception as error:  # each operation has its own way to say that it needs data
        raise CannotMeasure(one_line(f"{type(error).__name__}: {error}", 200)) from error


def track(
    loss_of: Loss,
    inputs: Tensors,
    modules: Sequence[nn.Module],
    device: torch.device,
    *,
    blocks: Sequence[nn.Module] = (),
    backward: bool = True,
) -> Footprint:
    """Run a micro-batch really and count; its gradients are dropped, those that were there come back."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    with gradients_aside(trained):
        return _footprint(loss_of, inputs, trained, device, blocks, backward)


@contextlib.contextmanager
def gradients_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients be computed and dropped; those that are there come back, the same tensors."""
    kept = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad


def tensor_bytes(tensors: Iterable[torch.Tensor], device: torch.device | None = None) -> int:
    """Return the bytes that tensors occupy, on one kind of device if given; what they share counts once."""
    found = {
        (_storage(t)._cdata, t.storage_offset(), t.numel()): t.numel() * t.element_size()
        for t in tensors
        if device is None or t.device.type == device.type
    }
    return sum(found.values())


def _footprint(
    loss_of: Loss,
    inputs: Tensors,
    trained: Sequence[nn.Parameter],
    device: torch.device,
    blocks: Sequence[nn.Module],
    backward: bool,
) -> Footprint:
    meter = Meter(device)
    with meter, torch.set_grad_enabled(backward):
        with _at_blocks(blocks, meter) as grown:
            loss = loss_of(inputs)
        after_forward = meter.alive()
        if backward:
            loss.backward()
        of_gradients = meter.serials(p.grad for p in trained if p.grad is not None)

    def kind_of(serial: int) -> str:
        if serial in of_gradients:
            return GRADIENTS
        return SAVED if serial in after_forward else TRANSIENT

    most, at_peak = meter.peak(kind_of)
    saved, gradients = meter.bytes_of(after_forward), meter.bytes_of(of_gradients)
    return Footprint(most, saved, gradients, at_peak, tuple(grown))


@contextlib.contextmanager
def _at_blocks(blocks: Sequence[nn.Module], meter: Meter) -> Iterator[list[int]]:
    """Note by how much each block's forward lets the live bytes grow."""
    grown = [0] * len(blocks)

    def entered(i: int) -> Callable[..., None]:
        return lambda *_: grown.__setitem__(i, grown[i] - meter.live)

    def left(i: int) -> Callable[..., None]:
        return lambda *_: grown.__setitem__(i, grown[i] + meter.live)

    hooks = [block.register_forward_pre_hook(entered(i)) for i, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(left(i)) for i, block in enumerate(blocks)]
    try:
        yield grown
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _faked(
    modules: Sequence[nn.Module], mode: FakeTensorMode, device: torch.device
) -> Iterator[list[nn.Parameter]]:
    """Put tensors without data on ``device`` in the places of the modules' own; yields the trained ones.

    The mode itself stays off outside operations on these tensors: a constant table that the loss makes
    and keeps for later must be real.
    """
    fakes: dict[int, torch.Tensor] = {}  # what modules share stays shared
    places = []
    for module in dict.fromkeys(inner for root in modules for inner in root.modules()):
        for table in (module._parameters, module._buffers):
            for name, own in table.items():
                if own is not None:
                    places.append((table, name, own))
                    if id(own) not in fakes:
                        fake: torch.Tensor = _fake(own, mode, device)
                        is_parameter = isinstance(own, nn.Parameter)
                        fakes[id(own)] = nn.Parameter(fake, own.requires_grad) if is_parameter else fake
    try:
        for table, name, own in places:
            table[name] = fakes[id(own)]  # type: ignore[assignment]
        yield [p for p in fakes.values() if isinstance(p, nn.Parameter) and p.requires_grad]
    finally:
        for table, name, own in places:
            table[name] = own  # type: ignore[assignment]


def _fake(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
