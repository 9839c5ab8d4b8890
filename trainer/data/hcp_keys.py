"""The keys of HCP-Diffusion's data blocks: which there are, which values they take, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import nearest
from .images import shown
from .kohya_keys import Faults

DATASET_KEYS = (
    *("_target_", "_partial_", "batch_size", "cache_latents", "att_mask_encode", "loss_weight"),
    *("source", "bucket"),
)
SOURCE_KEYS = (
    *("_target_", "img_root", "prompt_template", "caption_file", "att_mask", "bg_color", "repeat"),
    *("word_names", "image_transforms", "tag_transforms"),
)
BUCKET_KEYS = ("_target_", "target_area", "num_bucket", "step_size", "target_size", "pre_build_bucket")
TRANSFORMS = ("TagShuffle", "TagDropout", "TemplateFill")
BUCKETS = ("RatioBucket.from_files", "FixedBucket")
# HCP-Diffusion's cfgs/train/dataset/base_dataset.yaml, as far as it says something about data.
BASE_BATCH_SIZE, BASE_NUM_BUCKET, BASE_AREA, BASE_STEP = 4, 5, 512 * 512, 8
BASE_TAG_DROPOUT = 0.1
CLASS_DATASET = "dataset_class"


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, type(None)))


def _is_repeat(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 10_000


def _is_color(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(c in range(256) for c in value)


# Key of a source -> the value of one that is not there, what is expected, whether a value is that.
SOURCE_VALUES: Mapping[str, tuple[Any, str, Callable[[Any], bool]]] = {
    "caption_file": (None, "a path or null", _is_path),
    "prompt_template": (None, "a path or null", _is_path),
    "repeat": (1, "1 to 10000", _is_repeat),
    "bg_color": ([255, 255, 255], "[red, green, blue]", _is_color),
}


def check_data(data: Mapping[str, Any], faults: Faults) -> None:
    """Collect every fault of a ``data`` block."""
    for key, dataset in data.items():
        path = f"data.{shown(key, 60)}"
        if not isinstance(dataset, Mapping) or not isinstance(dataset.get("source"), Mapping):
            faults.wrong.append(f"{path}.source is missing, expected a table with a data source in it")
            continue
        _check_keys(path, dataset, DATASET_KEYS, faults)
        weight = dataset.get("loss_weight", 1.0)
        if not _is_number(weight) or weight < 0:
            faults.wrong.append(f"{path}.loss_weight is {shown(repr(weight), 40)}, expected 0 or more")
        elif weight != 1 and not is_class(key):
            faults.refused.append(f"{path}.loss_weight {weight:g} (only class images have a weight)")
            faults.remedies.append(f"remove it, or call the dataset of class images {CLASS_DATASET}")
        for name, source in dataset["source"].items():
            _check_source(f"{path}.source.{shown(name, 60)}", source, faults)
        bucket = dataset.get("bucket", {})
        if isinstance(bucket, Mapping):
            _check_bucket(f"{path}.bucket", bucket, faults)
        else:
            faults.wrong.append(f"{path}.bucket is {shown(repr(bucket), 40)}, expected a table")


def _check_source(path: str, source: Any, faults: Faults) -> None:
    if not isinstance(source, Mapping):
        faults.wrong.append(f"{path} is {shown(repr(source), 40)}, expected a table")
        return
    _check_keys(path, source, SOURCE_KEYS, faults)
    if not isinstance(source.get("img_root"), str):
        faults.wrong.append(f"{path}.img_root is missing, expected a folder")
    for key, (usual, expected, fits) in SOURCE_VALUES.items():
        value = source.get(key, usual)
        if not fits(value):
            faults.wrong.append(f"{path}.{key} is {shown(repr(value), 40)}, expected {expected}")
    if source.get("att_mask") is not None:
        faults.refused.append(f"{path}.att_mask (its greys weigh up to five times; masks here do not)")
        faults.remedies.append("set att_mask to null, and give masks to Load Image Folder")
    _check_words(path, source, faults)
    _check_transforms(path, source, faults)


def _check_words(path: str, source: Mapping[str, Any], faults: Faults) -> None:
    for key, words in words_of(source).items():
        if not isinstance(words, (str, int, float)):
            faults.refused.append(
                f"{path}.word_names.{shown(key, 40)} (a list of positive and negative words)"
            )
            faults.remedies.append("write one word")


def _check_transforms(path: str, source: Mapping[str, Any], faults: Faults) -> None:
    for entry in transforms_of(source):
        kind = kind_of(entry)
        if kind not in TRANSFORMS:
            faults.refused.append(f"{path}.tag_transforms: {shown(kind or entry, 60)}")
            faults.remedies.append(f"use {', '.join(TRANSFORMS)}")
        elif kind == "TagDropout" and not _is_share(entry.get("p", BASE_TAG_DROPOUT)):
            faults.wrong.append(
                f"{path}.tag_transforms: TagDropout p is {shown(repr(entry.get('p')), 40)}, expected 0 to 1"
            )


def _check_bucket(path: str, bucket: Mapping[str, Any], faults: Faults) -> None:
    _check_keys(path, bucket, BUCKET_KEYS, faults)
    kind = bucket_kind(bucket)
    if kind not in BUCKETS:
        faults.refused.append(f"{path}._target_ {shown(kind, 60)}")
        faults.remedies.append(f"use {' or '.join(BUCKETS)}")
    for key in ("target_area", "num_bucket", "step_size"):
        if key in bucket and (type(bucket[key]) is not int or not 1 <= bucket[key] <= 2**26):
            faults.wrong.append(f"{path}.{key} is {shown(repr(bucket[key]), 40)}, expected a whole number")
    size = bucket.get("target_size", 512)
    sides = size if isinstance(size, list) else [size]
    if len(sides) > 2 or not sides or any(type(side) is not int for side in sides):
        faults.wrong.append(f"{path}.target_size is {shown(repr(size), 40)}, expected [width, height]")


def _check_keys(path: str, table: Mapping[str, Any], known: tuple[str, ...], faults: Faults) -> None:
    for key in table:
        if key not in known:
            faults.unknown.append(f"{path}.{shown(key, 60)}")
            faults.guesses += nearest(str(key), known)


def words_of(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands for the names in the template: {name: words}."""
    words = source.get("word_names") or {}
    for entry in transforms_of(source):
        if kind_of(entry) == "TemplateFill" and isinstance(entry.get("word_names"), Mapping):
            words = {**words, **entry["word_names"]}
    return dict(words) if isinstance(words, Mapping) else {}


def transforms_of(source: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the steps that a caption goes through."""
    given = source.get("tag_transforms")
    entries = given.get("transforms") if isinstance(given, Mapping) else given
    return [e for e in entries if isinstance(e, Mapping)] if isinstance(entries, list) else []


def kind_of(entry: Mapping[str, Any]) -> str:
    """Return the last part of a _target_, the class it names."""
    return str(entry.get("_target_", "")).rpartition(".")[2]


def bucket_kind(bucket: Mapping[str, Any]) -> str:
    """Return which of BUCKETS a bucket table means, or the unknown _target_."""
    target = str(bucket.get("_target_", BUCKETS[0]))
    return next((kind for kind in BUCKETS if target == kind or target.endswith(f".{kind}")), target)


def is_class(key: str) -> bool:
    """Say whether a dataset of this name holds class (regularisation) images."""
    return key.startswith(CLASS_DATASET)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1
