"""What a run will need of a device's memory: what it holds, and the most that comes and goes above that.

The numbers come from the meter and from the sizes of tensors; nothing is computed and nothing allocated.
The planner asks for a `Case`, which is the run as set or with something changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .checkpointing import checkpoint_blocks
from .meter import GRADIENTS, Footprint, Loss, Tensors, gradients_aside, measure, tensor_bytes
from .packed_conv import PackedConv2d
from .storage import Packed
from .swap import frozen, frozen_bytes

# cuBLAS's and cuDNN's workspaces, and kernels, which load when they are first used. The context itself is
# there before free memory is asked for.
WORKSPACE_BYTES = 256 * 2**20
SLACK = 0.05  # of what comes and goes: the allocator rounds sizes and leaves gaps
BYTES_PER_VALUE = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5625}  # of base_storage, with scales
UNPACKED_BYTES = 8  # a value of a packed weight that is being brought into the arithmetic's dtype, at most
UPDATE_BYTES = 8  # what an update over all tensors at once holds of each value, float32
SAMPLING = "sampling"  # between steps, and PREVIEW after the last one: phases that a run can do without
PREVIEW = "preview at the end"
DRAWN = (SAMPLING, PREVIEW)
ENCODING = "encoding"  # before the first step
WITHOUT_GRAPHS = (ENCODING, PREVIEW)  # phases in which no graph holds memory, yet or any more
Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class Case:
    """What memory depends on; ``size`` is the largest bucket's (height, width) in pixels.

    ``checkpointed`` and ``swapped`` count blocks; swapped ones are checkpointed too. Without ``draws`` no
    samples are drawn. ``captured`` says that steps are CUDA graphs, which with swapped blocks they are not.
    """

    batch: int
    size: Size
    rank: int
    storage: str = "as_is"
    checkpointed: int = 0
    swapped: int = 0
    draws: bool = True
    captured: bool = False


@dataclass(frozen=True)
class Prediction:
    """Bytes: what is held throughout, and of what comes and goes the most of each phase."""

    weights: int
    adapter: int  # LoRA, gradients that stay, optimizer state
    phases: Mapping[str, int]
    step: int = 0  # the most of one micro-batch alone, which is what a dry run shows

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def other(self) -> int:
        """Workspaces, and what the allocator loses."""
        return WORKSPACE_BYTES + round(SLACK * self.phases[self.phase])

    @property
    def total(self) -> int:
        """The predicted peak."""
        return self.weights + self.adapter + self.phases[self.phase] + self.other


class Footprints:
    """Footprints of micro-batches with some blocks checkpointed; each is measured once.

    ``inputs_of`` gives a micro-batch of a batch size and (height, width) in pixels; meta tensors will do.
    Blocks that are really checkpointed already stay so in every footprint.
    """

    def __init__(
        self,
        loss_of: Loss,
        inputs_of: Callable[[int, Size], Tensors],
        modules: Sequence[nn.Module],
        device: torch.device,
        blocks: Sequence[nn.Module],
    ) -> None:
        self.loss_of, self.inputs_of, self.modules = loss_of, inputs_of, modules
        self.device, self.blocks = device, blocks
        self._known: dict[tuple[int, Size, int], Footprint] = {}

    def __call__(self, batch: int, size: Size, checkpointed: int) -> Footprint:
        """Return the footprint; raises `meter.CannotMeasure`."""
        key = (batch, size, checkpointed)
        if key not in self._known:
            undo = checkpoint_blocks(self.chosen(batch, size, checkpointed))
            try:
                self._known[key] = measure(
                    self.loss_of, self.inputs_of(batch, size), self.modules, self.device, blocks=self.blocks
                )
            finally:
                undo()
        return self._known[key]

    def chosen(self, batch: int, size: Size, count: int) -> list[nn.Module]:
        """Return the ``count`` blocks to checkpoint first, those that leave most behind; in forward order."""
        if count in (0, len(self.blocks)):
            return list(self.blocks[:count])
        left = self(batch, size, 0).blocks
        most = sorted(range(len(left)), key=lambda i: -left[i])[:count]
        return [self.blocks[i] for i in sorted(most)]


@dataclass(frozen=True)
class Costs:
    """What a run holds and does, in bytes, as it is set; `predict` says it for any case.

    ``weights``: all frozen tensors on the device. ``packable``: those that base_storage can change, as
    (values, bytes) of each. ``values``: how many are trained; ``held``: the bytes that stay for each of
    them, with its gradient if that stays, and its optimizer state. ``blocks``: the frozen bytes of each
    block in forward order. ``others``: what further phases need above what is held, e.g. SAMPLING.
    ``several`` says that micro-batches come in more than one set of shapes.
    """

    weights: int
    packable: Sequence[tuple[int, int]]
    values: int
    held: int
    rank: int
    storage: str
    blocks: Sequence[int]
    footprint: Callable[[int, Size, int], Footprint]
    others: Mapping[str, int] = field(default_factory=dict)
    several: bool = False
    extra: int = 0  # what a dry run needed beyond the prediction

    def predict(self, case: Case) -> Prediction:
        """Return what ``case`` needs; raises `meter.CannotMeasure`.

        Of another rank or storage, the activations are taken to be those of the run as set.
        """
        step = self.footprint(case.batch, case.size, case.checkpointed)
        share = case.rank / self.rank
        values = round(self.values * share)
        saved_rank = round(step.at_peak.get(GRADIENTS, 0) * (1 - share))
        weights, unpacked = self.weights, 0
        if case.storage != self.storage:
            for count, size in self.packable:
                weights += round(count * BYTES_PER_VALUE[case.storage]) - size
                unpacked = max(unpacked, count * UNPACKED_BYTES)
        moved = self.blocks[len(self.blocks) - case.swapped :]
        if moved:
            packed = weights / max(1, self.weights)  # a block shrinks as all do
            weights += round(packed * (2 * max(moved) - sum(moved)))
        micro = step.peak - saved_rank + unpacked + self.extra
        # Graphs keep one full set of activations in their pool. A second set of shapes is warmed up outside.
        pool = micro if case.captured and not case.swapped else 0
        phases = {
            "activations": micro + (pool if self.several else 0),
            "update": round(step.gradients * share) + values * UPDATE_BYTES + pool,
            "saving": values * 4 + pool,
        }
        for name, size in self.others.items():
            if case.draws or name not in DRAWN:
                phases[name] = size + (pool if name not in WITHOUT_GRAPHS else 0)
        return Prediction(weights, values * self.held, phases, micro)


def costs_of(
    modules: Sequence[nn.Module],
    denoiser: nn.Module,
    blocks: Sequence[nn.Module],
    footprint: Callable[[int, Size, int], Footprint],
    *,
    values: int,
    held: int,
    rank: int,
    storage: str,
    others: Mapping[str, int],
    several: bool = False,
    more: int = 0,
) -> Costs:
    """Return a run's costs; the others as in `Costs`.

    ``modules`` are all that stay on the device, ``more`` is what they or others hold there beside their
    tensors, in bytes.
    """
    return Costs(
        weights=more + tensor_bytes(t for module in modules for t in frozen(module)),
        packable=_packable(denoiser),
        values=values,
        held=held,
        rank=rank,
        storage=storage,
        blocks=[frozen_bytes(block) for block in blocks],
        footprint=footprint,
        others=others,
        several=several,
    )


def _packable(denoiser: nn.Module) -> list[tuple[int, int]]:
    """Return (values, bytes) of each weight that base_storage can change, also of those that it has."""
    plain = [p for p in denoiser.parameters() if not p.requires_grad and p.ndim > 1 and not p.is_meta]
    found = [(p.numel(), p.nbytes) for p in plain]
    for module in denoiser.modules():
        if isinstance(module, Packed):
            found.append((module.shape.numel(), module.num_bytes))
        elif isinstance(module, PackedConv2d):
            found.append((module.weight.numel(), module.num_bytes))
    return found


def free_bytes(device: torch.device) -> int | None:
    """Return what can still be allocated: on CUDA also what the allocator keeps unused; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def room_bytes(device: torch.device, placed: int) -> int | None:
    """Return what a run may take of a device in all, with the ``placed`` bytes it has there; None if unknown.

    Weights that are mapped from a file count as free on the host already, so there the process's own memory
    is the most that can be added.
    """
    free = free_bytes(device)
    if free is None:
        return None
    return free + (placed if device.type != "cpu" else min(placed, _own_bytes()))


def _own_bytes() -> int:
    """Return the process's memory that no file is mapped to; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    for line in status.read_text("utf-8", "replace").splitlines() if status.exists() else ():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def dry_run(
    loss_of: Loss, inputs: Tensors, parameters: Iterable[nn.Parameter], device: torch.device
) -> int | None:
    """Run a micro-batch of zeros once, drop its gradients; return the bytes that it needed.

    inputs: only shapes and dtypes count, so they may be meta tensors. The bytes are the most allocated at
    once above what was allocated before. None where the device does not tell: there nothing is run.
    """
    if device.type != "cuda":
        return None
    try:
        fed = tuple(None if x is None else torch.zeros_like(x, device=device) for x in inputs)
        with gradients_aside(list(parameters)), _peak(device) as peak:
            loss_of(fed).backward()
        return peak[0]
    finally:
        torch.cuda.empty_cache()  # a graph's pool cannot take what the allocator keeps


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that holds the peak above the start once the block is left."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, found = torch.cuda.memory_allocated(device), list[int]()
    yield found
    torch.cuda.synchronize(device)
    found.append(torch.cuda.max_memory_allocated(device) - before)
