"""What an import hands over, and how it refuses: all faults of one kind at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoraGraftError, listed, nearest, one_line
from ..paths import of_other_system

# A text file of this size holds more settings than anybody writes.
MAX_BYTES = 2**20


@dataclass(frozen=True)
class Imported:
    """A foreign config in this project's words.

    ``settings`` go to ``make_both``; ``places`` are paths as they were written (PLACES of kohya_table);
    ``reading`` are options of a folder scan; ``notes`` say what was filled in or means nothing here;
    ``filled`` are the settings that have the other trainer's defaults.
    """

    settings: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    filled: frozenset[str] = frozenset()


@dataclass
class Findings:
    """Faults and notes collected while a config is read; ``raise_any`` raises the first kind with entries."""

    where: str
    unknown: list[tuple[str, str]] = field(default_factory=list)  # (name, the nearest known one or "")
    wrong: list[str] = field(default_factory=list)
    nearest: list[str] = field(default_factory=list)  # what to write instead of what is wrong
    refused: list[str] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def not_known(self, name: str, known: Sequence[str] | Mapping[str, Any]) -> None:
        """Record a name that does not exist, with the nearest that does."""
        self.unknown.append((name, next(iter(nearest(name, known)), "")))

    def expect(self, name: str, value: Any, expected: str, instead: str) -> None:
        """Record a value of the wrong kind, and what to write instead."""
        self.wrong.append(f"{name} is {one_line(repr(value), 60)}, expected {expected}")
        self.nearest.append(f"write {instead}")

    def refuse(self, name: str, why: str, fix: str) -> None:
        """Record something that cannot be honoured."""
        self.refused.append(f"{name} ({why})")
        self.remedies.append(fix)

    def raise_any(self) -> None:
        """Raise LG-CFG-001 (unknown), LG-CFG-003 (wrong value) or LG-IMP-002 (cannot be honoured)."""
        if self.unknown:
            guesses = [guess for _, guess in self.unknown if guess]
            raise LoraGraftError(
                "LG-CFG-001",
                f"Unknown setting {listed(repr(name) for name, _ in self.unknown)}.",
                where=f"{self.where}: {listed(name for name, _ in self.unknown)}",
                why="a misspelt setting would be trained without, and nobody would notice.",
                fix=f"did you mean {listed(f'{g!r}' for g in dict.fromkeys(guesses))}?"
                if guesses
                else "remove it",
            )
        if self.wrong:
            raise LoraGraftError(
                "LG-CFG-003",
                f"{len(self.wrong)} value{'s' if len(self.wrong) > 1 else ''} cannot be taken.",
                where=f"{self.where}: {listed(self.wrong)}",
                why="guessing what was meant could train something else.",
                fix=listed(dict.fromkeys(self.nearest)),
            )
        if self.refused:
            raise LoraGraftError(
                "LG-IMP-002",
                f"{len(self.refused)} setting{'s' if len(self.refused) > 1 else ''} cannot be honoured.",
                where=f"{self.where}: {listed(self.refused)}",
                why="leaving a setting out silently would train something other than the config says.",
                fix=listed(dict.fromkeys(self.remedies)),
            )


def not_readable(where: str, why: str) -> LoraGraftError:
    """Return the refusal of a text that is no config."""
    return LoraGraftError(
        "LG-IMP-001",
        "The config of another trainer cannot be read.",
        where=where,
        why=why,
        fix="give kohya's TOML, its command line as text (.txt, .sh, .bat, .ps1) with each value written "
        "out, the .json of kohya_ss' GUI, or HCP-Diffusion's .yaml",
    )


def foreign(what: str, where: str, *, why: str, fix: str) -> LoraGraftError:
    """Return the refusal of a config that is for another kind of training."""
    return LoraGraftError("LG-IMP-003", what, where=where, why=why, fix=fix)


def read_text(file: Path) -> str:
    """Return a config file's text; raises LG-IMP-001."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not UTF-8 text"
        theirs = of_other_system(str(file)) if isinstance(error, FileNotFoundError) else ""
        raise not_readable(str(file), f"{reason or type(error).__name__}{theirs}.") from None
