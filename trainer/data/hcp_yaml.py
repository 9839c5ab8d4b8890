"""Parse HCP-Diffusion's YAML: base files, references and sums resolved into plain values.

References (``${....word_names}``) and sums (``${hcp.eval:"512*768"}``) are OmegaConf's way of writing;
only these few forms are known, by rules of their own, and nothing in the file is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LoraGraftError, one_line
from .arithmetic import compute
from .images import shown

MAX_BYTES = 2**20
MAX_DEPTH = 40
SUM = re.compile(r"""\$\{\s*hcp\.eval\s*:\s*(["']?)(.*?)\1\s*\}""", re.DOTALL)
TIMES = re.compile(r"\$\{\s*times\s*:([^}]*)\}")
REFERENCE = re.compile(r"\$\{\s*(\.*)([\w.\[\]]+)\s*\}")
# Files of the HCP-Diffusion repository that every example inherits; what they say is known here.
SHIPPED = "cfgs/"


def parse_hcp(
    file: Path, *, trusted: bool = True, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Return the file's values with its base files below them, and the base files that are HCP's own.

    ``overrides`` change values as its command line does: train.train_epochs=10.
    Unless ``trusted``, base files are read only below the file's own folder. Raises LG-DATA-084 (not
    readable) and LG-DATA-089 (a sum that cannot be computed).
    """
    shipped: list[str] = []
    values = _with_bases(file, shipped, (), trusted)
    for override in overrides:
        _override(values, override)
    return _resolved(values, values, (), shown(file.name), 0), shipped


def _with_bases(file: Path, shipped: list[str], above: tuple[Path, ...], trusted: bool) -> dict[str, Any]:
    if file.resolve() in above:
        raise _unreadable(file, "its _base_ files name each other in a circle")
    values = _load(file)
    bases = values.pop("_base_", None) or []
    merged: dict[str, Any] = {}
    for name in [bases] if isinstance(bases, str) else bases:
        if not isinstance(name, str):
            raise _unreadable(file, f"_base_ holds {shown(repr(name), 40)}, expected file names")
        # The examples name their bases from the repository's root, which is rarely the working folder.
        found = next((p for p in _places(file, name, trusted) if p.is_file()), None)
        if found is not None:
            merged = _merged(merged, _with_bases(found, shipped, (*above, file.resolve()), trusted))
        elif name.startswith(SHIPPED):
            shipped.append(name)
        else:
            raise _unreadable(file, f"its _base_ file {shown(name)} does not exist")
    return _merged(merged, values)


def _places(file: Path, name: str, trusted: bool) -> list[Path]:
    """Return where a base file may lie: below this file's folder, or below one above it that has cfgs/."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        return []
    if not trusted:
        own = file.parent.resolve()
        return [path for path in [own / name] if path.resolve().is_relative_to(own)]
    roots = [file.parent, *(p for p in file.parents if (p / "cfgs").is_dir())]
    return [root / name for root in roots]


def _load(file: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
        text = file.read_bytes().decode("utf-8-sig")
        if any(isinstance(event, yaml.events.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it uses YAML anchors (&x, *x), which can grow without bounds")
        values = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not UTF-8 text"
        raise _unreadable(file, reason or type(error).__name__) from None
    if not isinstance(values, dict):
        raise _unreadable(file, "it holds no table of settings")
    return values


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = _merged(old, value)
        else:
            result[key] = value
    return result


def _override(values: dict[str, Any], override: str) -> None:
    """Set the value that KEY=VALUE names, with dots between the tables and numbers for places of lists."""
    import yaml

    path, equals, text = override.partition("=")
    keys = [part for part in path.strip().split(".") if part]
    try:
        if not equals or not keys or len(text) > MAX_BYTES:
            raise ValueError("it is not of the form KEY=VALUE")
        value = yaml.safe_load(text)
        table: Any = values
        for key in keys[:-1]:
            if isinstance(table, list):
                table = table[int(key)]
            else:
                table[key] = table = table.get(key) or {}
        if isinstance(table, list):
            table[int(keys[-1])] = value
        elif isinstance(table, dict):
            table[keys[-1]] = value
        else:
            raise ValueError(f"{shown(path, 60)} lies within a value")
    except (ValueError, IndexError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise LoraGraftError(
            "LG-DATA-084",
            f"The change {shown(override, 60)} cannot be made.",
            where=shown(override),
            why=one_line(f"{error}.", 400),
            fix="write for instance train.train_epochs=10",
        ) from None


# ---- references and sums ----


def _resolved(value: Any, root: Any, path: tuple[Any, ...], file: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise _broken(file, path, "it is nested too deeply, or refers to itself")
    if isinstance(value, Mapping):
        if str(value.get("_target_")) == "builtins.eval":
            sums = value.get("_args_")
            text = sums[0] if isinstance(sums, list) and sums else ""
            return compute(str(text), where=f"{file}: {_path_text(path)}")
        return {k: _resolved(v, root, (*path, k), file, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolved(v, root, (*path, i), file, depth + 1) for i, v in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    if match := SUM.fullmatch(value.strip()):
        return compute(match[2], where=f"{file}: {_path_text(path)}")
    if match := TIMES.fullmatch(value.strip()):
        return compute("*".join(match[1].split(",")), where=f"{file}: {_path_text(path)}")
    if match := REFERENCE.fullmatch(value.strip()):
        target = _target(match[1], match[2], path)
        found = _found(root, target)
        if found is None:
            raise _broken(file, path, f"{shown(value, 80)} refers to nothing")
        return _resolved(found, root, target, file, depth + 1)
    raise _broken(file, path, f"{shown(value, 80)} is not known; known are ${{hcp.eval:...}} and references")


def _target(dots: str, name: str, path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the path a reference means: one dot starts at the table that holds it, each more one above."""
    parts = tuple(int(p) if p.isdecimal() else p for p in re.split(r"[.\[\]]+", name) if p)
    if not dots:
        return parts
    return (*path[: max(0, len(path) - len(dots))], *parts)


def _found(root: Any, path: Sequence[Any]) -> Any:
    for key in path:
        inside = key in root if isinstance(root, Mapping) else False
        if isinstance(root, list) and isinstance(key, int):
            inside = key < len(root)
        if not inside:
            return None
        root = root[key]
    return root


def _path_text(path: Sequence[Any]) -> str:
    return ".".join(str(p) for p in path)


def _broken(file: str, path: Sequence[Any], why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-084",
        "A value in the dataset config cannot be resolved.",
        where=f"{file}: {shown(_path_text(path))}",
        why=f"{why}.",
        fix="write the value itself",
    )


def _unreadable(file: Path, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-084",
        "The dataset config cannot be read.",
        where=shown(file),
        why=one_line(f"{why}.", 400),
        fix="check the named place; the file must be UTF-8 and YAML as HCP-Diffusion writes it",
    )
