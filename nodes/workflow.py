"""The workflow that goes into a LoRA file, without paths that tell of this machine. No host needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# A text that is nothing but an absolute path; a sentence that starts with a slash is none.
ABSOLUTE = re.compile(r"(?:/[^/\n]+){2,}/?|[A-Za-z]:[\\/][^\n]*|\\\\[^\n]+")


def portable(workflow: Mapping[str, Any] | None, roots: Mapping[str, str]) -> str | None:
    """Return the workflow as compact JSON text whose paths are relative, or None where there is none.

    ``roots`` maps an absolute folder to what stands in its place after the relative path: "" for
    input/, " [output]" for output/. Other absolute paths keep their last part only.
    """
    if not workflow:
        return None
    ordered = sorted(((_slashed(k), v) for k, v in roots.items()), key=lambda item: -len(item[0]))
    return json.dumps(_clean(workflow, ordered), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _clean(value: Any, roots: Sequence[tuple[str, str]]) -> Any:
    if isinstance(value, dict):
        return {k: _clean(v, roots) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v, roots) for v in value]
    if isinstance(value, str):
        return _relative(value, roots)
    if isinstance(value, float) and not -1e308 < value < 1e308:
        return None  # NaN and infinity are no JSON
    return value


def _relative(text: str, roots: Sequence[tuple[str, str]]) -> str:
    whole = text.strip()
    if ABSOLUTE.fullmatch(whole):
        path = _slashed(whole)
        for root, suffix in roots:
            if _same(path, root):
                return "." + suffix
            if _same(path[: len(root) + 1], root + "/"):
                return path[len(root) + 1 :].rstrip("/") + suffix
        pure = PureWindowsPath(whole) if "\\" in whole or whole[1:2] == ":" else PurePosixPath(whole)
        return pure.name
    for root, _ in roots:  # a path inside a longer text
        text = text.replace(root + "/", "").replace(root.replace("/", "\\") + "\\", "")
    return text


def _slashed(path: str) -> str:
    return path.replace("\\", "/").rstrip("/")


def _same(a: str, b: str) -> bool:
    windows = b[1:2] == ":"
    return a.lower() == b.lower() if windows else a == b
