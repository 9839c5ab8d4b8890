"""Events as lines on a terminal: a progress bar with step, loss, seconds a step and the time left."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import TextIO

from .events import Cached, Event, Finished, Note, Planned, Sampled, Saved, Step, Validated

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
            for line in event.lines:
                self._line(line)
        elif isinstance(event, Cached):
            self._rewrite(
                f"encoding {event.what} {event.done}/{event.total} ({event.hits} from the cache)",
                event.done == event.total,
            )
        elif isinstance(event, Step):
            self._recent.append(event.seconds)
            self._rewrite(
                step_line(event, sum(self._recent) / len(self._recent)), event.step == event.total_steps
            )
        elif isinstance(event, Saved):
            self._line(
                f"saved step {event.step}: {event.zero_tensors} of {event.num_tensors} tensors are zero"
            )
        elif isinstance(event, Sampled):
            self._line(f"sample of step {event.step}: {event.path}")
        elif isinstance(event, Validated):
            self._line(validation_line(event))
        elif isinstance(event, Note):
            self._line(event.text)
        elif isinstance(event, Finished) and event.reused:
            self._line("this run was finished before; nothing was trained again")

    def _rewrite(self, text: str, last: bool) -> None:
        now = time.monotonic()
        if self._live:
            self.stream.write(f"\r{text}\x1b[K")
            self._open = True
        elif last or now - self._shown > 5:  # a log file gets a line every 5 s
            self.stream.write(f"{text}\n")
            self._shown = now
        self.stream.flush()

    def _line(self, text: str) -> None:
        self._end_line()
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def _end_line(self) -> None:
        if self._open:
            self.stream.write("\n")
            self._open = False


def validation_line(event: Validated) -> str:
    """Return "step 80: validation loss 0.1234 on 5 images"."""
    return f"step {event.step}: validation loss {event.loss:.4f} on {event.num_images} images"


def step_line(event: Step, seconds: float) -> str:
    """Return "steps: 42% [###...] 84/200 loss 0.1234 avr_loss 0.1300 0.31 s/step ETA 0:36"."""
    share = event.step / event.total_steps
    filled = round(share * BAR)
    left = round((event.total_steps - event.step) * seconds)
    eta = (
        f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
        if left >= 3600
        else f"{left // 60}:{left % 60:02d}"
    )
    bar = "#" * filled + "." * (BAR - filled)
    return (
        f"steps: {share:4.0%} [{bar}] {event.step}/{event.total_steps} loss {event.loss:.4f} "
        f"avr_loss {event.avr_loss:.4f} {seconds:.3g} s/step ETA {eta}"
    )
