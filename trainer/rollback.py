"""Going back once: from a loss that is no number or explodes, to the last good state, on at half the rate.

The same numbers would diverge again, so all learning rates are halved from there. That the run went back is
part of its training state: a continued run does the same. The second time it stops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from .data.batches import Batch
from .errors import LoraGraftError, listed
from .plan import step_losses
from .resuming import put_back, restore, training_facts, training_state
from .run import Run
from .trends import EXPLODES, NOW, USUAL, explodes


class Diverged(LoraGraftError):
    """A run that cannot go on as it is."""


class Safety:
    """Watches a run's losses and holds what it can go back to."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._start: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None
        if run.step == 0 and run.config.on_divergence == "rollback":
            tensors = {key: value.clone() for key, value in training_state(run).items()}
            self._start = tensors, training_facts(run)
        self._recent = self._last_losses()

    def saved(self) -> None:
        """Let go of the start: there is a checkpoint now."""
        self._start = None

    def explodes(self, loss: float) -> bool:
        """Take a step's loss and say whether the newest ones lie far beyond those before."""
        self._recent.append(loss)
        return explodes(list(self._recent))

    def go_back(self, error: Diverged) -> str:
        """Put the run back to its last good state, return what to say; raises where it must end."""
        run = self.run
        if run.config.on_divergence == "stop":
            raise error
        if run.rolled_back is not None:
            at, to = run.rolled_back
            raise LoraGraftError(
                "LG-RUN-004",
                error.what,
                where=error.where,
                why=f"{error.why} At step {at} it had gone back to step {to} and to half the learning rate.",
                fix=error.fix,
            )
        at = run.step
        last = next(
            (c for c in reversed(run.folder.checkpoints()) if c.resumable and c.step <= at), run.origin
        )
        if last is not None:
            restore(run, last)
        elif self._start is not None:
            put_back(run, 0, *self._start)
        else:
            raise error
        run.rolled_back, run.is_settled = (at, run.step), True
        self._recent = self._last_losses()
        return (
            f"{error.what} Rolled back to step {run.step}; from there on half the learning rate. "
            "The second time the run stops."
        )

    def _last_losses(self) -> deque[float]:
        run = self.run
        return deque(step_losses(run.micro_losses, run.plan)[-NOW - USUAL :], maxlen=NOW + USUAL)


def not_finite(run: Run, what: str, batches: Sequence[Batch]) -> Diverged:
    """Return the error of a loss or gradient that is no number, with the images of its batches."""
    indices = sorted({i for batch in batches for i in batch.indices})
    return Diverged(
        "LG-RUN-004",
        f"The {what} became NaN or infinite at step {run.step + 1}.",
        where="images: " + listed(run.train_set.records[i].name for i in indices),
        why=f"the learning rate {run.config.learning_rate:g} is too high, {run.precision.name} too coarse, "
        f"or an image broken; {_kept(run)}.",
        fix="lower the learning rate, or set mixed_precision to bf16 or fp32, or remove the named images",
    )


def exploded(run: Run) -> Diverged:
    """Return the error of losses far beyond those before."""
    return Diverged(
        "LG-RUN-004",
        f"The loss exploded at step {run.step}.",
        where=f"steps {run.step - NOW + 1} to {run.step}",
        why=f"its median is more than {EXPLODES:g} times that of the steps before: the learning rate "
        f"{run.config.learning_rate:g} is too high; {_kept(run)}.",
        fix="lower the learning rate, or give the run a warm-up (lr_warmup_steps)",
    )


def _kept(run: Run) -> str:
    good = run.folder.checkpoints()
    if good:
        return f"the checkpoint of step {good[-1].step} is intact ({good[-1].folder})"
    return "no checkpoint was written yet"
