"""The keys of kohya's dataset config: where each may stand, which values it takes, what is refused.

All faults of a file are collected and raised together, so that a file is mended in one go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import LoraGraftError, listed, nearest
from .images import shown

WHOLE, NUMBER, TEXT, SWITCH = "a whole number", "a number", "text", "true or false"
SIZE, PAIR = "a whole number or [width, height]", "a pair of numbers"

SUBSET_KEYS = {
    "num_repeats": WHOLE,
    "shuffle_caption": SWITCH,
    "caption_separator": TEXT,
    "keep_tokens": WHOLE,
    "keep_tokens_separator": TEXT,
    "secondary_separator": TEXT,
    "enable_wildcard": SWITCH,
    "caption_prefix": TEXT,
    "caption_suffix": TEXT,
    "caption_dropout_rate": NUMBER,
    "caption_dropout_every_n_epochs": WHOLE,
    "caption_tag_dropout_rate": NUMBER,
    "token_warmup_min": WHOLE,
    "token_warmup_step": NUMBER,
    "flip_aug": SWITCH,
    "color_aug": SWITCH,
    "random_crop": SWITCH,
    "face_crop_aug_range": PAIR,
    "alpha_mask": SWITCH,
    "caption_extension": TEXT,
    "class_tokens": TEXT,
    "cache_info": SWITCH,
    "resize_interpolation": TEXT,
    "custom_attributes": "a table",
}
OWN_SUBSET_KEYS = {
    "image_dir": TEXT,
    "is_reg": SWITCH,
    "metadata_file": TEXT,
    "conditioning_data_dir": TEXT,
}
DATASET_KEYS = {
    "resolution": SIZE,
    "batch_size": WHOLE,
    "enable_bucket": SWITCH,
    "min_bucket_reso": WHOLE,
    "max_bucket_reso": WHOLE,
    "bucket_reso_steps": WHOLE,
    "bucket_no_upscale": SWITCH,
    "network_multiplier": NUMBER,
    "prior_loss_weight": NUMBER,
    "validation_split": NUMBER,
    "validation_seed": WHOLE,
}
LEVELS: dict[str, dict[str, str]] = {
    "general": {**DATASET_KEYS, **SUBSET_KEYS},
    "datasets": {**DATASET_KEYS, **SUBSET_KEYS},
    "subsets": {**SUBSET_KEYS, **OWN_SUBSET_KEYS},
}

_EVERY_STEP = "it changes the pixels at every use, but pictures are encoded once and kept"
# key -> (values that ask for nothing, why it cannot be honoured, what to do)
REFUSED: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "color_aug": ((False,), _EVERY_STEP, "remove it; flip_aug works"),
    "random_crop": ((False,), _EVERY_STEP, "remove it, and crop beforehand (loragraft dataset crop)"),
    "face_crop_aug_range": ((), _EVERY_STEP, "remove it, and crop beforehand (loragraft dataset crop)"),
    "network_multiplier": ((1, 1.0), "it is for training against another LoRA", "remove it"),
    "conditioning_data_dir": ((), "it is for training a ControlNet", "remove the subset"),
    "resize_interpolation": (("lanczos",), "pictures are resized with Lanczos", "remove it"),
    "custom_attributes": (({},), "no part of the trainer reads it", "remove it"),
}


@dataclass
class Faults:
    """What is wrong in one file, by kind; ``raise_any`` raises the first kind that has entries."""

    file: str
    unknown: list[str] = field(default_factory=list)
    guesses: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)

    def raise_any(self) -> None:
        """Raise LG-DATA-080 (unknown), LG-DATA-081 (wrong kind) or LG-DATA-083 (cannot be honoured)."""
        if self.unknown:
            raise LoraGraftError(
                "LG-DATA-080",
                f"Unknown setting {listed(self.unknown, limit=3)}.",
                where=f"{self.file}: {listed(self.unknown)}",
                why="a misspelt setting would be trained without, and nobody would notice.",
                fix=f"did you mean {listed(dict.fromkeys(self.guesses))}?"
                if self.guesses
                else f"known in a subset: {listed(LEVELS['subsets'], limit=60)}",
            )
        if self.wrong:
            raise LoraGraftError(
                "LG-DATA-081",
                f"{len(self.wrong)} value{'s' if len(self.wrong) > 1 else ''} of the wrong kind.",
                where=f"{self.file}: {listed(self.wrong)}",
                why="guessing what was meant could train something else.",
                fix="write the named kind of value; text stands in quotes, numbers and true or false do not",
            )
        if self.refused:
            raise LoraGraftError(
                "LG-DATA-083",
                f"{len(self.refused)} setting{'s' if len(self.refused) > 1 else ''} cannot be honoured.",
                where=f"{self.file}: {listed(self.refused)}",
                why="leaving a setting out silently would train something other than the file says.",
                fix=listed(dict.fromkeys(self.remedies)),
            )


def check_config(config: Any, file: str) -> None:
    """Check a whole config as parsed from TOML or JSON; raises LG-DATA-080, -081 or -083 with every fault."""
    faults = Faults(file)
    if not isinstance(config, Mapping):
        faults.wrong.append(f"the file holds {_kind(config)}, expected tables")
        faults.raise_any()
    for key in config:
        if key not in ("general", "datasets"):
            faults.unknown.append(key)
            found = nearest(key, ("general", "datasets"))
            # A setting at the top of the file belongs to no table, which is easily overlooked.
            faults.guesses += found or (["the same below [general]"] if key in LEVELS["general"] else [])
    for path, level, table in _tables(config, faults):
        _check_table(path, level, table, faults)
    faults.raise_any()


def _tables(config: Mapping[str, Any], faults: Faults) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    general = config.get("general", {})
    if isinstance(general, Mapping):
        yield "general", "general", general
    else:
        faults.wrong.append(f"general is {_kind(general)}, expected a table [general]")
    datasets = _list(config.get("datasets", []), "datasets", "[[datasets]]", faults)
    if not datasets and not faults.wrong:
        faults.wrong.append("no [[datasets]] table, expected at least one")
    for i, dataset in enumerate(datasets):
        path = f"datasets[{i}]"
        yield path, "datasets", {k: v for k, v in dataset.items() if k != "subsets"}
        subsets = _list(dataset.get("subsets", []), f"{path}.subsets", "[[datasets.subsets]]", faults)
        if not subsets and not faults.wrong:
            faults.wrong.append(f"{path} has no [[datasets.subsets]] table, expected at least one")
        for j, subset in enumerate(subsets):
            if "image_dir" not in subset:
                faults.wrong.append(f"{path}.subsets[{j}] has no image_dir, expected a folder")
            yield f"{path}.subsets[{j}]", "subsets", subset


def _list(value: Any, path: str, written: str, faults: Faults) -> list[Mapping[str, Any]]:
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return value
    faults.wrong.append(f"{path} is {_kind(value)}, expected tables {written}")
    return []


def _check_table(path: str, level: str, table: Mapping[str, Any], faults: Faults) -> None:
    known = LEVELS[level]
    for key, value in table.items():
        name = f"{path}.{shown(key, 60)}"
        if key not in known:
            faults.unknown.append(name)
            faults.guesses += nearest(key, known)
        elif not _fits(value, known[key]):
            faults.wrong.append(f"{name} is {_kind(value)}, expected {known[key]}")
        elif key in REFUSED and value not in REFUSED[key][0]:
            _, reason, remedy = REFUSED[key]
            faults.refused.append(f"{name} ({reason})")
            faults.remedies.append(remedy)


def _fits(value: Any, kind: str) -> bool:
    whole = type(value) is int
    if kind == SIZE:
        return whole or (isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value))
    if kind == PAIR:
        return isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) for v in value)
    if kind == NUMBER:
        return whole or type(value) is float
    types = {WHOLE: int, TEXT: str, SWITCH: bool, "a table": dict}
    return type(value) is types[kind]


def _kind(value: Any) -> str:
    if isinstance(value, (Mapping, list)):
        return "a table" if isinstance(value, Mapping) else "a list"
    return shown(repr(value), 60)
