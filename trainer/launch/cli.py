"""The command line as a script: ``accelerate launch .../trainer/launch/cli.py train ...``, likewise torchrun.

The pack needs no installation for it, whatever its folder is called. The script has a folder of its own,
because Python looks beside a script first for whatever any library imports.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

NAME = "loragraft"


def load_pack() -> None:
    """Import the folder that this file lies in as the package ``loragraft``."""
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location(
        NAME, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{root} is no package")
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])


if __name__ == "__main__":
    if NAME not in sys.modules:
        load_pack()
    sys.exit(importlib.import_module(f"{NAME}.trainer.__main__").main())
