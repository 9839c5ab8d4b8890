"""The taggers that are known by name, and where their files lie; nothing is fetched here.

A tagger is a graph or weights and ``selected_tags.csv``, the names of its outputs. Files are found in
the layouts of this pack, of the WD14 Tagger node pack and of the Hugging Face cache.
"""

from __future__ import annotations

import csv
import functools
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoraGraftError, listed, nearest
from .images import shown

OWNER = "SmilingWolf"
GRAPH, WEIGHTS, LABELS, CONFIG = "model.onnx", "model.safetensors", "selected_tags.csv", "config.json"

RATING, GENERAL, CHARACTER = 9, 0, 4
MAX_CSV_BYTES = 16 * 2**20
MAX_ROWS = 100_000
MAX_FIELD = 300


@dataclass(frozen=True)
class Pin:
    """One file of a tagger as it was published: its sha256, and its size where that is known."""

    file: str
    sha256: str
    size: int | None


@dataclass(frozen=True)
class Known:
    """A published tagger at one commit of its repository."""

    name: str
    commit: str
    files: tuple[Pin, ...]

    @property
    def repo(self) -> str:
        """Return the repository's name on the hub."""
        return f"{OWNER}/{self.name}"


def _known(name: str, commit: str, sha256: str, size: int | None, labels: Pin) -> Known:
    return Known(name, commit, (Pin(GRAPH, sha256, size), labels))


_V3 = Pin(LABELS, "298633d94d0031d2081c0893f29c82eab7f0df00b08483ba8f29d1e979441217", 308_468)
_V2 = Pin(LABELS, "8c8750600db36233a1b274ac88bd46289e588b338218c2e4c62bbc9f2b516368", 253_906)

# What may be downloaded: only this, at these commits, with these contents. "auto" takes the first that
# is there.
KNOWN: tuple[Known, ...] = (
    _known(
        "wd-swinv2-tagger-v3",
        "627aef95638667ddcaa3ac8ae625e88ea5b02f51",
        "e6774bff34d43bd49f75a47db4ef217dce701c9847b546523eb85ff6dbba1db1",
        467_460_978,
        _V3,
    ),
    _known(
        "wd-eva02-large-tagger-v3",
        "b25b82a03f7282e41aa2f257a52c7583b710bd1c",
        "9e768793060c7939b277ccb382783e8670e8a042d29d77aa736be0c8cc898bfc",
        1_260_435_999,
        _V3,
    ),
    _known(
        "wd-vit-large-tagger-v3",
        "ae469aa2e4706a3af08d3673cf73a11d1add314c",
        "e4c8001b000a6c98f2db10794f7c406daa79873d071d6ca924330fa053fa1845",
        1_260_645_673,
        _V3,
    ),
    _known(
        "wd-vit-tagger-v3",
        "7f6b584d0bd3f55c4531f14ba3d4761b2bccdc0f",
        "35f23693620b668f4d53fd3c62bf65e40af739bc52c7eb0fbc49258b58d065b6",
        378_536_310,
        _V3,
    ),
    _known(
        "wd-convnext-tagger-v3",
        "d39e46de298d27340111b64965e20b8185c407e6",
        "1b8a7abf13d9b8368267df47501d523789c4aeae66b2296ad98483239dfa32eb",
        394_990_732,
        _V3,
    ),
    _known(
        "wd-v1-4-swinv2-tagger-v2",
        "cdb0c7fdc70646f0af29c6f80f8df564344a69b6",
        "04ec04fdf7db74b4fed7f4b52f52e04dec4dbad9e4d88d2d178f334079a29fde",
        None,
        _V2,
    ),
    _known(
        "wd-v1-4-moat-tagger-v2",
        "8452cddf280b952281b6e102411c50e981cb2908",
        "b8cef913be4c9e8d93f9f903e74271416502ce0b4b04df0ff1e2f00df488aa03",
        326_197_340,
        _V2,
    ),
    _known(
        "wd-v1-4-convnext-tagger-v2",
        "4b34d1b07bdd8e95494072648960b8a6adcbc0ff",
        "71f06ecb7b9df81d8f271da4d43997ea2ed363cdac29aa64fcb256c9631e656a",
        387_820_405,
        _V2,
    ),
)
KNOWN_NAMES = tuple(known.name for known in KNOWN)
AUTO = "auto"


@dataclass(frozen=True)
class TaggerFiles:
    """Where one tagger lies: an ONNX graph, or timm weights beside their config, or both."""

    name: str
    labels: Path
    graph: Path | None = None
    weights: Path | None = None


@dataclass(frozen=True)
class Labels:
    """The tagger's outputs in order: names as boorus write them, and categories (9 rating, 0, 4)."""

    names: tuple[str, ...]
    categories: tuple[int, ...]

    @functools.cached_property
    def by_category(self) -> dict[int, frozenset[str]]:
        """Return the names of each category."""
        kinds = set(self.categories)
        pairs = list(zip(self.names, self.categories, strict=True))
        return {kind: frozenset(name for name, other in pairs if other == kind) for kind in kinds}


def find_taggers(folders: Iterable[Path], *, hub_cache: bool = True) -> dict[str, TaggerFiles]:
    """Return every tagger in these folders, then in the Hugging Face cache, by name; earlier ones win.

    A tagger is ``NAME/model.onnx`` beside ``selected_tags.csv``, ``NAME/model.safetensors`` with
    ``config.json`` as well, or ``NAME.onnx`` beside ``NAME.csv``.
    """
    found: dict[str, TaggerFiles] = {}
    for folder in folders:
        for entry in _entries(folder):
            name = entry.name.removeprefix(f"{OWNER}_")  # as kohya's script calls its folders
            files = _in_folder(entry, name) if entry.is_dir() else _beside(entry)
            if files is not None:
                found.setdefault(files.name, files)
    for files in _in_hub_cache() if hub_cache else ():
        found.setdefault(files.name, files)
    return found


