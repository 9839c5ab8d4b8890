"""Open a config file of another trainer, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.images import shown
from .hcp_train import read_hcp_train
from .imported import Imported, not_readable, read_text
from .kohya import read_kohya
from .kohya_gui import pictures_in

KOHYA = (".toml", ".txt", ".sh", ".bash", ".bat", ".cmd", ".ps1")
GUI = ".json"
HCP = (".yaml", ".yml")


def read_foreign(file: Path, *, overrides: Sequence[str] = (), trusted: bool = True) -> Imported:
    """Read kohya's or lora-scripts' .toml, kohya_ss' .json, a command line as text, or HCP-Diffusion's .yaml.

    A name without suffix means .toml, as for kohya's trainer. ``overrides`` (key=value) are for the YAML.
    Unless ``trusted``, its base files are read only below its folder, and no folder that a .json names is
    looked into. Raises LG-IMP-001 to -003, LG-CFG-001 and LG-CFG-003, and LG-DATA-084 for YAML.
    """
    suffix = file.suffix.casefold()
    if suffix in HCP:
        return read_hcp_train(file, overrides=overrides, trusted=trusted)
    if suffix not in (*KOHYA, GUI):
        beside = file.with_name(f"{file.name}.toml")
        if not beside.is_file():
            raise not_readable(shown(file), f"its name ends in none of {', '.join((*KOHYA, GUI, *HCP))}.")
        file = beside
    where = shown(file.name)
    return read_kohya(
        read_text(file), where=where, is_json=suffix == GUI, count=pictures_in if trusted else None
    )
