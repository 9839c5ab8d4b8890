"""The one gate for paths and names that a user or a shared workflow gives."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .errors import LoraGraftError

SUFFIX = ".safetensors"
MAX_COMPONENT = 120
MAX_PATH = 200
NUMBERS = "0123456789\u00b9\u00b2\u00b3"  # Windows counts superscripts as digits here
RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"}
RESERVED |= {f"{port}{i}" for port in ("com", "lpt") for i in NUMBERS}
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"|?*]')
# A drive or a network share, and a folder below the root.
OF_WINDOWS, OF_POSIX = re.compile(r"[A-Za-z]:[\\/]|\\\\\w"), re.compile(r"[\\/]\w|~/")
# Line ends, marks that turn the order of letters round, and halves of surrogate pairs.
MISLEADING = re.compile("[\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def safe_name(name: str, *, what: str = "name") -> str:
    """Return ``name`` if it can be a file name on every system, else raise LG-PATH-001.

    Refused: empty, separators, control characters, reserved device names, a leading or trailing
    space or dot, a LoRA file's suffix, more than 120 bytes in UTF-8.
    """
    reason = _name_fault(name)
    if name.casefold().endswith(SUFFIX):
        reason = f"{SUFFIX} is put behind it anyway."
    if reason:
        raise LoraGraftError(
            "LG-PATH-001",
            f"The {what} {name[:60]!r} cannot be a file name.",
            where=what,
            why=reason,
            fix="use letters, digits, '-', '_' and spaces, without folders and suffix",
        )
    return name


def resolve(root: Path, user_text: str, *, what: str, must_exist: bool = False) -> Path:
    """Return the path that ``user_text`` names below ``root``; else raise LG-PATH-002 or -003.

    Refused: absolute paths, drive letters, network paths, '~', variables, '..', links that leave ``root``.
    """
    parts = [p for p in user_text.replace("\\", "/").split("/") if p not in ("", ".")]
    reason = _text_fault(user_text, parts)
    target = None if reason else _below(root, parts)
    if target is None:
        raise LoraGraftError(
            "LG-PATH-002",
            f"The {what} {user_text[:60]!r} is not allowed.",
            where=what,
            why=reason or "a link on the way leaves the allowed folder.",
            fix=f"name a folder or file below {root}",
        )
    if must_exist and not target.exists():
        raise LoraGraftError(
            "LG-PATH-003",
            f"The {what} {user_text[:80]!r} does not exist.",
            where=f"below {root}",
            why="there is no such file or folder.",
            fix="check the spelling; quotes and spaces at the ends count",
        )
    return target


def of_other_system(text: str, system: str = os.name) -> str:
    """Return the clause that says whose path a text is where it is none of this ``system``'s, else ""."""
    if system != "nt" and OF_WINDOWS.match(text):
        return ", and this is a path of Windows"
    if system == "nt" and OF_POSIX.match(text):
        return ", and this is a path of Linux or macOS"
    return ""


def _text_fault(text: str, parts: Sequence[str]) -> str | None:
    """Say what is wrong with the text of a path, or None; ``parts`` are the names in it."""
    if not text.strip():
        return "it is empty."
    if len(text) > MAX_PATH:
        return f"it is longer than {MAX_PATH} characters."
    if text.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:", text):
        return "it is absolute; only folders below the allowed one can be used."
    if "$" in text or "%" in text:
        return "it holds a variable."
    if "\\" in text and os.name != "nt":
        return "it holds a backslash."
    if ".." in parts:
        return "it leaves the allowed folder."
    return next((fault for p in parts if (fault := _name_fault(p, leading_dot=True))), None)


def _below(root: Path, parts: Sequence[str]) -> Path | None:
    """Return the real path of names below ``root``; None where a link leads out of it."""
    base = os.path.realpath(root)
    target = os.path.realpath(os.path.join(base, *parts))  # noqa: PTH118 (realpath must see the raw join)
    try:
        return Path(target) if os.path.commonpath([base, target]) == base else None
    except ValueError:  # different drives
        return None


def _name_fault(name: str, *, leading_dot: bool = False) -> str | None:
    if not name.strip():
        return "it is empty."
    if "/" in name or "\\" in name:
        return "it holds a path separator."
    if FORBIDDEN.search(name):
        return 'it holds a control character or one of < > : " | ? *.'
    if MISLEADING.search(name):
        return "it holds a character that cannot be seen or written."
    if (
        name in (".", "..")
        or name.endswith((".", " "))
        or name.startswith(" ")
        or (name.startswith(".") and not leading_dot)
    ):
        return "it starts or ends with a dot or a space."
    if name.split(".")[0].strip().lower() in RESERVED:
        return "it is a reserved device name on Windows."
    if len(name.encode()) > MAX_COMPONENT:
        return f"it is longer than {MAX_COMPONENT} bytes."
    return None
