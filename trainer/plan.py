"""A run's arithmetic: images, batches, steps, epochs, and the losses that are counted over them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import TrainConfig
from .data.train_set import TrainSet, batches_per_epoch


@dataclass(frozen=True)
class Plan:
    """A run's arithmetic; a step is one optimizer step, ``accumulation`` micro-batches of one epoch."""

    batches_per_epoch: int
    accumulation: int
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last may have fewer micro-batches."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def num_epochs(self) -> int:
        """Epochs begun by the end of the run."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def micro_batches(self, steps: int) -> int:
        """Return how many micro-batches the first ``steps`` steps take."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.batches_per_epoch + rest * self.accumulation


def plan_run(train_set: TrainSet, config: TrainConfig) -> Plan:
    """Return the run's arithmetic; epochs, if given, decide the number of steps."""
    plan = Plan(
        batches_per_epoch(train_set, config.train_batch_size),
        config.gradient_accumulation_steps,
        config.max_train_steps,
    )
    if config.max_train_epochs is None:
        return plan
    return Plan(plan.batches_per_epoch, plan.accumulation, config.max_train_epochs * plan.steps_per_epoch)


def step_losses(micro_losses: list[float], plan: Plan) -> list[float]:
    """Return one mean loss per optimizer step."""
    means, start = [], 0
    while start < len(micro_losses):
        left_in_epoch = plan.batches_per_epoch - start % plan.batches_per_epoch
        size = min(plan.accumulation, left_in_epoch)
        part = micro_losses[start : start + size]
        means.append(math.fsum(part) / len(part))
        start += size
    return means


def average_loss(micro_losses: list[float], plan: Plan) -> float:
    """Return kohya's avr_loss: the mean over the latest loss at each place of the epoch."""
    latest = micro_losses[-plan.batches_per_epoch :]
    return math.fsum(latest) / len(latest)


def save_every_epochs(config: TrainConfig, plan: Plan) -> int | None:
    """Return after how many epochs the run saves; a ratio of n makes n saves, or more."""
    if config.save_n_epoch_ratio is None:
        return config.save_every_n_epochs
    return max(1, plan.num_epochs // config.save_n_epoch_ratio)


def is_due(step: int, every_steps: int | None, every_epochs: int | None, plan: Plan) -> bool:
    """Say whether what is done every so many steps or epochs is done after ``step``."""
    by_step = every_steps is not None and step % every_steps == 0
    return by_step or (every_epochs is not None and step % (every_epochs * plan.steps_per_epoch) == 0)
