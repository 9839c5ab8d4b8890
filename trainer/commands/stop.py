"""Ctrl-C while a run trains: stop after the step, and save."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopFlag:
    """The first Ctrl-C asks for a stop after the running step; the second ends the process at once."""

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> StopFlag:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
