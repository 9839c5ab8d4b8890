"""One folder of a dataset config as records: its images, captions, repeats and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import LoraGraftError, listed
from .checking import Seen
from .images import shown
from .records import UNCAPTIONED, Dataset, Record, merged
from .report import counted
from .scan import scan_folder
from .scan_options import FOLDER, JSON

MISSING = ("stop", "empty")
# Stands in for a caption while a folder is scanned; what really does is decided here.
NO_WORDS = "\ue000none"


@dataclass(frozen=True)
class Subset:
    """What a config says about one folder; ``overrides`` are settings that differ from its dataset's."""

    folder: Path
    class_tokens: str = ""
    num_repeats: int = 1
    is_reg: bool = False
    caption_extensions: tuple[str, ...] = (".caption",)
    captions: Mapping[str, str] | None = None  # by file name without suffix, instead of caption files
    caption_json: Path | None = None  # kohya's metadata file, instead of caption files
    all_lines: bool = False
    alpha_mask: bool = False
    background: tuple[int, int, int] = (255, 255, 255)
    overrides: tuple[tuple[str, object], ...] = ()


def scan_subset(
    subset: Subset, *, on_bad: str = "stop", missing_captions: str = "stop", seen: Seen | None = None
) -> Dataset:
    """Read a subset's folder, not the folders in it; the folder's name says nothing here.

    An image without a caption gets ``class_tokens``; where there are none either, ``missing_captions``
    "stop" raises LG-DATA-006 with all of them, and "empty" trains them without words.
    """
    names = () if subset.captions is not None else subset.caption_extensions
    source = [name.removeprefix(".").casefold() for name in names]
    if subset.caption_json is not None:
        source = [JSON]
    dataset = scan_folder(
        subset.folder,
        recursive=False,
        class_tokens=subset.class_tokens or NO_WORDS,
        captions=(*source, FOLDER),
        caption_lines="all" if subset.all_lines else "first",
        caption_json="" if subset.caption_json is None else str(subset.caption_json),
        masks="alpha" if subset.alpha_mask else "none",
        background=subset.background,
        is_reg=subset.is_reg,
        on_bad=on_bad,
        seen=seen,
    )
    texts = _captions_of(subset, dataset.records)
    records = [
        dataclasses.replace(
            record,
            caption=texts.get(record.name, subset.class_tokens),
            caption_source=record.caption_source if subset.captions is None else "json",
            concept=subset.class_tokens,
            repeats=subset.num_repeats,
            overrides=subset.overrides,
        )
        for record in dataset.records
    ]
    without = [record.name for record in records if not record.caption]
    if without and missing_captions == "stop":
        raise _without_words(subset, without, len(records))
    empty = set(without)
    records = [dataclasses.replace(r, caption_source=UNCAPTIONED) if r.name in empty else r for r in records]
    # The scan's own counts speak of folder names, which say nothing here; what it left out does.
    kept = [
        line
        for line in dataset.lines
        if not line.startswith(("  ", "Captions")) and " with repeats" not in line
    ]
    return Dataset(dataset.root, tuple(records), (*_lines(subset, records, texts, without), *kept))


def _without_words(subset: Subset, names: Sequence[str], total: int) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-006",
        f"{len(names)} of {counted(total, 'image')} without a caption.",
        where=f"{shown(subset.folder)}: {listed(shown(name) for name in names)}",
        why=f"there is no {' or '.join(subset.caption_extensions)} file and no class_tokens.",
        fix="add caption files, set class_tokens, or ask for training without words (missing_captions)",
    )


def named_path(text: str, file: Path, resolve: Callable[[str], Path] | None) -> Path:
    """Return a path that a config names: through the gate, else from the working or the file's folder."""
    if resolve is not None:
        return resolve(text)
    path = Path(text).expanduser()
    if not path.is_absolute() and not path.exists() and (file.parent / path).exists():
        path = file.parent / path
    return path.resolve()


def join_subsets(subsets: Sequence[Dataset]) -> Dataset:
    """Return one dataset of all subsets; each one's folder name stands before its image names."""
    if len(subsets) > 1:
        subsets = [_prefixed(d, prefix) for d, prefix in zip(subsets, _prefixes(subsets), strict=True)]
    return merged(list(subsets))


def _prefixes(subsets: Sequence[Dataset]) -> list[str]:
    names: list[str] = []
    for dataset in subsets:
        base, number = dataset.root.name or "root", 1
        while (name := base if number == 1 else f"{base} {number}") in names:
            number += 1
        names.append(name)
    return names


def _prefixed(dataset: Dataset, prefix: str) -> Dataset:
    records = (dataclasses.replace(r, name=f"{prefix}/{r.name}") for r in dataset.records)
    return Dataset(dataset.root, tuple(records), dataset.lines)


def _captions_of(subset: Subset, records: Sequence[Record]) -> dict[str, str]:
    """Return the caption of each image that has one of its own."""
    if subset.captions is not None:
        stems = {record.name: PurePosixPath(record.name).stem for record in records}
        found = {name: subset.captions.get(stem, subset.captions.get(name)) for name, stem in stems.items()}
        return {name: text for name, text in found.items() if text}
    return {record.name: record.caption for record in records if record.caption_source != FOLDER}


def _lines(
    subset: Subset, records: Sequence[Record], texts: Mapping[str, str], without: Sequence[str]
) -> tuple[str, ...]:
    folder = shown(subset.folder.name)
    kind = "regularisation image" if subset.is_reg else "image"
    words = f"class words '{shown(subset.class_tokens)}'" if subset.class_tokens else "no class words"
    lines = [f"{folder}: {counted(len(records), kind)} x {subset.num_repeats}, {words}."]
    from_file = subset.captions is not None or subset.caption_json is not None
    source = "the caption file" if from_file else f"{'/'.join(subset.caption_extensions)} files"
    lines.append(f"  captions: {len(texts)} from {source}, {len(records) - len(texts)} from class words.")
    if without:
        lines.append(f"  WARNING: {len(without)} images are trained without any words (missing_captions).")
    if not from_file and ".txt" not in subset.caption_extensions:
        stems = {PurePosixPath(record.name).stem for record in records}
        unread = [p.name for p in sorted(subset.folder.glob("*.txt")) if p.stem in stems]
        if unread:
            lines.append(
                f"  WARNING: {counted(len(unread), '.txt file')} beside the images are not read, because "
                f"caption_extension is '{subset.caption_extensions[0]}' (kohya's default); "
                "set caption_extension = '.txt' to use them."
            )
    return tuple(lines)


def overrides_of(values: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[tuple[str, object], ...]:
    """Return the settings in ``values`` that differ from ``base``, sorted by name."""
    return tuple(sorted((k, v) for k, v in values.items() if v != base[k]))
