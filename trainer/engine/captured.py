"""Whole steps as CUDA graphs: one launch instead of thousands (CUDA C++ Programming Guide, "CUDA Graphs").

A micro-batch's forward and backward are captured once for each set of shapes, each run's update once.
Replays read fixed input buffers and add to fixed gradient buffers. Nothing random happens inside: noise,
timesteps and captions are drawn outside, so a replay computes the same function as the fused engine.
Every capture is checked against that engine's gradients of the same batch before it is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ..errors import one_line
from .steps import Fused, Key, Micro, Rows, Tensors, on_device, rows_of, together

MAX_GRAPHS = 16  # further shapes run fused: making a graph anew again and again costs more than it saves
MET_BEFORE = 1  # a graph is made for a shape that comes again: some come once in an epoch, or never again
WARMUPS = 2  # cuBLAS, cuDNN and the autograd engine set themselves up in the first runs
# Replayed against uncaptured gradients, relative L2: reductions may be ordered otherwise, nothing more.
TOLERANCE = 2e-2
THIS_THREAD = "thread_local"  # other threads of a host may use the GPU during a capture


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    losses: torch.Tensor


class Captured:
    """Replays captured steps; what cannot be captured runs fused, with a note."""

    name = "captured"

    def __init__(self, fused: Fused) -> None:
        self.fused, self.device = fused, fused.device
        self.notes: list[str] = []
        self._graphs: dict[Key, _Graph | None] = {}
        self._met: Counter[Key] = Counter()
        self._updates: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _capture_stream(self.device)
        self._failed: str | None = None
        for flat in fused.optimizers:
            for group in flat.optimizer.param_groups:  # captured code reads the rate where it lies
                group["lr"] = torch.tensor(float(group["lr"]), device=self.device)
                group["capturable"] = True

    def backward(self, micros: Sequence[Micro]) -> list[torch.Tensor]:
        """See `steps.Engine`."""
        rows, counts, tensors = rows_of(micros), tuple(m.count for m in micros), together(micros)
        key: Key = (rows, counts, micros[0].shape)
        if key not in self._graphs and self._met[key] >= MET_BEFORE and len(self._graphs) < MAX_GRAPHS:
            self._graphs[key] = self._captured(rows, counts, tensors)
        self._met[key] += 1
        found = self._graphs.get(key)
        if found is None:
            return list(self.fused.run(rows, counts, on_device(self.device, tensors)).unbind())
        for static, new in zip(found.inputs, tensors, strict=True):
            if static is not None and new is not None:
                static.copy_(new, non_blocking=True)
        found.graph.replay()
        return list(found.losses.clone().unbind())  # the next replay writes over them

    def update(self, row: int, max_norm: float) -> torch.Tensor:
        """See `steps.Engine`; the first step runs uncaptured, because it creates the optimizer's state."""
        if not self.fused.optimizers[row].is_settled(self.fused.reached(row)):
            self._updates.pop(row, None)
            return self.fused.update(row, max_norm)
        if row not in self._updates and self._failed is None:
            recorded = self._record(lambda: self.fused.update(row, max_norm))
            if recorded is not None:
                self._updates[row] = recorded
        if row not in self._updates:
            return self.fused.update(row, max_norm)
        graph, norm = self._updates[row]
        graph.replay()
        return norm.clone()

    def reload(self, row: int) -> None:
        """See `steps.Engine`."""
        self.fused.reload(row)

    def refresh(self, row: int) -> None:
        """See `steps.Engine`."""
        self.fused.refresh(row)

    def release(self) -> None:
        """See `steps.Engine`: drop the graphs; a step that comes nevertheless makes its own anew."""
        if not (self._graphs or self._updates):
            return
        self._graphs.clear()
        self._updates.clear()
        torch.cuda.empty_cache()  # what lay in their pool is for all again
        self._pool = torch.cuda.graph_pool_handle()  # the old one is gone

    def close(self) -> None:
        """See `steps.Engine`: drop the graphs."""
        self._graphs.clear()
        self._updates.clear()
        self.fused.close()

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
        self.notes.append(f"Some steps are not captured, they run one kernel after the other: {reason}")

    def _captured(self, rows: Rows, counts: Sequence[float], tensors: Tensors) -> _Graph | None:
        """Capture one set of shapes; None where it fails or computes something else."""
        if self._failed is not None:
            return None
        grads = self.fused.flat.grads
        kept = grads.clone()  # this step's sum so far
        inputs = on_device(self.device, tensors, copy=True)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARMUPS):
                grads.zero_()
                self.fused.run(rows, counts, inputs)
            expected = grads.clone()
            grads.zero_()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        recorded = self._record(lambda: self.fused.run(rows, counts, inputs))
        if recorded is not None:
            recorded[0].replay()
            if (error := _distance(grads, expected)) > TOLERANCE:
                self._fail(f"the gradients differ by {error:.1e} from uncaptured ones")
                recorded = None
        grads.copy_(kept)
        return None if recorded is None else _Graph(recorded[0], inputs, recorded[1])


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for captures, one for the process: cuBLAS keeps a workspace for each it sees."""
    return torch.cuda.Stream(device)


def _distance(grads: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative L2 distance of all gradients from the expected ones; NaN counts as infinite."""
    apart = torch.linalg.vector_norm(grads - expected)
    error = float(apart / torch.linalg.vector_norm(expected).clamp_min(1e-30))
    return error if error == error else float("inf")
