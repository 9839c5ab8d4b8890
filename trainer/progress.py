"""Events as lines on a terminal: a progress bar with step, loss, seconds a step and the time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TextIO

from .events import (
    Cached,
    Event,
    Failed,
    Finished,
    Note,
    Planned,
    Sampled,
    Saved,
    Step,
    Validated,
    Validating,
)

BAR = 24


class ProgressLine:
    """Write events to a stream; on a terminal the current step's line is rewritten in place."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._live = stream.isatty()
        self._recent: deque[float] = deque(maxlen=20)
        self._open = False
        self._shown = 0.0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_line()

    def show(self, event: Event) -> None:
        """Write one event."""
        if isinstance(event, Planned):
            self.lines(event.lines)
        elif isinstance(event, Cached):
            self.rewrite(
                f"encoding {event.what} {event.done}/{event.total} ({event.hits} from the cache)",
                event.done == event.total,
            )
        elif isinstance(event, Validating):
            self.rewrite(f"measuring kept-out images {event.done}/{event.total}", False)
        elif isinstance(event, Step):
            self._recent.append(event.seconds)
            self.rewrite(
                step_line(event, sum(self._recent) / len(self._recent)), event.step == event.total_steps
            )
        elif text := event_line(event):
            self.lines([text])

    def rewrite(self, text: str, last: bool) -> None:
        """Write over the line before; into a log file now and then, and the ``last`` one always."""
        now = time.monotonic()
        if self._live:
            self.stream.write(f"\r{text}\x1b[K")
            self._open = True
        elif last or now - self._shown > 5:  # a log file gets a line every 5 s
            self.stream.write(f"{text}\n")
            self._shown = now
        self.stream.flush()

    def lines(self, texts: Iterable[str]) -> None:
        """Write lines that stay."""
        for text in texts:
            self._end_line()
            self.stream.write(f"{text}\n")
        self.stream.flush()

    def _end_line(self) -> None:
        if self._open:
            self.stream.write("\n")
            self._open = False


class SweepLine:
    """The events of runs side by side: one line of progress for all of them; other lines name their run."""

    def __init__(
        self, stream: TextIO, names: Sequence[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._line = ProgressLine(stream)
        self._names = names
        self._pace = Pace(clock)
        self._first: frozenset[str] = frozenset()

    def __enter__(self) -> SweepLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.__exit__(kind, error, trace)

    def show(self, number: int, event: Event) -> None:
        """Write one event of the run ``number``."""
        name = self._names[number]
        self._pace.take(number, event)
        if isinstance(event, Planned):  # of the other runs only what differs from the first
            lines = [line for line in event.lines if line not in self._first]
            self._first = self._first or frozenset(event.lines)
            self._line.lines([f"[{name}] {line}" for line in lines])
        elif isinstance(event, Cached):
            if event.hits < event.done:
                self._line.show(event)
        elif isinstance(event, Step):
            self._line.rewrite(self._pace.line(), self._pace.done == self._pace.total)
        elif isinstance(event, Failed):
            self._line.lines([f"[{name}] failed: {line}" for line in str(event.error).splitlines()])
        elif text := event_line(event):
            self._line.lines([f"[{name}] {text}"])


class Pace:
    """How far runs side by side are, all together: steps, losses, seconds a step, seconds left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: dict[int, tuple[int, int]] = {}  # of each run: steps done and steps in all
        self._losses: dict[int, float] = {}
        self._recent: deque[float] = deque(maxlen=40)

    def take(self, number: int, event: Event) -> None:
        """Count one event of the run ``number``; a failed run's missing steps are no longer waited for."""
        if isinstance(event, Planned):
            self._steps[number] = (event.first_step, event.total_steps)
        if isinstance(event, (Planned, Cached)):  # the first step begins after these
            self._recent.clear()
            self._recent.append(self._clock())
        elif isinstance(event, Step):
            self._steps[number] = (event.step, event.total_steps)
            self._losses[number] = event.loss
            self._recent.append(self._clock())
        elif isinstance(event, Failed) and number in self._steps:
            self._steps[number] = (self._steps[number][0],) * 2
            self._losses.pop(number, None)

    @property
    def done(self) -> int:
        """Steps done of all runs."""
        return sum(done for done, _ in self._steps.values())

    @property
    def total(self) -> int:
        """Steps of all runs."""
        return sum(total for _, total in self._steps.values())

    @property
    def loss(self) -> float:
        """The mean of the runs' last losses; NaN before the first."""
        return sum(self._losses.values()) / len(self._losses) if self._losses else float("nan")

    @property
    def seconds(self) -> float:
        """Seconds from one step to the next, whichever run's it is."""
        return (self._recent[-1] - self._recent[0]) / max(1, len(self._recent) - 1) if self._recent else 0.0

    def line(self) -> str:
        """Return "4 runs: 42% [###...] 84/200 loss 0.1234 0.31 s/step ETA 0:36"."""
        return (
            f"{len(self._steps)} runs: {bar(self.done, self.total)} loss {self.loss:.4f} "
            f"{self.seconds:.3g} s/step ETA {clock_time((self.total - self.done) * self.seconds)}"
        )


def event_line(event: Event) -> str:
    """Return what an event says in one line; "" for those that are shown otherwise."""
    if isinstance(event, Saved):
        return saved_line(event)
    if isinstance(event, Sampled):
        return f"sample of step {event.step}: {event.path}"
    if isinstance(event, Validated):
        return validation_line(event)
    if isinstance(event, Note):
        return event.text
    if isinstance(event, Finished) and event.reused:
        return "this run was finished before; nothing was trained again"
    return ""


def saved_line(event: Saved) -> str:
    """Return "saved step 200: 522 tensors", and how many nothing has trained yet."""
    untrained = f", {event.zero_tensors} still zero: no gradient has reached their layers"
    return f"saved step {event.step}: {event.num_tensors} tensors{untrained if event.zero_tensors else ''}"


def validation_line(event: Validated) -> str:
    """Return "step 80: validation loss 0.1234 on 5 images, the best save so far"."""
    best = ", the best save so far" if event.is_best else ""
    return f"step {event.step}: validation loss {event.loss:.4f} on {event.num_images} images{best}"


def step_line(event: Step, seconds: float) -> str:
    """Return "steps: 42% [###...] 84/200 loss 0.1234 avr_loss 0.1300 0.31 s/step ETA 0:36"."""
    return (
        f"steps: {bar(event.step, event.total_steps)} loss {event.loss:.4f} avr_loss {event.avr_loss:.4f} "
        f"{seconds:.3g} s/step ETA {clock_time((event.total_steps - event.step) * seconds)}"
    )


def bar(done: int, total: int) -> str:
    """Return " 42% [##########..............] 84/200"."""
    share = done / max(1, total)
    filled = round(share * BAR)
    return f"{share:4.0%} [{'#' * filled + '.' * (BAR - filled)}] {done}/{total}"


def clock_time(seconds: float) -> str:
    """Return "0:36", or "5:31:40" from an hour on."""
    left = round(seconds)
    if left >= 3600:
        return f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
    return f"{left // 60}:{left % 60:02d}"
