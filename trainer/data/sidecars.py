"""Captions in JSON: one file for many images (HCP, kohya), and the sidecars that downloaders write.

Nothing in such a file is ever taken as a path to read: it can only name images of its own folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .caption_files import CaptionFileError, likely_encoding
from .images import shown

MAX_SIDECAR_BYTES = 16 * 2**20
MAX_LIST_BYTES = 256 * 2**20

# Fields of a downloader's sidecar in the order in which they are tried. Tags say more than titles.
CAPTION_FIELDS = ("caption",)
TAG_FIELDS = ("tags", "tag_string")
# Boorus' lists by category; characters first, as taggers do, then what is seen.
CATEGORY_FIELDS = tuple(
    f"{prefix}_{category}"
    for category in ("character", "copyright", "artist", "species", "general")
    for prefix in ("tags", "tag_string")
)
TEXT_FIELDS = ("description", "content", "title")
NAME_FIELDS = ("name", "tag", "title")  # of a tag that is an object


def read_json(path: Path | str, max_bytes: int = MAX_LIST_BYTES) -> Any:
    """Read a JSON file; raises CaptionFileError with the reason, also for a key that occurs twice."""
    try:
        size = Path(path).stat().st_size
        if size > max_bytes:
            raise CaptionFileError(f"{size / 2**20:.0f} MiB, the limit is {max_bytes // 2**20} MiB")
        data = Path(path).read_bytes()
    except OSError as error:
        raise CaptionFileError(error.strerror or type(error).__name__) from error
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise CaptionFileError(f"looks like {likely_encoding(data)}") from None
    except RecursionError:
        raise CaptionFileError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise CaptionFileError(f"no JSON at line {error.lineno}: {shown(error.msg, 60)}") from None
    except ValueError as error:  # a key twice, or a number of thousands of digits
        raise CaptionFileError(shown(error, 80)) from None


def caption_list(content: Any) -> dict[str, str] | None:
    """Return {image: caption} of a JSON file for many images, or None where it is something else.

    HCP's form is {"stem": "caption"}, kohya's {"path": {"caption": ..., "tags": ...}}; kohya joins the
    two with ", ".
    """
    if not isinstance(content, dict) or not content:
        return None
    found = {}
    for key, value in content.items():
        if isinstance(value, str):
            found[key] = _flat(value)
        elif isinstance(value, dict) and ("caption" in value or "tags" in value):
            parts = [value.get("caption"), value.get("tags")]
            if not all(part is None or isinstance(part, str) for part in parts):
                return None
            found[key] = ", ".join(text for part in parts if part and (text := _flat(part)))
        else:
            return None
    return found


def sidecar_caption(content: Any) -> str:
    """Return the caption in a downloader's sidecar: its caption, tags, tags by category, or text; else ""."""
    if not isinstance(content, dict):
        return ""
    for field in CAPTION_FIELDS:
        if text := _flat(content.get(field)):
            return text
    for field in TAG_FIELDS:
        if tags := tags_in(content.get(field)):
            return ", ".join(tags)
    tags = [tag for field in CATEGORY_FIELDS for tag in tags_in(content.get(field))]
    if tags:
        return ", ".join(dict.fromkeys(tags))
    return next((text for field in TEXT_FIELDS if (text := _flat(content.get(field)))), "")


def tags_in(value: Any) -> list[str]:
    """Return the tags of a list, of lists by category, or of a text (between commas, else between spaces)."""
    if isinstance(value, str):
        parts: Iterable[Any] = value.split(",") if "," in value else value.split()
    elif isinstance(value, Mapping):
        parts = [tag for tags in value.values() for tag in (tags_in(tags) if isinstance(tags, list) else [])]
    elif isinstance(value, list):
        parts = [_name_of(tag) for tag in value]
    else:
        return []
    return list(dict.fromkeys(text for part in parts if (text := _flat(part))))


def _name_of(tag: Any) -> Any:
    if isinstance(tag, Mapping):
        return next((tag[field] for field in NAME_FIELDS if isinstance(tag.get(field), str)), None)
    return tag


def _flat(value: Any) -> str:
    """Return a text on one line; "" for what is no text."""
    return " ".join(value.split()) if isinstance(value, str) else ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it has {double[:40]!r} twice")
    return found
