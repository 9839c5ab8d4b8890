"""Progress of a dataset step on its node, and Cancel between its items."""

from __future__ import annotations

from collections.abc import Callable


def teller() -> Callable[[int, int], None]:
    """Return a progress function: it moves the node's bar, and raises where Cancel was pressed."""
    from . import host

    bar = host.Progress(1)
    last = (-1, -1)

    def tell(done: int, total: int) -> None:
        nonlocal last
        host.check_interrupt()
        if (done, total) != last:  # of many calls within one step, only the check is needed
            last = (done, total)
            bar.show(done, total)

    return tell
