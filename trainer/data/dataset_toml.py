"""Read kohya's dataset config (TOML, or JSON of the same shape) into blocks that can be frozen.

A setting is looked for in the subset, then its dataset, then [general], then what the caller gives
(the command line), then kohya's default: the order of the reference. Where the reference goes on
without a word (a folder that does not exist, images without any caption), this refuses.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import make
from ..config import DatasetConfig
from ..errors import LoraGraftError, listed, one_line
from ..paths import of_other_system
from .checking import Seen
from .images import shown
from .kohya_keys import SUBSET_KEYS, check_config
from .records import Dataset
from .subsets import Subset, join_subsets, named_path, overrides_of, scan_subset
from .train_set import Block

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib

MAX_BYTES = 2**20
# What kohya takes where a file says nothing and this project's default differs.
KOHYA_DEFAULTS: dict[str, Any] = {"enable_bucket": False}
SETTINGS = tuple(f.name for f in dataclasses.fields(DatasetConfig))
SUBSET_SETTINGS = tuple(name for name in SETTINGS if name in SUBSET_KEYS)

Resolve = Callable[[str], Path]


def read_dataset_config(
    file: Path,
    *,
    base: Mapping[str, Any] | None = None,
    resolve: Resolve | None = None,
    on_bad: str = "stop",
    missing_captions: str = "stop",
    seen: Seen | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Block]:
    """Read a kohya dataset config and scan its folders.

    ``base`` holds settings that count where the file says nothing, also a subset's. ``resolve`` turns a
    path in the file into one that may be read (a gate raises); without it, relative paths start at the
    working folder as in kohya's trainer, or else beside the file. Raises LG-DATA-080 to LG-DATA-085,
    LG-DATA-006 and what scanning a folder raises; every unusable folder is named at once.
    """
    config = parse_config(file)
    name = shown(file.name)
    check_config(config, name)
    general = config.get("general", {})
    blocks: list[Block] = []
    wanted = _subsets(config, file, resolve, base or {})
    scanned = _scan_all(wanted, name, on_bad, missing_captions, seen, progress)
    for i, dataset in enumerate(config["datasets"]):
        group = _group_config(dataset, general, base or {}, f"{name}: datasets[{i}]")
        members = []
        for j, raw in enumerate(dataset["subsets"]):
            chain = (raw, dataset, general)
            own = {k: _looked_up(k, chain, dataclasses.asdict(group)) for k in SUBSET_SETTINGS}
            checked = make(
                DatasetConfig,
                {**dataclasses.asdict(group), **own},
                where=f"{name}: datasets[{i}].subsets[{j}]",
            )
            overrides = overrides_of(
                {k: getattr(checked, k) for k in SUBSET_SETTINGS}, dataclasses.asdict(group)
            )
            found = scanned[i][j]
            records = (dataclasses.replace(r, overrides=overrides) for r in found.records)
            members.append(Dataset(found.root, tuple(records), found.lines))
        batch_size = _looked_up("batch_size", (dataset, general), {"batch_size": None})
        blocks.append(Block(join_subsets(members), group, batch_size))
    return blocks


def parse_config(file: Path) -> Any:
    """Return the plain content of a .toml or .json file; raises LG-DATA-084 with the place of a fault."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
        text = file.read_bytes().decode("utf-8-sig")
        if file.suffix.casefold() == ".json":
            return json.loads(text)
        return tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # both parsers' errors are ValueErrors
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not UTF-8 text"
        theirs = of_other_system(str(file)) if isinstance(error, FileNotFoundError) else ""
        raise LoraGraftError(
            "LG-DATA-084",
            "The dataset config cannot be read.",
            where=shown(file),
            why=one_line(f"{reason or type(error).__name__}{theirs}.", 400),
            fix="check the named place. In TOML a Windows path stands in single quotes: 'D:\\photos'",
        ) from None


# ---- what the file asks for ----


def _looked_up(key: str, chain: Sequence[Mapping[str, Any]], default: Mapping[str, Any]) -> Any:
    return next((table[key] for table in chain if table.get(key) is not None), default[key])


