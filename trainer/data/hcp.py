"""Read HCP-Diffusion's data blocks into blocks that can be frozen.

A training dataset becomes a group with its batch size, buckets, captions and template; one whose name
begins with ``dataset_class`` becomes regularisation images that keep pace with it. What a file
leaves out is taken from HCP-Diffusion's own base file, which every example inherits, and is said.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import make
from ..config import DatasetConfig
from ..errors import LoraGraftError, listed
from .caption_files import CaptionFileError, read_caption
from .caption_templates import fill_template, placeholders
from .captions import PLACE
from .checking import Seen
from .hcp_keys import (
    BASE_AREA,
    BASE_BATCH_SIZE,
    BASE_NUM_BUCKET,
    BASE_STEP,
    BASE_TAG_DROPOUT,
    bucket_kind,
    check_data,
    is_class,
    kind_of,
    transforms_of,
    words_of,
)
from .hcp_yaml import parse_hcp
from .images import shown
from .kohya_keys import Faults
from .records import Dataset, Record
from .subsets import Subset, join_subsets, named_path, scan_subset
from .train_set import Block

MAX_TABLE_BYTES = 64 * 2**20

Resolve = Callable[[str], Path]

# Its base file names a list of sentences without the caption; a file that gives no list means its words.
TEMPLATE_WITH_CAPTION, TEMPLATE_WITHOUT = "{pt1} {class}, {caption}", "{pt1} {class}"


def read_hcp(
    file: Path,
    *,
    base: Mapping[str, Any] | None = None,
    resolve: Resolve | None = None,
    overrides: Sequence[str] = (),
    on_bad: str = "stop",
    missing_captions: str = "stop",
    seen: Seen | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Block]:
    """Read the ``data`` block of an HCP-Diffusion training file and scan its folders.

    ``base`` holds settings that count where the file says nothing; ``resolve`` is the gate for its paths
    (without it they start at the working folder, or else beside the file); ``overrides`` change values as
    key=value. An image without a caption
    gets the template without one. Raises LG-DATA-080 to LG-DATA-084, -089, -092 and what scanning raises.
    """
    values, shipped = parse_hcp(file, trusted=resolve is None, overrides=overrides)
    name = shown(file.name)
    faults = Faults(name)
    data = values.get("data")
    if not isinstance(data, Mapping) or not data:
        faults.wrong.append("data is missing, expected a table with a dataset in it")
        faults.raise_any()
        raise AssertionError("unreachable")
    check_data(data, faults)
    faults.raise_any()
    notes = _notes(values, shipped, name)
    total = sum(len(dataset["source"]) for dataset in data.values())
    done = 0
    blocks = []
    for key, dataset in data.items():
        members = []
        for source in dataset["source"].values():
            members.append(_scan(source, key, file, resolve, on_bad, missing_captions, seen))
            done += 1
            if progress is not None:
                progress(done, total)
        joined = join_subsets(members)
        blocks.append(_block(key, dataset, joined.replaced(joined.records), base or {}, name))
    first = blocks[0].dataset
    blocks[0] = dataclasses.replace(
        blocks[0], dataset=Dataset(first.root, first.records, (*notes, *first.lines))
    )
    return blocks


# ---- from values to records ----


def _scan(
    source: Mapping[str, Any],
    key: str,
    file: Path,
    resolve: Resolve | None,
    on_bad: str,
    missing_captions: str,
    seen: Seen | None,
) -> Dataset:
    folder = named_path(source["img_root"], file, resolve)
    captions, extensions = _captions(source.get("caption_file"), folder, file, resolve)
    words = {k: str(v) for k, v in words_of(source).items()}
    template = _template(
        source.get("prompt_template"), captions is not None or bool(extensions), file, resolve
    )
    frames = [_fill(line, words, with_caption=True) for line in template]
    bare = [_fill(line, words, with_caption=False) for line in template]
    subset = Subset(
        folder=folder,
        num_repeats=source.get("repeat", 1),
        is_reg=is_class(key),
        caption_extensions=extensions or (".txt",),
        captions=captions if captions is not None or extensions else {},
        background=tuple(source.get("bg_color", (255, 255, 255))),
    )
    dataset = scan_subset(subset, on_bad=on_bad, missing_captions="empty", seen=seen)
    concept = words.get("pt1") or words.get("class") or ""
    records = tuple(_worded(r, concept, frames, bare) for r in dataset.records)
    empty = [r.name for r in records if not r.caption and not dict(r.overrides).get("caption_template")]
    if empty and missing_captions == "stop":
        raise LoraGraftError(
            "LG-DATA-006",
            f"{len(empty)} of {len(records)} images without a caption.",
            where=f"{shown(folder)}: {listed(shown(name) for name in empty)}",
            why="there is no caption for them, and the template is empty without one.",
            fix="add captions, or fill in word_names (pt1, class)",
        )
    said = [line for line in dataset.lines if "WARNING" not in line and "class words" not in line]
    said += [
        f"{shown(folder.name)}: {len(records)} images x {subset.num_repeats}, caption as "
        f"'{shown(frames[0])}'" + (f" or {len(frames) - 1} other templates." if len(frames) > 1 else ".")
    ]
    return Dataset(dataset.root, records, tuple(said))


def _worded(record: Record, concept: str, frames: list[str], bare: list[str]) -> Record:
    """Return the record with its caption inside the template, or the template without a caption."""
    lines = frames if record.caption else bare
    if len(lines) == 1 and not record.caption:
        return dataclasses.replace(record, caption=lines[0], concept=concept)
    overrides = (("caption_template", "\n".join(lines)),) if lines != [PLACE] else ()
    return dataclasses.replace(record, concept=concept, overrides=overrides)


def _fill(line: str, words: Mapping[str, str], *, with_caption: bool) -> str:
    """Fill in the words; a name that stands for nothing leaves no hole, as in HCP-Diffusion."""
    known = {name: words.get(name, "") for name in placeholders(line, where="prompt_template")}
    if "caption" in known:
        known["caption"] = PLACE if with_caption else ""
    return fill_template(line, known, where="prompt_template")


def _captions(
    given: str | None, folder: Path, file: Path, resolve: Resolve | None
) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """Return captions by file name, or the suffix of caption files beside the images; neither for null."""
    if given is None:
        return None, ()
    path = named_path(given, file, resolve)
    if path == folder:
        return None, (".txt",)
    if path.is_dir():
        return _folder_captions(path), ()
    return read_caption_table(path), ()


def _folder_captions(folder: Path) -> dict[str, str]:
    captions, bad = {}, []
    for text in sorted(folder.glob("*.txt")):
        try:
            captions[text.stem] = read_caption(text).text
        except CaptionFileError as error:
            bad.append(f"{shown(text.name)} ({error})")
    if bad:
        raise LoraGraftError(
            "LG-DATA-004",
            f"{len(bad)} caption files cannot be read as UTF-8 text.",
            where=listed(bad),
            why="guessing the encoding could train wrong words without anybody noticing.",
            fix="open the file in a text editor and save it with the encoding UTF-8",
        )
    return captions


def read_caption_table(path: Path) -> dict[str, str]:
    """Return {file name without suffix: caption} of a JSON or YAML file; raises LG-DATA-092."""
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise ValueError(f"it is larger than {MAX_TABLE_BYTES // 2**20} MiB")
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix.casefold() in (".yaml", ".yml"):
            import yaml  # type: ignore[import-untyped]

            values = yaml.safe_load(text)
        else:
            values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise _bad_table(path, str(error) or type(error).__name__) from None
    except Exception as error:  # PyYAML's own errors are no ValueErrors, and PyYAML may be absent
        raise _bad_table(path, str(error)) from None
    if not isinstance(values, dict):
        raise _bad_table(path, "it holds no table")
    wrong = [str(key) for key, value in values.items() if not isinstance(value, str)]
    if wrong:
        raise _bad_table(path, f"these captions are no text: {listed(shown(k, 60) for k in wrong)}")
    return {str(key): value.strip() for key, value in values.items()}


def _bad_table(path: Path, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-092",
        "The file of captions cannot be read.",
        where=shown(path),
        why=f"{why}.",
        fix='write a JSON file in UTF-8 such as {"1": "a caption", "2": "another"}, named after the images',
    )


def _template(given: str | None, captioned: bool, file: Path, resolve: Resolve | None) -> list[str]:
    if given is None:
        return [TEMPLATE_WITH_CAPTION if captioned else TEMPLATE_WITHOUT]
    path = named_path(given, file, resolve)
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LoraGraftError(
            "LG-DATA-093",
            "The file of caption templates cannot be read.",
            where=f"{shown(path)} ({getattr(error, 'strerror', None) or 'not UTF-8'})",
            why="it says what stands around every caption.",
            fix=f"give its path, or remove prompt_template to use '{TEMPLATE_WITH_CAPTION}'",
        ) from None
    return lines or [PLACE]


# ---- settings ----


def _block(
    key: str, dataset: Mapping[str, Any], joined: Dataset, base: Mapping[str, Any], name: str
) -> Block:
    where = f"{name}: data.{key}"
    values = {**base, **_bucket_settings(dataset.get("bucket", {}), where)}
    shuffles, dropout = _tag_settings(next(iter(dataset["source"].values())))
    values |= {"shuffle_caption": shuffles, "caption_tag_dropout_rate": dropout}
    if is_class(key):
        values["prior_loss_weight"] = float(dataset.get("loss_weight", 1.0))
    config = make(DatasetConfig, values, where=where)
    batch_size = dataset.get("batch_size", BASE_BATCH_SIZE)
    if type(batch_size) is not int or not 1 <= batch_size <= 1024:
        raise LoraGraftError(
            "LG-DATA-081",
            f"batch_size is {shown(repr(batch_size), 40)}.",
            where=f"{where}.batch_size",
            why="it is the number of images of a batch.",
            fix="write a whole number from 1 to 1024",
        )
    return Block(joined, config, batch_size, keeps_pace=is_class(key))


def _bucket_settings(bucket: Mapping[str, Any], where: str) -> dict[str, Any]:
    if bucket_kind(bucket) == "FixedBucket":
        size = bucket.get("target_size", 512)
        sides = size if isinstance(size, list) else [size, size]
        return {"enable_bucket": False, "resolution": (sides * 2)[:2], "bucket_reso_steps": BASE_STEP}
    step = bucket.get("step_size", BASE_STEP)
    return {
        "resolution": list(sides_of(bucket.get("target_area", BASE_AREA), step, where)),
        "num_bucket": bucket.get("num_bucket", BASE_NUM_BUCKET),
        "bucket_reso_steps": step,
        "min_bucket_reso": 16,
        "max_bucket_reso": 8192,
    }


def sides_of(area: int, step: int, where: str) -> tuple[int, int]:
    """Return the squarest (width, height) in whole steps of exactly this area; raises LG-DATA-081."""
    for units in range(math.isqrt(area) // step, 0, -1):
        width = units * step
        if area % width == 0 and (area // width) % step == 0:
            if area // width > 2 * width:
                break
            return width, area // width
    near = max(1, round(math.sqrt(area) / step)) * step
    raise LoraGraftError(
        "LG-DATA-081",
        f"target_area {area} is no product of two sides in steps of {step}.",
        where=f"{where}.bucket.target_area",
        why="the area is given by a width and a height of at most 1:2.",
        fix=f"write for instance {near}*{near}",
    )


def _tag_settings(source: Mapping[str, Any]) -> tuple[bool, float]:
    if "tag_transforms" not in source:
        return True, BASE_TAG_DROPOUT
    kinds = {kind_of(entry): entry for entry in transforms_of(source)}
    dropout = float(kinds["TagDropout"].get("p", BASE_TAG_DROPOUT)) if "TagDropout" in kinds else 0.0
    return "TagShuffle" in kinds, dropout


def _notes(values: Mapping[str, Any], shipped: list[str], name: str) -> list[str]:
    notes = []
    others = [key for key in values if key != "data"]
    if others:
        notes.append(f"{name}: only 'data' is read; left to the training settings: {', '.join(others)}.")
    if shipped:
        notes.append(f"{name}: HCP-Diffusion's own base files are taken as known: {', '.join(shipped)}.")
    for key, dataset in values["data"].items():
        if any("tag_transforms" not in source for source in dataset["source"].values()):
            notes.append(
                f"data.{key}: tags are shuffled and {BASE_TAG_DROPOUT:.0%} of them left out, as "
                "HCP-Diffusion's base file says; write tag_transforms to change it."
            )
    return notes
