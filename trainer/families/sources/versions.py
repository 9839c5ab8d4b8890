"""Classes that only newer releases of diffusers and transformers have."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from ...errors import LoraGraftError


def newer(module: str, name: str, *, family: str, since: str) -> Any:
    """Return a class or function of ``module``; raises LG-BASE-010 where the installed release lacks it.

    ``since`` is the library's first release that has it.
    """
    library = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):  # the libraries wrap what a lazy import raises
        installed = getattr(importlib.import_module(library), "__version__", "an unknown release")
    python = ".".join(map(str, sys.version_info[:2]))
    raise LoraGraftError(
        "LG-BASE-010",
        f"{family} needs a newer {library}.",
        where=f"{library} {installed}, Python {python}",
        why=f"'{name}' of {library} {since} and later is what {family} is built of.",
        fix=f'pip install -U "{library}>={since}" (diffusers 0.36 and later need Python 3.11)',
    )
