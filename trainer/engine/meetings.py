"""How the processes of a run keep together: they meet before whatever they do in common, and end together.

A meeting is one exchange of a status, and everybody learns the highest. A process that ends early, stopped or
with an error, comes to one more meeting with that status; the others learn it there and end too, so nobody
waits for one that is gone. What is exchanged besides follows a meeting at which all were ready.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import LoraGraftError, one_line

# The longest time between two meetings: one checkpoint, sample or validation of the process that writes. One
# that dies is noticed at once, by its closed connection; this is for a machine that vanishes.
PATIENCE = timedelta(hours=2)
READY, BUSY, STOP, ERROR = range(4)
MESSAGE_BYTES, LINE = 16384, 900  # characters take up to four bytes, and each of four lines is cut
PARTS = ("code", "what", "where", "why", "fix")


class Stopped(Exception):
    """Another process was asked to stop; this one ends with it."""


class Meetings:
    """Exchanges between all processes of torch's process group, on the host whatever the device."""

    def __init__(self) -> None:
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.is_told = False  # whether the others know how this process ended
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._is_over = False

    def ready(self) -> None:
        """Wait until all are ready; raises `Stopped`, the error that another ended with, or LG-DIST-003."""
        while self._call(READY) == BUSY:
            pass

    def busy(self) -> None:
        """Come to one meeting, and let the others wait for the next one; raises as `ready` does."""
        self._call(BUSY)

    def stop(self) -> None:
        """Tell the others that this process was asked to stop."""
        self._leave(STOP, {})

    def fail(self, error: LoraGraftError) -> None:
        """Tell the others which error this process ends with."""
        self._leave(ERROR, {name: one_line(getattr(error, name), LINE) for name in PARTS})

    def finish(self) -> None:
        """Meet for the last time."""
        self.ready()
        self._is_over = True

    def linger(self) -> None:
        """Wait until process 0 has ended: a launcher that sees one end early terminates the others."""
        if self.is_told:
            with suppress(RuntimeError):  # its closed connection
                dist.barrier(group=self._group)

    def _call(self, status: int) -> int:
        found = self._highest(status)
        if found < STOP:
            return found
        self._is_over = self.is_told = True
        if found == STOP:
            raise Stopped
        raise self._told_error(self._messages({}))

    def _leave(self, status: int, message: Mapping[str, str]) -> None:
        """Come to a last meeting, unless the others know already or are gone."""
        if self._is_over:
            return
        try:
            if self._highest(status) == ERROR:
                self._messages(message)
            self.is_told = True
        except LoraGraftError:
            pass  # nobody is there: this process ends with its own reason
        self._is_over = True

    def _highest(self, status: int) -> int:
        found = torch.tensor([status])
        try:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:
            self._is_over = True
            raise LoraGraftError(
                "LG-DIST-003",
                "Another process of this run has ended, or its machine cannot be reached.",
                where=f"noticed by process {self.rank} of {self.size}, counted from 0",
                why=one_line(str(error), 300),
                fix="look for its own message, above or on its machine; the same command continues",
            ) from error
        return int(found)

    def _messages(self, mine: Mapping[str, str]) -> list[dict[str, str]]:
        """Return what every process says, {} from those that have nothing to say."""
        text = json.dumps(mine, ensure_ascii=False).encode("utf-8", "replace")
        sent = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        sent[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        return [json.loads(bytes(m.tolist()).rstrip(b"\0")) for m in self._gather(sent)]

    def _told_error(self, messages: Sequence[Mapping[str, str]]) -> LoraGraftError:
        rank, told = next((n, m) for n, m in enumerate(messages) if m)
        code, where = told["code"], f"{told['where']} (process {rank} of {self.size}, counted from 0)"
        return LoraGraftError(code, told["what"], where=where, why=told["why"], fix=told["fix"])

    # ---- what follows a meeting at which all were ready ----

    def broadcast(self, data: bytes) -> bytes:
        """Return what process 0 gives; the others' ``data`` is not looked at."""
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0, group=self._group)
        content = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == 0 and data:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if len(content):
            dist.broadcast(content, 0, group=self._group)
        return content.numpy().tobytes()

    def union(self, found: Iterable[int], count: int) -> set[int]:
        """Return all numbers below ``count`` that any process has found."""
        marks = torch.zeros(count, dtype=torch.uint8)
        marks[sorted(found)] = 1
        dist.all_reduce(marks, dist.ReduceOp.MAX, group=self._group)
        return set(marks.nonzero().flatten().tolist())

    def different(self, content: bytes) -> list[int]:
        """Return the processes whose content is not that of process 0."""
        digest = torch.tensor(list(hashlib.sha256(content).digest()), dtype=torch.uint8)
        found = self._gather(digest)
        return [number for number, other in enumerate(found) if not torch.equal(other, found[0])]

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor, group=self._group)
        return found
