"""A dataset on disk, so that one command's result is the next one's input: paths and edits as JSON.

Paths are relative where they can be, so that the file and its pictures move together. Unknown keys and
values of another type are refused: a file that is half understood would train something else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import LoraGraftError, listed, nearest
from ..safefile import write_text
from .images import shown
from .records import Dataset, Record

FORMAT = "loragraft dataset"
VERSION = 1
MAX_FILE_BYTES = 256 * 2**20
MAX_SIDE = 1_000_000


def save_dataset(dataset: Dataset, file: Path | str) -> None:
    """Write the dataset to a JSON file, whole or not at all."""
    target = Path(file)
    base = Path(os.path.abspath(target.parent))  # noqa: PTH100 (links stay as the user wrote them)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "root": _relative(dataset.root, base),
        "lines": list(dataset.lines),
        "records": [_as_json(record, dataset.root, base) for record in dataset.records],
    }
    write_text(target, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def load_dataset(file: Path | str) -> Dataset:
    """Read what `save_dataset` wrote; raises LG-DATA-020 with everything that is wrong in it."""
    path = Path(file)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _refused(path, [f"it is larger than {MAX_FILE_BYTES // 2**20} MiB"])
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise _refused(path, [error.strerror or type(error).__name__]) from error
    except (ValueError, RecursionError) as error:
        raise _refused(path, [f"it is not JSON: {shown(error, 120)}"]) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _refused(path, [f'it does not say "format": "{FORMAT}"'])
    if content.get("version") != VERSION:
        raise _refused(path, [f"its version is {shown(repr(content.get('version')), 40)}, not {VERSION}"])
    faults = _faults(content, "", FILE_KEYS, FILE_KEYS)
    entries = content.get("records")
    for number, entry in enumerate(entries if isinstance(entries, list) else []):
        where = f"records[{number}]"
        faults += (
            _faults(entry, where, RECORD_KEYS, NEEDED)
            if isinstance(entry, dict)
            else [f"{where} is no object"]
        )
    if not faults:
        seen: set[str] = set()
        for entry in content["records"]:
            name = entry["name"]
            faults += [f"two records are called {shown(name)}"] if name in seen else []
            seen.add(name)
    if faults:
        raise _refused(path, faults)
    base = path.parent
    root = _joined(base, content["root"])
    return Dataset(
        root, tuple(_from_json(entry, root, base) for entry in content["records"]), tuple(content["lines"])
    )


# ---- one record ----


def _as_json(record: Record, root: Path, base: Path) -> dict[str, Any]:
    """Return the record's entry; what has its default value is left out."""
    entry: dict[str, Any] = {"name": record.name}
    if record.path != root / record.name:
        entry["path"] = _relative(record.path, base)
    entry |= {
        "size": list(record.size),
        "caption": record.caption,
        "concept": record.concept,
        "repeats": record.repeats,
        "content_hash": record.content_hash,
    }
    if record.mask is not None:
        entry["mask"] = "alpha" if record.mask == record.path else {"file": _relative(record.mask, base)}
        entry["mask_hash"] = record.mask_hash
    if record.crop is not None:
        entry["crop"] = list(record.crop)
    if record.background != (255, 255, 255):
        entry["background"] = list(record.background)
    if record.is_reg:
        entry["is_reg"] = True
    if record.caption_source:
        entry["caption_source"] = record.caption_source
    if record.overrides:
        entry["overrides"] = {name: _plain(value) for name, value in record.overrides}
    return entry


