"""Whole steps as CUDA graphs: one launch instead of thousands (CUDA C++ Programming Guide, "CUDA Graphs").

A micro-batch's forward and backward are captured once for each set of shapes, the update once. Replays
read fixed input buffers and add to fixed gradient buffers. Nothing random happens inside: noise,
timesteps and captions are drawn outside, so a replay computes the same function as the eager engine.
Every capture is checked against the eager gradients of the same batch before it is used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from ..errors import one_line
from .steps import Loss, Tensors, clip, parameters_of

MAX_GRAPHS = 16  # the least recently used one goes; their memory is one shared pool
WARMUPS = 2  # cuBLAS, cuDNN and the autograd engine set themselves up in the first runs
# Replayed against eager gradients, relative L2: reductions may be ordered otherwise, nothing more.
TOLERANCE = 2e-2
THIS_THREAD = "thread_local"  # other threads of a host may use the GPU during a capture
Key = tuple[object, ...]


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    loss: torch.Tensor


class Captured:
    """Replays captured steps; a shape whose capture fails runs eagerly, with a note."""

    name = "captured"

    def __init__(self, loss_of: Loss, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.loss_of, self.optimizer, self.device = loss_of, optimizer, device
        self.notes: list[str] = []
        self._graphs: OrderedDict[Key, _Graph | None] = OrderedDict()
        self._update: tuple[torch.cuda.CUDAGraph, torch.Tensor] | None = None
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _capture_stream(device)
        self._failed: str | None = None
        for group in optimizer.param_groups:  # captured code reads the rate where it lies
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            group["capturable"] = True

    def backward(self, tensors: Tensors, count: int) -> torch.Tensor:
        """See `steps.Engine`."""
        key: Key = (count, *(None if x is None else (x.shape, x.dtype) for x in tensors))
        if key not in self._graphs:
            self._graphs[key] = self._captured(tensors, count)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        found = self._graphs[key]
        if found is None:
            return self._eager(_on(self.device, tensors), count)
        for static, new in zip(found.inputs, tensors, strict=True):
            if static is not None and new is not None:
                static.copy_(new, non_blocking=True)
        found.graph.replay()
        return found.loss.clone()  # the next replay writes over it

    def update(self, max_norm: float) -> torch.Tensor:
        """See `steps.Engine`; the first step runs eagerly, because it creates the optimizer's state."""
        parameters = parameters_of(self.optimizer)
        if not all(p in self.optimizer.state for p in parameters if p.grad is not None):
            return self._eager_update(max_norm)
        if self._update is None and self._failed is None:
            self._update = self._record(lambda: self._eager_update(max_norm))
        if self._update is None:
            return self._eager_update(max_norm)
        graph, norm = self._update
        graph.replay()
        return norm.clone()

    def close(self) -> None:
        """See `steps.Engine`: drop the graphs, and gradients that live as long as they."""
        self._graphs.clear()
        self._update = None
        self.optimizer.zero_grad(set_to_none=True)

    def _eager(self, tensors: Tensors, count: int) -> torch.Tensor:
        loss = self.loss_of(tensors)
        (loss / count).backward()
        return loss.detach()

    def _eager_update(self, max_norm: float) -> torch.Tensor:
        norm = clip(parameters_of(self.optimizer), max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return norm

    def _record(self, work: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor] | None:
        """Capture ``work``; where it cannot be, say so once, and capture nothing more in this run."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode=THIS_THREAD
            ):
                result = work()
        except RuntimeError as error:  # what cannot be captured says so in many ways
            self._fail(one_line(str(error), 200))
            return None
        return graph, result

    def _fail(self, reason: str) -> None:
        self._failed = reason
        self.notes.append(f"Some steps run eagerly, they cannot be captured: {reason}")

    def _captured(self, tensors: Tensors, count: int) -> _Graph | None:
        """Capture one set of shapes; None where it fails or computes something else."""
        if self._failed is not None:
            return None
        parameters = parameters_of(self.optimizer)
        # Gradient buffers stay where they are: earlier graphs add to them, and they hold this step's sum.
        kept = [None if p.grad is None else p.grad.clone() for p in parameters]
        inputs = _on(self.device, tensors, copy=True)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARMUPS):
                _zero_gradients(parameters)
                self._eager(inputs, count)
            # What the loss does not reach gets no buffer, so that the optimizer leaves it alone.
            expected = [None if p.grad is None else p.grad.clone() for p in parameters]
            _zero_gradients(parameters)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        recorded = self._record(lambda: self._eager(inputs, count))
        if recorded is not None:
            recorded[0].replay()
            if (error := _distance(parameters, expected)) > TOLERANCE:
                self._fail(f"the gradients differ by {error:.1e} from eager ones")
                recorded = None
        for p, before in zip(parameters, kept, strict=True):
            if p.grad is not None:
                p.grad.zero_() if before is None else p.grad.copy_(before)
        self._update = None  # there may be new gradient buffers
        return None if recorded is None else _Graph(recorded[0], inputs, recorded[1])


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for captures, one for the process: cuBLAS keeps a workspace for each it sees."""
    return torch.cuda.Stream(device)


def _zero_gradients(parameters: list[nn.Parameter]) -> None:
    if grads := [p.grad for p in parameters if p.grad is not None]:
        torch._foreach_zero_(grads)


def _on(device: torch.device, tensors: Tensors, *, copy: bool = False) -> Tensors:
    return tuple(None if x is None else x.to(device, copy=copy) for x in tensors)


def _distance(parameters: list[nn.Parameter], expected: list[torch.Tensor | None]) -> float:
    """Return the relative L2 distance of all gradients from the expected ones; NaN counts as infinite."""
    pairs = [
        (p.grad, e) for p, e in zip(parameters, expected, strict=True) if p.grad is not None and e is not None
    ]
    apart = torch._foreach_norm(torch._foreach_sub([g for g, _ in pairs], [e for _, e in pairs]))
    whole = torch._foreach_norm([e for _, e in pairs])
    error = float(torch.stack(list(apart)).norm() / torch.stack(list(whole)).norm().clamp_min(1e-30))
    return error if error == error else float("inf")
