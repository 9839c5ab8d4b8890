"""Change what a LoRA file says of itself; its tensors are copied byte by byte, so its hashes stay true."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from PIL import Image

from ..adapters.files import read_metadata
from ..errors import LoraGraftError, listed, nearest
from ..safefile import write_atomically
from .lora_file import check_free

# What can be set by a short name, and the key that readers know.
FIELDS = {
    "title": "modelspec.title",
    "trigger_phrase": "modelspec.trigger_phrase",
    "author": "modelspec.author",
    "description": "modelspec.description",
    "license": "modelspec.license",
    "tags": "modelspec.tags",
    "usage_hint": "modelspec.usage_hint",
    "comment": "ss_training_comment",
}
THUMBNAIL = "modelspec.thumbnail"
THUMBNAIL_PX, THUMBNAIL_BYTES = 256, 100_000
MAX_VALUE = 1_000_000  # characters of one value
# What is computed from the tensors, or from which a run is known again.
FIXED = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "loragraft_run", "__metadata__")
KEY = re.compile(r"[A-Za-z0-9_.\-]{1,100}")


def edit_metadata(
    path: Path,
    changes: Mapping[str, str],
    *,
    remove: Sequence[str] = (),
    thumbnail: Image.Image | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write the file with changed metadata and return it; ``output`` None changes the file itself.

    ``changes`` maps FIELDS' names or whole keys to texts; an empty text removes the key. ``thumbnail`` is
    shrunk to 256 px. The file itself is changed only with ``overwrite``. Raises LG-TOOL-004, -014.
    """
    output = output or path
    check_free(output, overwrite=overwrite)
    metadata = read_metadata(path)
    given = {FIELDS.get(key, key): text for key, text in changes.items()}
    removed = [FIELDS.get(key, key) for key in remove] + [key for key, text in given.items() if not text]
    _check(metadata, given, [FIELDS.get(key, key) for key in remove])
    metadata = {**metadata, **given}
    if thumbnail is not None:
        metadata[THUMBNAIL] = thumbnail_uri(thumbnail)
    metadata = {key: text for key, text in metadata.items() if key not in removed}
    rewrite_header(path, output, metadata)
    return metadata


def thumbnail_uri(picture: Image.Image) -> str:
    """Return a picture as a data URI of at most 256 x 256 pixels and 100 kB."""
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    for quality in (90, 75, 60, 40, 20):
        data = io.BytesIO()
        small.save(data, "JPEG", quality=quality)
        if data.tell() <= THUMBNAIL_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def rewrite_header(path: Path, output: Path, metadata: Mapping[str, str]) -> None:
    """Copy a safetensors file with other metadata; the tensors' bytes and their places stay."""
    with path.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        header = json.loads(source.read(length))
        header.pop("__metadata__", None)
        told = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        text = json.dumps({**told, **header}, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)

        def body(file: IO[bytes]) -> None:
            file.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(source, file, 2**20)

        write_atomically(output, body)


def metadata_lines(metadata: Mapping[str, str], *, width: int = 200) -> list[str]:
    """Return the metadata as lines, what people read first on top, long values cut."""
    first = [key for key in (*FIELDS.values(), THUMBNAIL) if key in metadata]
    ordered = first + sorted(key for key in metadata if key not in first)
    return [f"{key}: {_short(metadata[key], width)}" for key in ordered]


def _short(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[:width]}... ({len(text)} characters)"


def _check(metadata: Mapping[str, str], given: Mapping[str, str], removed: Sequence[str]) -> None:
    reason, where = None, ""
    fixed = [key for key in (*given, *removed) if key in FIXED]
    odd = [key for key in given if not KEY.fullmatch(key) or ("." not in key and "_" not in key)]
    missing = [key for key in removed if key not in metadata]
    if fixed:
        reason, where = "it is computed from the tensors, or names the run.", listed(fixed)
    elif odd:
        guess = nearest(odd[0], FIELDS)
        reason = f"no such field{f'; did you mean {guess[0]}?' if guess else ''}"
        where = listed(key or "an empty key" for key in odd)
    elif missing:
        reason, where = "the file does not hold it.", listed(missing)
    elif long := [key for key, text in given.items() if len(text) > MAX_VALUE]:
        reason, where = f"its text is longer than {MAX_VALUE} characters.", listed(long)
    elif not given and not removed:
        return
    if reason:
        raise LoraGraftError(
            "LG-TOOL-014",
            "The metadata cannot be changed so.",
            where=where,
            why=reason,
            fix=f"set one of {', '.join(FIELDS)}, or a whole key such as modelspec.date",
        )
