"""Ctrl-C while a run trains: stop after the step, and save."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

PASSED_ON_S = 5.0  # the time within which a launcher passes a Ctrl-C on, beside the terminal


class StopFlag:
    """The first Ctrl-C asks for a stop after the running step; the second ends the process at once.

    Under a launcher the signal to terminate asks too, and the same Ctrl-C may come twice.
    """

    def __init__(self, *, launched: bool = False) -> None:
        self.wanted = False
        self._launched, self._since = launched, 0.0

    def __enter__(self) -> StopFlag:
        self._before = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, *((signal.SIGTERM,) if self._launched else ()))
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.wanted and not (self._launched and time.monotonic() - self._since < PASSED_ON_S):
            raise KeyboardInterrupt
        if not self.wanted:
            self.wanted, self._since = True, time.monotonic()
