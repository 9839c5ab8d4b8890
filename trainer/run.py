"""A run: what it is before anything is loaded, and everything that a step needs and changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import nn

from .adapters import network
from .checkpoint import Checkpoint, RunFolder
from .config import TrainConfig
from .data.batches import Batch, plan_epoch
from .data.train_set import TrainSet
from .engine.distributed import ALONE, Alone
from .engine.precision import Precision
from .engine.steps import Engine, Key, parameters_of
from .errors import LoraGraftError
from .families.opening import Base
from .inputs import Fed, Inputs
from .inputs.words import Words
from .optim.average import Average
from .optim.modes import averaged
from .origin import Origin
from .parts import Parts
from .plan import Plan
from .trends import Measure


@dataclass(frozen=True)
class Job:
    """A run before anything is loaded: what it trains, where it writes, and who it is."""

    base: Base
    train_set: TrainSet
    config: TrainConfig
    plan: Plan
    precision: Precision
    run_id: str
    words: str
    folder: RunFolder
    kin: str = ""  # equal for runs that differ in the number of steps alone
    origin: Origin | None = None  # the run that this one continues
    hint: str = ""  # what the user should hear of earlier runs
    world: Alone = ALONE  # the processes that train it together
    usual: Sequence[str] = ()  # lines on settings that were left to the base model


@dataclass
class Run:
    """Everything that a step needs, and what it changes; runs side by side share base, parts and engine.

    ``is_settled`` is False while an update is under way: then the tensors are no finished step's.
    """

    base: Base
    parts: Parts
    train_set: TrainSet
    config: TrainConfig
    plan: Plan
    precision: Precision
    inputs: Inputs
    validation: Inputs | None
    words: Words
    adapter: network.Adapter
    optimizer: torch.optim.Optimizer
    group_labels: list[str]  # which part, and of it what, each of the optimizer's groups is
    scaler: torch.amp.GradScaler
    engine: Engine
    attention: str
    how: list[str]
    folder: RunFolder
    run_id: str
    step: int = 0
    micro_losses: list[float] = field(default_factory=list)
    is_settled: bool = True
    micro: int = 0  # the micro-batch of the step that is under way
    measures: list[Measure] = field(default_factory=list)
    origin: Checkpoint | None = None  # of the run that this one continues
    rolled_back: tuple[int, int] | None = None  # the step at which it diverged, and the one it went back to
    world: Alone = ALONE  # the processes that take its steps together
    average: Average | None = None  # of the trained tensors, where that is what is used
    _epoch: tuple[int, list[Batch]] = (-1, [])
    _ahead: tuple[int, list[Fed | None]] = (-1, [])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained tensors."""
        return parameters_of(self.optimizer)

    @property
    def rate_scale(self) -> float:
        """A factor on all learning rates: half after the run went back to an earlier state."""
        return 1.0 if self.rolled_back is None else 0.5

    @property
    def setting(self) -> Key:
        """What runs must have in common to go through the base together, beside the tensors' shapes."""
        return (self.inputs.texts.reading, self.inputs.keeps_text, self.config.guidance_scale)

    def batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of ``step`` (from 0)."""
        epoch, k = divmod(step, self.plan.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (
                epoch,
                plan_epoch(self.train_set, self.config.train_batch_size, self.config.seed, epoch),
            )
        return self._epoch[1][k * self.plan.accumulation : (k + 1) * self.plan.accumulation]

    def feed(self, step: int) -> list[Fed | None]:
        """Draw what ``step`` is fed, one entry a micro-batch: this process's share, None if it is empty."""
        if self._ahead[0] == step:
            return self._ahead[1]
        fed: list[Fed | None] = []
        sample = 0
        for batch in self.batches(step):
            first, last = self.world.share(len(batch.indices))
            part = batch.part(first, last)
            fed.append(self.inputs.draw(step, sample + first, part) if part.indices else None)
            sample += len(batch.indices)
        return fed

    def part(self) -> tuple[int, int, int] | None:
        """Return (first, behind the last, number) of this micro-batch's samples; None if all are here."""
        if self.world.size == 1:
            return None
        number = len(self.batches(self.step)[self.micro].indices)
        return (*self.world.share(number), number)

    def draw_ahead(self, step: int) -> None:
        """Draw ``step`` now, while the device is still at work on the one before.

        A picture that cannot be read is no fault of the step that is being taken: `feed` will say so.
        """
        if step >= self.plan.total_steps:
            return
        with suppress(LoraGraftError, OSError):
            fed = self.feed(step)
            if self.precision.device.type == "cuda":  # from pinned memory, copies do not wait
                fed = [None if one is None else _pinned(one) for one in fed]
            self._ahead = (step, fed)


def _pinned(fed: Fed) -> Fed:
    return Fed.of(tuple(None if x is None else x.pin_memory() for x in fed.tensors))


@contextmanager
def as_used(run: Run) -> Iterator[None]:
    """Have the adapter as it will be used while the block runs: its own run's alone, nothing of it varied."""
    run.adapter.select()
    if run.average is None:
        with averaged(run.optimizer):
            yield
        return
    try:
        with run.average.in_place():
            run.engine.refresh(run.adapter.row)  # its copy in the dtype of the arithmetic
            yield
    finally:
        run.engine.refresh(run.adapter.row)
