"""Freeze records for training: every record in its bucket, with a fingerprint and a report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import DatasetConfig, as_dict
from ..errors import LoraGraftError, listed
from .balance import balance_records, repeat_regularisation
from .buckets import Choice, select_bucket
from .captions import as_static
from .folders import natural_key
from .images import shown
from .ratio_buckets import ratio_choices
from .records import UNCAPTIONED, Dataset, Record, merged
from .report import bucket_lines, caption_use_lines, counted, group_line, size_text
from .validation import hold_out

Size = tuple[int, int]

# Part of the fingerprint: raise it when the same records and settings would train on other pixels.
VERSION = 1
# Settings of the first version; the others enter the fingerprint only where they differ from their
# defaults, so that a set made before they existed keeps its fingerprint.
FIRST_SETTINGS = (
    *("resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"),
    *("bucket_no_upscale", "shuffle_caption", "keep_tokens", "caption_separator"),
    *("caption_dropout_rate", "caption_tag_dropout_rate"),
)


@dataclass(frozen=True)
class Block:
    """What trains together: a dataset with its settings, as one [[datasets]] table of kohya's config.

    ``batch_size`` None leaves it to the run. With ``keeps_pace`` regularisation images alone are repeated
    until they fill as many batches as the other blocks make (HCP-Diffusion's class dataset).
    """

    dataset: Dataset
    config: DatasetConfig
    batch_size: int | None = None
    keeps_pace: bool = False


@dataclass(frozen=True)
class Group:
    """The records ``first`` to ``last`` - 1 of a train set, which form batches only among themselves.

    With ``keeps_pace`` each of its batches comes right behind one of the others.
    """

    first: int
    last: int
    config: DatasetConfig
    batch_size: int | None = None
    keeps_pace: bool = False


@dataclass(frozen=True)
class TrainSet:
    """Records in an order of their own (by name, whatever the scan's order) with what becomes of each.

    ``buckets``, ``resized`` and ``configs`` hold one entry per record: resize to ``resized``, cut ``bucket``
    from the centre (both (width, height)), use the caption as ``configs`` says. ``config`` is the first
    group's. ``validation`` holds the records kept out of training, each used once and never varied.
    ``fingerprint`` is equal for equal content and settings, wherever the folder lies.
    """

    records: tuple[Record, ...]
    config: DatasetConfig
    buckets: tuple[Size, ...]
    resized: tuple[Size, ...]
    lines: tuple[str, ...]
    fingerprint: str
    configs: tuple[DatasetConfig, ...]
    groups: tuple[Group, ...]
    validation: TrainSet | None = None


def build_train_set(dataset: Dataset, config: DatasetConfig) -> TrainSet:
    """Assign every record to its bucket and report what that does to the pictures.

    Raises LG-DATA-010 for images too small to fill one bucket step without being enlarged, and what
    `freeze_blocks` raises.
    """
    return freeze_blocks([Block(dataset, config)])


def freeze_blocks(blocks: Sequence[Block]) -> TrainSet:
    """Freeze one or several blocks into a train set; batches never mix two blocks.

    Raises LG-DATA-006 (no caption), LG-CFG-003 (no separator), LG-DATA-010 (too small), LG-DATA-086 (more
    buckets than images), LG-DATA-087 (only regularisation images) and LG-DATA-088 (validation leaves
    nothing to train on).
    """
    _check_words(blocks)
    parts = [_prepared(block) for block in blocks]
    if not any(part.training for part in parts):
        raise LoraGraftError(
            "LG-DATA-087",
            "There are only regularisation images.",
            where=listed(shown(block.dataset.root) for block in blocks),
            why="they keep a class as it is while something else is learned; here nothing would be.",
            fix="add the folder of training images, or take is_reg away",
        )
    samples = [sum(r.repeats for r in part.training) for part in parts]
    pace = sum(
        math.ceil(n / (part.block.batch_size or 1)) for part, n in zip(parts, samples, strict=True) if n
    )
    for part, own in zip(parts, samples, strict=True):
        _repeat_regularisation(part, own, pace)
    held: list[_Members] = [
        (part.held, as_static(part.block.config), part.block.batch_size, []) for part in parts
    ]
    lines = [line for block in blocks for line in block.dataset.lines]
    train_set = _frozen(
        [(p.training, p.block.config, p.block.batch_size, p.lines) for p in parts], lines, len(blocks) > 1
    )
    if any(part.block.keeps_pace for part in parts):
        train_set = _paced(train_set, [part.block.keeps_pace for part in parts])
    if not any(part.held for part in parts):
        return train_set
    validation = _frozen([h for h in held if h[0]], [], len(blocks) > 1)
    validation = dataclasses.replace(validation, configs=tuple(map(as_static, validation.configs)))
    return dataclasses.replace(train_set, validation=validation)


def _check_words(blocks: Sequence[Block]) -> None:
    """Refuse images that would be trained without a word, unless that was asked for."""
    without = []
    for block in blocks:
        for record in block.dataset.records:
            if record.caption.strip() or record.caption_source == UNCAPTIONED:
                continue
            config = dataclasses.replace(block.config, **dict(record.overrides))  # type: ignore[arg-type]
            if not (config.caption_template or config.caption_prefix or config.caption_suffix):
                without.append(record.name)
    if without:
        raise LoraGraftError(
            "LG-DATA-006",
            f"{counted(len(without), 'image')} without a caption.",
            where=listed(map(shown, without)),
            why="an image without words teaches the LoRA to appear everywhere, which is rarely meant.",
            fix="tag them (WD14 Tag), set captions, add .txt files, or give class_tokens where they are read",
        )


def add_regularisation(dataset: Dataset, regularisation: Dataset) -> Dataset:
    """Return one dataset in which all records of the second are regularisation images."""
    marked = [dataclasses.replace(record, is_reg=True) for record in regularisation.records]
    return merged([dataset, Dataset(regularisation.root, tuple(marked), regularisation.lines)])


def samples_per_epoch(train_set: TrainSet) -> int:
    """Return how many images an epoch shows, repeats included."""
    return sum(record.repeats for record in train_set.records)


def training_samples(train_set: TrainSet) -> int:
    """Return how many training images an epoch shows, repeats included, regularisation left out."""
    return sum(record.repeats for record in train_set.records if not record.is_reg)


def batches_per_epoch(train_set: TrainSet, batch_size: int) -> int:
    """Return the number of batches in an epoch: every bucket's last one may be smaller."""
    total = 0
    for group in train_set.groups:
        sizes: Counter[Size] = Counter()
        for index in range(group.first, group.last):
            sizes[train_set.buckets[index]] += train_set.records[index].repeats
        total += sum(math.ceil(size / (group.batch_size or batch_size)) for size in sizes.values())
    return total


def steps_per_epoch(train_set: TrainSet, batch_size: int, accumulation: int) -> int:
    """Return the number of optimizer steps in an epoch; the last one may accumulate fewer batches."""
    return math.ceil(batches_per_epoch(train_set, batch_size) / accumulation)


def steps_lines(
    train_set: TrainSet,
    batch_size: int,
    accumulation: int = 1,
    *,
    epochs: int | None = None,
    steps: int | None = None,
) -> tuple[str, ...]:
    """Return the arithmetic of a run in words, for ``epochs`` epochs or for ``steps`` steps."""
    samples = samples_per_epoch(train_set)
    batches = batches_per_epoch(train_set, batch_size)
    per_epoch = steps_per_epoch(train_set, batch_size, accumulation)
    if epochs is not None:
        num_epochs, steps = f"{epochs}", epochs * per_epoch
    else:
        steps = per_epoch if steps is None else steps
        num_epochs = f"{steps / per_epoch:.4g}"
    repeats = {record.repeats for record in train_set.records}
    if len(repeats) == 1:
        images = f"{counted(len(train_set.records), 'image')} x {counted(repeats.pop(), 'repeat')}"
    else:
        images = f"{counted(len(train_set.records), 'image')}, {samples} with their repeats,"
    sizes = [group.batch_size or batch_size for group in train_set.groups]
    size = " and ".join(str(s) for s in dict.fromkeys(sizes))
    lines = [
        f"{images} x {num_epochs} epochs / (batch {size} x accumulation {accumulation}) "
        f"= {steps} steps, {per_epoch} per epoch."
    ]
    ideal = sum(
        math.ceil(sum(r.repeats for r in train_set.records[g.first : g.last]) / s)
        for g, s in zip(train_set.groups, sizes, strict=True)
    )
    if batches != ideal:
        lines.append(
            f"An epoch has {batches} batches instead of {ideal}: a batch holds images of one bucket only, "
            f"so each of the {len(set(train_set.buckets))} buckets may end in a smaller one."
        )
    return tuple(lines)


def effective(record: Record, config: DatasetConfig) -> DatasetConfig:
    """Return the settings that hold for a record: its train set's, with what its subset says."""
    if not record.overrides:
        return config
    values: Mapping[str, Any] = dict(record.overrides)
    return dataclasses.replace(config, **values)


# ---- making it ----

_Members = tuple[list[Record], DatasetConfig, int | None, list[str]]


@dataclass
class _Part:
    """A block on its way: what trains, what is kept out, its regularisation images, what to say."""

    block: Block
    training: list[Record]
    held: list[Record]
    regularisation: list[Record]
    lines: list[str]


def _prepared(block: Block) -> _Part:
    config = block.config
    ordered = sorted(block.dataset.records, key=lambda record: natural_key(record.name))
    for each in dict.fromkeys(effective(record, config) for record in ordered):
        _check_separator(each)
    training = [r for r in ordered if not r.is_reg]
    lines: list[str] = []
    held: list[Record] = []
    if config.validation_split > 0 and training:
        training, held, lines = hold_out(training, config.validation_split, config.validation_seed)
    if config.balance_concepts and training:
        training, more = balance_records(training)
        lines += more
    return _Part(block, training, held, [r for r in ordered if r.is_reg], lines)


def _repeat_regularisation(part: _Part, own: int, pace: int) -> None:
    if not part.regularisation:
        return
    target = own
    if part.block.keeps_pace and not part.training:
        target = pace * (part.block.batch_size or 1)
    if not target:
        raise LoraGraftError(
            "LG-DATA-087",
            "A group of regularisation images has no training images beside it.",
            where=shown(part.block.dataset.root),
            why="their number follows the training images of the same group, and there are none.",
            fix="put the training images into the same [[datasets]] table or dataset",
        )
    used, _, lines = repeat_regularisation(part.regularisation, target)
    part.training = sorted([*part.training, *used], key=lambda record: natural_key(record.name))
    part.lines += lines


def _frozen(
    parts: Sequence[_Members],
    lines: Sequence[str],
    several: bool,
) -> TrainSet:
    records: list[Record] = []
    choices: list[Choice] = []
    configs: list[DatasetConfig] = []
    groups: list[Group] = []
    said = list(lines)
    for number, (members, config, batch_size, more) in enumerate(parts, 1):
        if several:  # the same image may be in two groups, and each use needs a name of its own
            members = [dataclasses.replace(r, name=f"{number}/{r.name}") for r in members]
            said.append(group_line(number, len(members), batch_size))
        own = _choices(members, config)
        _check_sizes(members, own, config)
        said += [*more, *bucket_lines(members, own, config), *caption_use_lines(members, config)]
        groups.append(Group(len(records), len(records) + len(members), config, batch_size))
        records += members
        choices += own
        configs += [effective(record, config) for record in members]
    return TrainSet(
        records=tuple(records),
        config=groups[0].config,
        buckets=tuple(choice.bucket for choice in choices),
        resized=tuple(choice.resized for choice in choices),
        lines=tuple(said),
        fingerprint=_fingerprint(records, choices, groups),
        configs=tuple(configs),
        groups=tuple(groups),
    )


def _paced(train_set: TrainSet, keep_pace: Sequence[bool]) -> TrainSet:
    """Return the train set with the groups marked that keep pace; their batches come in another order."""
    groups = tuple(
        dataclasses.replace(group, keeps_pace=keeps)
        for group, keeps in zip(train_set.groups, keep_pace, strict=True)
    )
    text = f"{train_set.fingerprint} {list(keep_pace)}"
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return dataclasses.replace(train_set, groups=groups, fingerprint=fingerprint)


def _choices(records: Sequence[Record], config: DatasetConfig) -> list[Choice]:
    if config.num_bucket:
        return ratio_choices([record.size[::-1] for record in records], config)
    return [select_bucket(record.size[::-1], config) for record in records]


def _fingerprint(records: Sequence[Record], choices: Sequence[Choice], groups: Sequence[Group]) -> str:
    rows = [_row(record, choice) for record, choice in zip(records, choices, strict=True)]
    content: list[Any] = [VERSION, _settings(groups[0].config), rows]
    if len(groups) > 1 or groups[0].batch_size is not None:
        content.append([[g.first, g.last, g.batch_size, _settings(g.config)] for g in groups])
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _settings(config: DatasetConfig) -> dict[str, Any]:
    defaults = as_dict(DatasetConfig())
    return {k: v for k, v in as_dict(config).items() if k in FIRST_SETTINGS or v != defaults[k]}


def _row(record: Record, choice: Choice) -> list[Any]:
    r = record
    row: list[Any] = [
        *(r.name, r.content_hash, r.caption, r.concept, r.repeats),
        *(choice.bucket, choice.resized),
    ]
    extra = {
        "mask": r.mask_hash,
        "crop": r.crop,
        "background": None if r.background == (255, 255, 255) else r.background,
        "is_reg": r.is_reg,
        "overrides": sorted(r.overrides),
    }
    given = {key: value for key, value in extra.items() if value}
    return [*row, given] if given else row


def _check_separator(config: DatasetConfig) -> None:
    tagwise = config.shuffle_caption or config.caption_tag_dropout_rate > 0 or config.token_warmup_step > 0
    if not config.caption_separator and tagwise:
        raise LoraGraftError(
            "LG-CFG-003",
            "Setting 'caption_separator' is empty, expected what stands between two tags.",
            where="caption_separator",
            why="without it a caption has no tags to shuffle or leave out.",
            fix="set caption_separator to ',', or switch shuffle_caption, caption_tag_dropout_rate and "
            "token_warmup_step off",
        )


def _check_sizes(records: Sequence[Record], choices: Sequence[Choice], config: DatasetConfig) -> None:
    small = [
        f"{shown(record.name)} ({size_text(record.size[::-1])})"
        for record, choice in zip(records, choices, strict=True)
        if 0 in choice.bucket
    ]
    if small:
        raise LoraGraftError(
            "LG-DATA-010",
            f"{len(small)} of {len(records)} images are too small or too narrow for a bucket.",
            where=listed(small),
            why=f"bucket_no_upscale is on, and a bucket side is at least {config.bucket_reso_steps} px.",
            fix="remove these images, switch bucket_no_upscale off, or lower bucket_reso_steps",
        )
