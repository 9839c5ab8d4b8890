"""The benchmark's own files, and made-up runs of it, for the tests of its logic."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    """Import a file of benchmarks/, whose folder is not on the path."""
    package = "loragraft_benchmarks"
    if package not in sys.modules:
        folder = ROOT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{name}")


def a_run(trainer: str, step: float, turn: int = 0, losses: tuple[float, ...] = (1.0, 1.1)) -> Any:
    """Return a run of three equal steps."""
    made = load("process").Run("case", trainer, "unet", turn)
    made.seconds, made.cpu_seconds, made.losses = [step] * 3, [step] * 3, list(losses)
    return made
