"""Several processes that take every step together: which samples are whose, and how the shares become one.

A run in N processes is the run of one process with the whole batch: each computes its share of the samples,
and the sum of the shares' gradients is the gradient of the whole batch's mean loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from ..errors import LoraGraftError, listed, one_line
from ..safefile import tensor_bytes
from .meetings import Meetings, Stopped
from .steps import Eager, Engine, Fused, parameters_of

CHECK_EVERY = 100  # updates between two comparisons of all trained tensors
TURNS = 3  # in which data is prepared: the writer, one process of every other machine, the rest
State = tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]


class Alone:
    """One process, as usual: every batch is its own, it writes, and it meets nobody."""

    size, rank, turn = 1, 0, 0
    device: torch.device | None = None  # None: whatever is asked for

    @property
    def writes(self) -> bool:
        """Whether this process writes files, publishes, draws samples, validates and prints."""
        return self.rank == 0

    @property
    def is_told(self) -> bool:
        """Whether the other processes know how this one ended."""
        return False

    def share(self, count: int) -> tuple[int, int]:
        """Return which of ``count`` samples are this process's: (first, behind the last)."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def largest(self, count: int) -> int:
        """Return the most that any process takes of ``count`` samples."""
        return -(-count // self.size)

    def divisor(self, count: int) -> float:
        """Return what the mean over this process's share of ``count`` samples is divided by."""
        return 1

    def meet(self) -> None:
        """Wait until all are ready; raises `Stopped`, the error that another ended with, or LG-DIST-003."""

    def beat(self) -> None:
        """Let the others wait on, between two things that only this process does; raises as `meet` does."""

    def wait_turns(self, first: int, last: int = TURNS) -> None:
        """Wait while the processes of the turns ``first`` to ``last`` - 1 prepare their data."""

    def agree(self, what: str) -> None:
        """Raise LG-DIST-002 unless all processes come with the same text."""

    def tell(self, value: Any) -> Any:
        """Return the writer's value in every process; it is made of what JSON has."""
        return value

    def spread(self, state: Callable[[], State]) -> State | None:
        """Return the writer's tensors and values in every other process, None in the writer."""
        return None

    def sum_gradients(self, engine: Engine, row: int) -> None:
        """Add up the gradients of all processes, before a run's update."""

    def mean_losses(self, losses: Sequence[torch.Tensor | None], counts: Sequence[int]) -> list[torch.Tensor]:
        """Return the mean losses of whole batches of ``counts`` samples from those of the shares."""
        return [loss for loss in losses if loss is not None]

    def stop(self) -> None:
        """Tell the others that this process was asked to stop, and has saved."""

    def finish(self) -> None:
        """Meet for the last time."""

    def lines(self, batch_size: int) -> list[str]:
        """Say how many processes share batches of ``batch_size``; nothing where there is one."""
        return []

    def __enter__(self) -> Alone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others of an error that ends this process."""


ALONE = Alone()


class World(Alone):
    """The processes of torch's process group, this one among them.

    ``device`` is where the group exchanges tensors. ``turn`` says when this process prepares its data, see
    TURNS.
    """

    def __init__(self, device: torch.device, turn: int) -> None:
        self._meetings = Meetings()
        self.size, self.rank = self._meetings.size, self._meetings.rank
        self.device, self.turn = device, turn
        self._updates = 0

    # ---- the arithmetic ----

    def divisor(self, count: int) -> float:
        """See `Alone`: a share of n of N samples counts n/N in the mean over the batch."""
        first, last = self.share(count)
        return count / (last - first)

    def sum_gradients(self, engine: Engine, row: int) -> None:
        """See `Alone`; a tensor that a gradient reached in one process counts as reached in all.

        Raises LG-DIST-005 where the processes' tensors have come apart.
        """
        if isinstance(engine, Fused):
            flat = engine.flat
            reached = self._meetings.union(engine.reached(row), len(flat.slots))
            flat.reached |= {(row, slot) for slot in reached}
            trained, grads = [flat.values[row]], [flat.grads[row]]
        else:
            assert isinstance(engine, Eager)
            params = parameters_of(engine.optimizers[row])
            trained = [p.data for p in params]
            mine = [number for number, p in enumerate(params) if p.grad is not None]
            chosen = [params[n] for n in sorted(self._meetings.union(mine, len(params)))]
            for param in chosen:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
            grads = [p.grad for p in chosen if p.grad is not None]
        if self._updates % CHECK_EVERY == 0:
            self._check(trained)
        self._updates += 1
        for dtype in dict.fromkeys(g.dtype for g in grads):
            _sum_together([g for g in grads if g.dtype == dtype])

    def mean_losses(self, losses: Sequence[torch.Tensor | None], counts: Sequence[int]) -> list[torch.Tensor]:
        """See `Alone`."""
        nothing = torch.zeros((), device=self.device)
        shares = [
            nothing if loss is None else loss.float() / self.divisor(count)
            for loss, count in zip(losses, counts, strict=True)
        ]
        total = torch.stack(shares)
        dist.all_reduce(total)
        return list(total.unbind())

    def _check(self, trained: Sequence[torch.Tensor]) -> None:
        digest = hashlib.sha256()
        for tensor in trained:
            digest.update(tensor_bytes(tensor.cpu().contiguous()))
        if different := self._meetings.different(digest.digest()):
            raise LoraGraftError(
                "LG-DIST-005",
                "The processes' LoRAs are no longer equal.",
                where=f"process {different[0]} of {self.size}, counted from 0",
                why="an optimizer or a network draws random numbers of its own, or a machine is faulty.",
                fix="use another optimizer or network, or one process; the same command continues",
            )

    # ---- what is said ----

    @property
    def is_told(self) -> bool:
        """See `Alone`."""
        return self._meetings.is_told

    def meet(self) -> None:
        """See `Alone`."""
        self._meetings.ready()

    def beat(self) -> None:
        """See `Alone`."""
        self._meetings.busy()

    def wait_turns(self, first: int, last: int = TURNS) -> None:
        """See `Alone`."""
        for _ in range(first, last):
            self.meet()

    def agree(self, what: str) -> None:
        """See `Alone`."""
        self.meet()
        if different := self._meetings.different(what.encode()):
            raise LoraGraftError(
                "LG-DIST-002",
                "The processes do not train the same run.",
                where="processes that differ from process 0: " + listed(map(str, different)),
                why="their settings, images, base model, precision or versions differ.",
                fix="start all with the same command, on machines with the same files and versions",
            )

    def tell(self, value: Any) -> Any:
        """See `Alone`."""
        self.meet()
        return json.loads(self._meetings.broadcast(json.dumps(value).encode() if self.writes else b""))

    def spread(self, state: Callable[[], State]) -> State | None:
        """See `Alone`."""
        if not self.writes:
            values = self.tell(None)
            return load(self._meetings.broadcast(b"")), values
        tensors, values = state()
        self.tell(dict(values))
        self._meetings.broadcast(save({k: v.detach().cpu().clone() for k, v in tensors.items()}))
        return None

    def stop(self) -> None:
        """See `Alone`."""
        self._meetings.stop()

    def finish(self) -> None:
        """See `Alone`."""
        self._meetings.finish()

    def lines(self, batch_size: int) -> list[str]:
        """See `Alone`."""
        return [
            f"{self.size} processes take each step together, up to {self.largest(batch_size)} images of a "
            f"batch in each; on N processes this run continues with train_batch_size {batch_size} / N, or "
            f"with train_batch_size {batch_size} and --split_batches"
        ]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `Alone`."""
        if error is not None and not isinstance(error, Stopped):
            self._meetings.fail(error if isinstance(error, LoraGraftError) else _unexpected(error))
        if error is None and not self.is_told:
            dist.destroy_process_group()
        elif not self.writes:
            self._meetings.linger()


def _sum_together(grads: Sequence[torch.Tensor]) -> None:
    """Add up tensors of one dtype over all processes, in one exchange."""
    if len(grads) == 1:
        dist.all_reduce(grads[0])
        return
    joined = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(joined)
    for grad, total in zip(grads, joined.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))


def _unexpected(error: BaseException) -> LoraGraftError:
    return LoraGraftError(
        "LG-DIST-004",
        "Another process of this run has failed.",
        where="its own messages say more",
        why=one_line(f"{type(error).__name__}: {error}", 500),
        fix="the same command continues from the newest checkpoint",
    )
