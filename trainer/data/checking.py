"""Look at many image files at once: on all cores, in bounded memory, each only when it changed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from .budget import PixelBudget
from .images import MAX_PIXELS, ImageFacts, UnreadableImageError, glance, inspect

Progress = Callable[[int, int], None]
# What tells one state of a file from another; the change time cannot be set back as the others can.
Stamp = tuple[str, int, int, int, int]
# Facts of files as they were last seen, for a process that scans the same folder again and again.
Seen = MutableMapping[Stamp, ImageFacts]

MAX_SEEN = 200_000
# How many pixels may be decoded at the same time, whatever the number of cores: 200 MB in RGB.
PIXELS_IN_FLIGHT = 64_000_000

T = TypeVar("T")
S = TypeVar("S")


def check_images(
    paths: Sequence[Path | str],
    *,
    header_only: bool = False,
    max_pixels: int = MAX_PIXELS,
    seen: Seen | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> list[ImageFacts | str]:
    """Return what is known of each file, or why it cannot be read.

    Each file is hashed and decoded (only its header read where ``header_only``), except where ``seen``
    knows the very state of it; new facts are added there.
    """

    def look(path: Path | str) -> ImageFacts | str:
        try:
            if header_only:
                return glance(path, max_pixels=max_pixels)
            stamp = stamp_of(path) if seen is not None else None
            known = seen.get(stamp) if seen is not None and stamp is not None else None
            if known is not None and known.size[0] * known.size[1] <= max_pixels:
                return known
            facts = inspect(path, max_pixels=max_pixels, budget=budget)
        except UnreadableImageError as error:
            return str(error)
        if seen is not None and stamp is not None and stamp == stamp_of(path):
            while len(seen) >= MAX_SEEN:
                del seen[next(iter(seen))]
            seen[stamp] = facts
        return facts

    budget = PixelBudget(PIXELS_IN_FLIGHT)
    found: list[ImageFacts | str] = []
    # A header is read faster than it is handed to a thread.
    with closing(in_order(look, paths, 0 if header_only else workers)) as results:
        for result in results:
            found.append(result)
            if progress is not None:
                progress(len(found), len(paths))
    return found


def stamp_of(path: Path | str) -> Stamp | None:
    """Return what tells this state of the file from another, or None where it cannot be told."""
    try:
        info = os.stat(path)  # noqa: PTH116 (a text, which a scan need not parse)
    except OSError:
        return None
    return str(path), info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino


def in_order(
    work: Callable[[S], T], items: Sequence[S], workers: int | None = None
) -> Generator[T, None, None]:
    """Yield ``work`` of each item in order, done in threads (one for each core), a few items ahead.

    0 ``workers`` do it in this thread. Closing the generator, or an error in the work, cancels what has
    not begun and waits for the rest.
    """
    if workers == 0:
        yield from map(work, items)
        return
    count = num_cores() if workers is None else workers
    pool = ThreadPoolExecutor(max_workers=count)
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 4 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1