def _group_config(
    dataset: Mapping[str, Any], general: Mapping[str, Any], base: Mapping[str, Any], where: str
) -> DatasetConfig:
    """Return the settings of one [[datasets]] table: its own, then [general]'s, then the caller's."""
    values: dict[str, Any] = {**KOHYA_DEFAULTS}
    for table in (base, general, dataset):
        values |= {k: v for k, v in table.items() if k in SETTINGS}
    if "resolution" not in values:
        raise LoraGraftError(
            "LG-DATA-081",
            "No resolution is given.",
            where=f"{where}.resolution",
            why="there is no usual value: it depends on the base model.",
            fix="add for instance resolution = 512 below [[datasets]] (512 for SD 1.5, 1024 for SDXL)",
        )
    return make(DatasetConfig, values, where=where)


def _subsets(
    config: Mapping[str, Any], file: Path, resolve: Resolve | None, base: Mapping[str, Any]
) -> list[list[tuple[str, Subset]]]:
    """Return each dataset's subsets with where they stand; raises LG-DATA-085 for a folder named twice."""
    general = config.get("general", {})
    result: list[list[tuple[str, Subset]]] = []
    twice: list[str] = []
    for i, dataset in enumerate(config["datasets"]):
        row: list[tuple[str, Subset]] = []
        seen: set[Path] = set()
        for j, raw in enumerate(dataset["subsets"]):
            chain = (raw, dataset, general)
            place = f"datasets[{i}].subsets[{j}]"
            folder = named_path(raw["image_dir"], file, resolve)
            if folder in seen:
                twice.append(f"{place} {shown(raw['image_dir'])}")
            seen.add(folder)
            given = {key: _looked_up(key, chain, {key: base.get(key)}) for key in SUBSET_KEYS}
            metadata = raw.get("metadata_file")
            table = None if metadata is None else named_path(metadata, file, resolve)
            row.append((place, _subset(folder, raw, given, table)))
        result.append(row)
    if twice:
        raise LoraGraftError(
            "LG-DATA-085",
            f"{len(twice)} folder{'s' if len(twice) > 1 else ''} named twice in one [[datasets]] table.",
            where=f"{shown(file.name)}: {listed(twice)}",
            why="kohya's trainer leaves the second one out with a warning; its settings would be lost.",
            fix="remove one of the two, or raise num_repeats instead",
        )
    return result


def _subset(folder: Path, raw: Mapping[str, Any], given: Mapping[str, Any], table: Path | None) -> Subset:
    return Subset(
        folder=folder,
        class_tokens=given["class_tokens"] or "",
        num_repeats=1 if given["num_repeats"] is None else given["num_repeats"],
        is_reg=raw.get("is_reg", False),
        caption_extensions=(given["caption_extension"] or ".caption",),
        all_lines=bool(given["enable_wildcard"]),
        alpha_mask=bool(given["alpha_mask"]),
        caption_json=table,
    )


def _scan_all(
    wanted: Sequence[Sequence[tuple[str, Subset]]],
    name: str,
    on_bad: str,
    missing_captions: str,
    seen: Seen | None,
    progress: Callable[[int, int], None] | None,
) -> list[list[Dataset]]:
    """Scan every folder; what several of them lack is said in one error."""
    done, total = 0, sum(len(row) for row in wanted)
    unusable: list[tuple[str, LoraGraftError]] = []
    result: list[list[Dataset]] = []
    for row in wanted:
        result.append([])
        for place, subset in row:
            if subset.num_repeats < 1:
                raise LoraGraftError(
                    "LG-DATA-081",
                    f"num_repeats is {subset.num_repeats}.",
                    where=f"{name}: {place}.num_repeats",
                    why="a folder that is used less than once is not trained on.",
                    fix="set num_repeats to 1 or more, or remove the subset",
                )
            try:
                result[-1].append(
                    scan_subset(subset, on_bad=on_bad, missing_captions=missing_captions, seen=seen)
                )
            except LoraGraftError as error:
                if error.code not in ("LG-DATA-001", "LG-DATA-002"):
                    raise
                unusable.append((f"{place} {shown(subset.folder)}", error))
            done += 1
            if progress is not None:
                progress(done, total)
    if unusable:
        reasons = dict.fromkeys(error.why for _, error in unusable)
        raise LoraGraftError(
            "LG-DATA-082",
            f"{len(unusable)} of {total} folders cannot be used.",
            where=f"{name}: {listed(where for where, _ in unusable)}",
            why=listed(reasons),
            fix=listed(dict.fromkeys(error.fix for _, error in unusable)),
        )
    return result
