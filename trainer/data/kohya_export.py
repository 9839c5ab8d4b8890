"""Write a train set as kohya's trainer reads it: folders called <repeats>_<class words> and a dataset.toml.

The pictures are written as training sees them (upright, cropped, sRGB), with their captions beside
them and a mask as their alpha channel. What kohya's config has no words for is refused, or said.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from ..config import DatasetConfig, as_dict, resolution_wh
from ..errors import LoraGraftError, listed
from ..safefile import write_text
from .captions import PLACE, is_varied
from .dataset_toml import KOHYA_DEFAULTS
from .images import is_plain, load_upright, read_checked, shown, upright_mask
from .kohya_keys import DATASET_KEYS, SUBSET_KEYS
from .records import Record
from .report import counted
from .toml_text import toml_lines
from .train_set import Group, TrainSet
from .working_copy import Copy, Encoding, Item, copy_key, write_items

FILE_NAME = "dataset.toml"
IMAGES = "images"
MARK = "# Written by LoraGraft; it is replaced when the dataset is exported again."
NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')
MAX_NAME = 60


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written: the config file, the working copy, and what kohya's trainer needs beside it."""

    file: Path
    copy: Copy
    lines: tuple[str, ...]


def export_kohya(
    train_set: TrainSet,
    folder: Path | str,
    *,
    encoding: Encoding | None = None,
    relative: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Export:
    """Write ``folder``/images/<repeats>_<class words>/ and ``folder``/dataset.toml.

    The paths in the file are absolute, as kohya's trainer needs them where it runs elsewhere;
    ``relative`` writes them as seen from the file, for a folder that moves. A second run touches only
    what changed. Raises LG-DATA-090 (a setting that kohya's config cannot say, or a file in the way),
    LG-DATA-021, -022 and -009.
    """
    _check_settings(train_set)
    root = Path(folder)
    file = root / FILE_NAME
    _check_target(file)
    encoding = encoding or Encoding()
    names = _subset_names(train_set)
    items = [_item(r, c, names[i], encoding) for i, (r, c) in enumerate(_with_configs(train_set))]
    copy = write_items(root / IMAGES, items, lines=train_set.lines, progress=progress)
    text, lines = _config_text(train_set, names, root, relative)
    write_text(file, text)
    return Export(file, copy, (copy.dataset.lines[-1], *lines))


def _with_configs(train_set: TrainSet) -> Sequence[tuple[Record, DatasetConfig]]:
    return list(zip(train_set.records, train_set.configs, strict=True))


# ---- pictures ----


def _item(record: Record, config: DatasetConfig, place: tuple[str, str], encoding: Encoding) -> Item:
    def render(file: IO[bytes]) -> None:
        data = read_checked(record)
        if not masked and record.crop is None and is_plain(data, encoding.format):
            file.write(data)  # encoding it again could only lose quality
            return
        image = load_upright(record, data)
        if masked:
            image.putalpha(upright_mask(record))
            image.save(file, "PNG", compress_level=3)
            return
        encoding.save(image, file)

    masked = record.mask is not None
    if masked:
        encoding = Encoding("png")
    caption = _caption(record, config)
    subset, stem = place
    return Item(
        dataclasses.replace(record, caption=caption),
        f"{subset}/{stem}{encoding.suffix}",
        copy_key(record, encoding, "alpha" if masked else "plain"),
        render,
    )


def _caption(record: Record, config: DatasetConfig) -> str:
    return (
        config.caption_template.replace(PLACE, record.caption) if config.caption_template else record.caption
    )


def _subset_names(train_set: TrainSet) -> list[tuple[str, str]]:
    """Return each record's (folder, file name without suffix): one folder for each way to be trained."""
    folders: dict[tuple[Any, ...], str] = {}
    taken: set[str] = set()
    used: Counter[str] = Counter()
    result = []
    for index, record in enumerate(train_set.records):
        key = _subset_key(train_set, index)
        if key not in folders:
            words = NOT_IN_NAMES.sub(" ", record.concept).strip(" .")[:MAX_NAME].strip() or "images"
            base = f"{record.repeats}_{words}"
            name, number = base, 1
            while name.casefold() in taken:
                number += 1
                name = f"{base} ({number})"
            taken.add(name.casefold())
            folders[key] = name
        used[folders[key]] += 1
        result.append((folders[key], f"{used[folders[key]]:05d}"))
    return result


def _subset_key(train_set: TrainSet, index: int) -> tuple[Any, ...]:
    record = train_set.records[index]
    group = next(n for n, g in enumerate(train_set.groups) if g.first <= index < g.last)
    return (group, record.is_reg, record.repeats, record.concept, record.overrides, record.mask is not None)


# ---- the file ----


def _config_text(
    train_set: TrainSet, names: Sequence[tuple[str, str]], root: Path, relative: bool
) -> tuple[str, list[str]]:
    lines = [MARK, "", "[general]", "caption_extension = '.txt'"]
    for group in train_set.groups:
        lines += ["", "[[datasets]]", *toml_lines(_group_values(group))]
        seen: set[str] = set()
        for index in range(group.first, group.last):
            name = names[index][0]
            if name in seen:
                continue
            seen.add(name)
            record = train_set.records[index]
            where = Path(IMAGES, name) if relative else (root / IMAGES / name).resolve()
            values: dict[str, Any] = {"image_dir": where.as_posix(), "num_repeats": record.repeats}
            if record.concept:
                values["class_tokens"] = record.concept
            if record.is_reg:
                values["is_reg"] = True
            if record.mask is not None:
                values["alpha_mask"] = True
            values |= {k: v for k, v in record.overrides if k in SUBSET_KEYS}
            lines += ["", "  [[datasets.subsets]]", *(f"  {line}" for line in toml_lines(values))]
    return "\n".join(lines) + "\n", _beside(train_set)


def _group_values(group: Group) -> dict[str, Any]:
    """Return the group's settings that kohya's file knows and that differ from kohya's defaults."""
    defaults = as_dict(DatasetConfig()) | KOHYA_DEFAULTS
    width, height = resolution_wh(group.config)
    values: dict[str, Any] = {"resolution": width if width == height else [width, height]}
    if group.batch_size is not None:
        values["batch_size"] = group.batch_size
    for key, value in as_dict(group.config).items():
        known = key in DATASET_KEYS or key in SUBSET_KEYS
        if known and key not in BESIDE and key != "resolution" and value != defaults[key]:
            values[key] = value
    return values


# Settings that kohya's trainer takes on its command line only.
BESIDE = ("prior_loss_weight", "validation_split", "validation_seed")


def _beside(train_set: TrainSet) -> list[str]:
    lines = []
    weights = {g.config.prior_loss_weight for g in train_set.groups} - {1.0}
    if weights:
        lines.append(
            f"kohya's command line needs --prior_loss_weight {', '.join(f'{w:g}' for w in weights)}."
        )
    if any(r.mask is not None for r in train_set.records):
        lines.append("Masks are written as alpha channels; kohya's command line needs --masked_loss.")
    if train_set.validation:
        lines.append(f"{len(train_set.validation.records)} images kept for validation are not exported.")
    if any(g.batch_size is None for g in train_set.groups):
        lines.append("No batch size is set: kohya's command line needs --train_batch_size.")
    return lines


# ---- refusals ----


def _check_settings(train_set: TrainSet) -> None:
    wrong: list[str] = []
    for group in train_set.groups:
        if group.config.num_bucket:
            wrong.append(f"num_bucket = {group.config.num_bucket}")
    for config in dict.fromkeys(train_set.configs):
        if config.caption_template and (is_varied(config) or config.caption_prefix or config.caption_suffix):
            wrong.append(f"caption_template = {shown(config.caption_template, 40)}")
    if wrong:
        raise LoraGraftError(
            "LG-DATA-090",
            f"{counted(len(set(wrong)), 'setting')} cannot be written for kohya's trainer.",
            where=listed(dict.fromkeys(wrong)),
            why="its config has no words for them, and leaving them out would train something else.",
            fix="set num_bucket to 0; put the template's words into the captions (Edit Captions)",
        )


def _check_target(file: Path) -> None:
    try:
        with file.open(encoding="utf-8", errors="replace") as text:
            first = text.readline().strip()
    except FileNotFoundError:
        return
    if first != MARK:
        raise LoraGraftError(
            "LG-DATA-090",
            "A file is in the way of the export.",
            where=shown(file),
            why="LoraGraft did not write it, and never replaces a file of yours.",
            fix="name another folder, or move the file away",
        )
