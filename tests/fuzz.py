"""How many cases the property and fuzz tests draw."""

from __future__ import annotations

import os


def cases(total: int) -> int:
    """Return ``total`` under `make test-fuzz`, a tenth of it in a quick run."""
    return total if os.environ.get("LORAGRAFT_FUZZ") else max(1, total // 10)
