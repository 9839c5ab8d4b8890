"""The packaging script .ci/package.py as a module, so that tests use the very code that builds the zip."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def _load() -> ModuleType:
    file = Path(__file__).resolve().parent.parent / ".ci" / "package.py"
    spec = importlib.util.spec_from_file_location("loragraft_package", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loragraft_package"] = module
    spec.loader.exec_module(module)
    return module


package = _load()
