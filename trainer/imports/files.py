"""Open a config file of another trainer, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.images import shown
from .hcp_train import read_hcp_train
from .imported import Imported, not_readable, read_text
from .kohya import read_kohya

KOHYA = (".toml", ".txt", ".sh", ".bash", ".bat", ".cmd", ".ps1")
HCP = (".yaml", ".yml")


def read_foreign(file: Path, *, overrides: Sequence[str] = (), trusted: bool = True) -> Imported:
    """Read kohya's or lora-scripts' .toml, a command line as text, or HCP-Diffusion's .yaml.

    A name without suffix means .toml, as for kohya's trainer. ``overrides`` (key=value) and ``trusted`` are
    for the YAML. Raises LG-IMP-001 to -003, LG-CFG-001 and LG-CFG-003, and LG-DATA-084 for YAML.
    """
    suffix = file.suffix.casefold()
    if suffix in HCP:
        return read_hcp_train(file, overrides=overrides, trusted=trusted)
    if suffix not in KOHYA:
        beside = file.with_name(f"{file.name}.toml")
        if not beside.is_file():
            raise not_readable(shown(file), f"its name ends in none of {', '.join((*KOHYA, *HCP))}.")
        file = beside
    return read_kohya(read_text(file), where=shown(file.name))
