"""Notice when a driver pages a GPU's memory to the system's: steps become several times slower, silently.

NVIDIA's driver for Windows does so instead of refusing memory. Pure logic, fed by the loop with steps
that did nothing but train.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median_low

FIRST = 4  # of these steps nothing is kept: kernels load, captures are made
WINDOW = 8
SLOWER = 1.6  # times the best median: a longer caption or another app's burst is less
STEADY = 1.25  # the slower half of a window that counts as best is within this of its median
FULL = 0.95
NOTE = (
    "Steps take {now:.2f} s, {ratio:.1f} times what they took before ({best:.2f} s), and the GPU's memory "
    "is full ({used:.1f} of {total:.1f} GiB): its driver seems to page to system memory. Use a smaller "
    "train_batch_size or gradient_checkpointing, or close other programs. On Windows, 'CUDA - Sysmem "
    "Fallback Policy' in the NVIDIA Control Panel, set to 'Prefer No Sysmem Fallback', makes a run stop "
    "with an error instead."
)


@dataclass
class _Times:
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    best: float | None = None


class SpillGuard:
    """Watches a run's steps and speaks at most once; ``kind`` separates steps of unequal work (buckets)."""

    def __init__(self) -> None:
        self._steps = 0
        self._spoken = False
        self._full: deque[bool] = deque(maxlen=WINDOW)
        self._times: dict[Hashable, _Times] = {}

    def feed(self, seconds: float, used_bytes: int, total_bytes: int, kind: Hashable = None) -> str | None:
        """Take one step; return the note when it is due.

        ``used_bytes`` is the larger of what the driver says is taken and what the allocator reserved.
        """
        self._steps += 1
        if self._spoken or self._steps <= FIRST:
            return None
        self._full.append(used_bytes >= FULL * total_bytes)
        times = self._times.setdefault(kind, _Times())
        times.recent.append(seconds)
        if len(times.recent) < WINDOW:
            return None
        now = median_low(times.recent)
        if times.best is not None and now > SLOWER * times.best:
            if len(self._full) < WINDOW or not all(self._full):
                return None
            self._spoken = True
            used, total = (n / 2**30 for n in (used_bytes, total_bytes))
            return NOTE.format(now=now, ratio=now / times.best, best=times.best, used=used, total=total)
        if sorted(times.recent)[WINDOW * 3 // 4] <= STEADY * now:
            times.best = now if times.best is None else min(times.best, now)
        return None