def _from_json(entry: Mapping[str, Any], root: Path, base: Path) -> Record:
    path = _joined(base, entry["path"]) if "path" in entry else root / entry["name"]
    mask = entry.get("mask")
    return Record(
        path=path,
        name=entry["name"],
        size=(entry["size"][0], entry["size"][1]),
        caption=entry["caption"],
        concept=entry["concept"],
        repeats=entry["repeats"],
        content_hash=entry["content_hash"],
        mask=None if mask is None else path if mask == "alpha" else _joined(base, mask["file"]),
        mask_hash=entry.get("mask_hash", ""),
        crop=tuple(entry["crop"]) if "crop" in entry else None,
        background=tuple(entry.get("background", (255, 255, 255))),
        is_reg=entry.get("is_reg", False),
        caption_source=entry.get("caption_source", ""),
        overrides=tuple((name, _frozen(value)) for name, value in entry.get("overrides", {}).items()),
    )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _relative(path: Path, base: Path) -> str:
    """Return ``path`` as seen from ``base``; absolute where there is no way, as between Windows' drives."""
    try:
        return PurePosixPath(Path(os.path.relpath(path, base)).as_posix()).as_posix()
    except ValueError:
        return path.absolute().as_posix()


def _joined(base: Path, text: str) -> Path:
    return Path(os.path.abspath(base / text))  # noqa: PTH100 (".." goes, links stay)


# ---- strictness ----


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _are_whole(value: object, count: int, low: int, high: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(_is_whole(v, low, high) for v in value)


def _is_crop(value: object) -> bool:
    return _are_whole(value, 4, 0, MAX_SIDE) and value[0] < value[2] and value[1] < value[3]  # type: ignore[index]


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("([0-9a-f]{64})?", value) is not None


def _is_mask(value: object) -> bool:
    if isinstance(value, dict):
        return value.keys() == {"file"} and _is_text(value["file"])
    return value == "alpha"


def _is_name(value: object) -> bool:
    """Say whether this is a posix path that stays where it is put."""
    if not _is_text(value) or not value:
        return False
    path = PurePosixPath(str(value))
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == value


Check = Callable[[object], bool]
# Key -> (what it must be, in words; the check).
FILE_KEYS: dict[str, tuple[str, Check]] = {
    "format": ("text", _is_text),
    "version": ("a number", lambda v: v == VERSION),
    "root": ("a path", _is_text),
    "lines": ("a list of texts", lambda v: isinstance(v, list) and all(map(_is_text, v))),
    "records": ("a list", lambda v: isinstance(v, list)),
}
RECORD_KEYS: dict[str, tuple[str, Check]] = {
    "name": ("a relative path without '..'", _is_name),
    "path": ("a path", _is_text),
    "size": ("[height, width]", lambda v: _are_whole(v, 2, 1, MAX_SIDE)),
    "caption": ("text", _is_text),
    "concept": ("text", _is_text),
    "repeats": ("a whole number from 1", lambda v: _is_whole(v, 1, MAX_SIDE)),
    "content_hash": ("a sha256", _is_hash),
    "mask": ('"alpha" or {"file": path}', _is_mask),
    "mask_hash": ("a sha256", _is_hash),
    "crop": ("[left, top, right, bottom]", _is_crop),
    "background": ("[red, green, blue]", lambda v: _are_whole(v, 3, 0, 255)),
    "is_reg": ("true or false", lambda v: isinstance(v, bool)),
    "caption_source": ("text", _is_text),
    "overrides": ("an object", lambda v: isinstance(v, dict)),
}
NEEDED = ("name", "size", "caption", "concept", "repeats", "content_hash")


def _faults(
    entry: Mapping[str, Any], where: str, known: Mapping[str, tuple[str, Check]], needed: Any
) -> list[str]:
    prefix = f"{where}." if where else ""
    found = [f"{prefix}{key} is missing" for key in needed if key not in entry]
    for key, value in entry.items():
        if key not in known:
            guess = "".join(f", did you mean {name}?" for name in nearest(key, known))
            found.append(f"{prefix}{shown(key, 60)} is unknown{guess}")
        elif not known[key][1](value):
            found.append(f"{prefix}{key} is {shown(repr(value), 60)}, expected {known[key][0]}")
    return found


def _refused(path: Path, faults: list[str]) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-020",
        "The dataset file cannot be used.",
        where=f"{shown(path)}: {listed(faults)}",
        why="what it says would be understood only in part.",
        fix="write it anew with 'loragraft dataset ... --out', or give the image folder",
    )