def choose_taggers(
    names: Sequence[str], found: dict[str, TaggerFiles], searched: Sequence[str]
) -> list[TaggerFiles]:
    """Return the files of the named taggers; "auto" is the first known one that is there.

    Raises LG-DATA-060 with all that are missing; ``searched`` says in words where was looked.
    """
    best = next((name for name in (*KNOWN_NAMES, *found) if name in found), None)
    wanted = [best if name == AUTO else name for name in names]
    missing = [name for name, real in zip(names, wanted, strict=True) if real not in found]
    if missing or not wanted:
        raise _not_found(missing or [AUTO], found, searched)
    return [found[name] for name in dict.fromkeys(wanted) if name is not None]


def read_labels(file: Path) -> Labels:
    """Read ``selected_tags.csv``: a header with name and category, then one row per output.

    Raises LG-DATA-063 with all broken rows.
    """
    names, categories, faults = [], [], []
    try:
        rows = csv.reader(io.StringIO(_csv_text(file), newline=""), strict=True)
        header = next(rows, [])
        if "name" not in header or "category" not in header:
            raise _bad_labels(file, "its first line does not name the columns 'name' and 'category'.")
        at_name, at_category = header.index("name"), header.index("category")
        for number, row in enumerate(rows, 2):
            if number > MAX_ROWS + 1:
                raise _bad_labels(file, f"it has more than {MAX_ROWS} rows.")
            fault = _row_fault(row, len(header), at_name, at_category)
            if fault:
                faults.append(f"row {number} {fault}")
            else:
                names.append(row[at_name].strip())
                categories.append(int(row[at_category]))
    except csv.Error as error:
        raise _bad_labels(file, f"{error}.") from None
    if faults:
        raise _bad_labels(file, f"{listed(faults)}.")
    if not names:
        raise _bad_labels(file, "it holds no tags.")
    return Labels(tuple(names), tuple(categories))


def _csv_text(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_CSV_BYTES:
            raise _bad_labels(file, f"it is larger than {MAX_CSV_BYTES // 2**20} MiB.")
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad_labels(file, f"{error}.") from None
    if "\0" in text:
        raise _bad_labels(file, "it holds zero bytes.")
    return text


def _row_fault(row: list[str], width: int, at_name: int, at_category: int) -> str | None:
    if len(row) != width:
        return f"has {len(row)} fields instead of {width}"
    name, category = row[at_name].strip(), row[at_category].strip()
    if not name or len(name) > MAX_FIELD or not name.isprintable() or "," in name:
        return f"has the name {shown(repr(name), 40)}"
    if not (category.isascii() and category.isdecimal() and len(category) <= 3):
        return f"has the category {shown(repr(category), 20)}"
    return None


# ---- where files lie ----


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # not there, or not readable: then nothing is found in it
        return []


def _in_folder(folder: Path, name: str) -> TaggerFiles | None:
    graph, weights, labels = folder / GRAPH, folder / WEIGHTS, folder / LABELS
    timm = weights if weights.is_file() and (folder / CONFIG).is_file() else None
    if not labels.is_file() or not (graph.is_file() or timm):
        return None
    return TaggerFiles(name, labels, graph if graph.is_file() else None, timm)


def _beside(file: Path) -> TaggerFiles | None:
    labels = file.with_suffix(".csv")
    if file.suffix.casefold() != ".onnx" or not labels.is_file():
        return None
    return TaggerFiles(file.stem, labels, file)


def _in_hub_cache() -> list[TaggerFiles]:
    found = []
    for repo in _entries(hub_cache_folder()):
        owner, name = repo.name.split("--")[1:3] if repo.name.count("--") == 2 else ("", "")
        if owner == OWNER:
            snapshots = (_in_folder(snapshot, name) for snapshot in _entries(repo / "snapshots"))
            found += [files for files in snapshots if files is not None]
    return found


def hub_cache_folder() -> Path:
    """Return the folder in which Hugging Face's library keeps downloads, by its environment variables."""
    if folder := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


# ---- refusals ----


def _not_found(
    missing: Sequence[str], found: dict[str, TaggerFiles], searched: Sequence[str]
) -> LoraGraftError:
    names = listed((repr(shown(name, 40)) for name in missing), limit=2)
    guesses = dict.fromkeys(guess for name in missing[:20] for guess in nearest(name, [*KNOWN_NAMES, *found]))
    there = f"there: {listed(sorted(found))}" if found else "no tagger is there"
    return LoraGraftError(
        "LG-DATA-060",
        "No tagger was found." if list(missing) == [AUTO] else f"The tagger {names} was not found.",
        where=f"{listed((shown(name, 60) for name in missing), limit=10)}, in {listed(searched, limit=8)}",
        why=f"nothing is downloaded while tagging; {there}.",
        fix=f"put NAME/{GRAPH} and NAME/{LABELS} into one of these folders, or fetch one by Download Tagger "
        f"or 'loragraft dataset tag --download'; known: {', '.join(KNOWN_NAMES)}"
        + (f"; nearest: {', '.join(guesses)}" if guesses else ""),
    )


def _bad_labels(file: Path, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-063",
        "The tagger's list of tags cannot be read.",
        where=shown(file),
        why=why,
        fix=f"take {LABELS} from the tagger's own repository, unchanged",
    )
