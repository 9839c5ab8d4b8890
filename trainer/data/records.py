"""Scan a folder into records: which images there are, what each is called, and how often it counts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import LoraGraftError, listed
from .caption_files import CaptionFileError, CaptionText, pair_captions, read_caption
from .folders import MAX_REPEATS, Found, Walk, folder_rule, resolve_root, walk
from .images import ImageFacts, UnreadableImageError, inspect, is_image, shown
from .report import counted, scan_caption_lines, scan_image_lines, scan_left_out_lines

# A file of such a name is meant to be an image: if it cannot be read, the user must hear of it.
IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".tga"),
)
ON_BAD = ("stop", "skip")


@dataclass(frozen=True)
class Record:
    """One image: where it lies and what belongs to it, never its pixels.

    ``name`` is the posix path relative to the dataset's root, the only path that may reach metadata;
    ``size`` is (height, width) of what training sees: after EXIF orientation and ``crop``, which is
    (left, top, right, bottom) in upright pixels. ``concept`` is the folder's class words; ``content_hash``
    is the sha256 of the file's bytes. ``mask`` says where to learn (white: fully); it is ``path`` itself
    where the picture's alpha channel does. Transparent parts lie on ``background``. ``overrides`` are the
    DatasetConfig settings in which the record's subset differs from its train set.
    """

    path: Path
    name: str
    size: tuple[int, int]
    caption: str
    concept: str
    repeats: int
    content_hash: str
    mask: Path | None = None
    mask_hash: str = ""
    crop: tuple[int, int, int, int] | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    is_reg: bool = False
    caption_source: str = ""
    overrides: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Dataset:
    """The records of one folder in natural order, and what the scan has to say."""

    root: Path
    records: tuple[Record, ...]
    lines: tuple[str, ...]


def scan_folder(
    root: Path | str,
    *,
    recursive: bool = True,
    class_tokens: str = "",
    default_repeats: int = 1,
    caption_extensions: Sequence[str] = (".txt", ".caption"),
    on_bad: str = "stop",
) -> Dataset:
    """Read a folder of images and captions.

    Folders called ``<repeats>_<class words>`` say how often their images count and what stands in for
    a missing caption; ``class_tokens`` and ``default_repeats`` serve where no folder says so. Every
    image is decoded once; ``on_bad`` "stop" raises LG-DATA-003 with all that fail, "skip" leaves them out.
    Raises LG-DATA-001 to LG-DATA-008.
    """
    _check_arguments(default_repeats, caption_extensions, on_bad)
    folder, root_name = resolve_root(root)
    found = walk(folder, recursive=recursive)
    texts = {f.name: f.path for f in found.files if f.name.casefold().endswith(tuple(caption_extensions))}
    images, others, bad = _sort_out(f for f in found.files if f.name not in texts)
    rules = {f.name: _rule(f, root_name, class_tokens, default_repeats) for f in images}
    _check_repeats(rules)
    dropped = [f for f in images if rules[f.name][0] < 1]
    images = [f for f in images if rules[f.name][0] >= 1]
    if not images and not bad and not found.bad:
        raise _no_images(folder, found, dropped, texts)

    facts, undecodable = _inspect_all(images)
    bad |= undecodable | found.bad
    if bad and on_bad == "stop":
        raise _unreadable(bad, len(images) + len(bad) - len(undecodable))
    usable = [f for f in images if f.name in facts]
    if not usable:
        raise _unreadable(bad, len(bad))

    names = [f.name for f in images + dropped] + list(bad)
    pairs, orphans = pair_captions(names, texts, tuple(caption_extensions))
    captions = _read_captions({name for f in usable for name in pairs[f.name]}, texts)
    _check_captions(usable, pairs, texts, rules)
    records = tuple(
        Record(
            path=f.path,
            name=f.name,
            size=facts[f.name].size,
            caption=captions[pairs[f.name][0]].text if pairs[f.name] else rules[f.name][1],
            concept=rules[f.name][1],
            repeats=rules[f.name][0],
            content_hash=facts[f.name].content_hash,
        )
        for f in usable
    )
    lines = [
        *scan_image_lines(records, root_name, facts),
        *scan_caption_lines(records, pairs, captions, orphans),
        *scan_left_out_lines(bad, dropped, found, others),
    ]
    return Dataset(folder, records, tuple(lines))


# ---- what is what ----


def _sort_out(files: Iterable[Found]) -> tuple[list[Found], list[str], dict[str, str]]:
    """Split files into images (by content, or by a name that promises one), others and unreadable ones."""
    images, others, bad = [], [], {}
    for file in files:
        try:
            if PurePosixPath(file.name).suffix.casefold() in IMAGE_SUFFIXES or is_image(file.path):
                images.append(file)
            else:
                others.append(file.name)
        except UnreadableImageError as error:
            bad[file.name] = str(error)
    return images, others, bad


def _rule(file: Found, root_name: str, class_tokens: str, default_repeats: int) -> tuple[int, str]:
    repeats, words = folder_rule(file.name, root_name)
    return default_repeats if repeats is None else repeats, words or class_tokens.strip()


def _inspect_all(images: Sequence[Found]) -> tuple[dict[str, ImageFacts], dict[str, str]]:
    """Decode every image, a few at a time: decoders run outside Python's lock."""
    facts: dict[str, ImageFacts] = {}
    bad: dict[str, str] = {}
    pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
    try:
        for file, result in zip(images, pool.map(_inspected, images), strict=True):
            if isinstance(result, ImageFacts):
                facts[file.name] = result
            else:
                bad[file.name] = result
    finally:
        pool.shutdown(cancel_futures=True)
    return facts, bad


def _inspected(file: Found) -> ImageFacts | str:
    try:
        return inspect(file.path)
    except UnreadableImageError as error:
        return str(error)


# ---- captions ----


def _read_captions(names: Iterable[str], texts: Mapping[str, Path]) -> dict[str, CaptionText]:
    captions: dict[str, CaptionText] = {}
    unreadable: dict[str, str] = {}
    for name in sorted(names):
        try:
            captions[name] = read_caption(texts[name])
        except CaptionFileError as error:
            unreadable[name] = str(error)
    if unreadable:
        raise LoraGraftError(
            "LG-DATA-004",
            f"{counted(len(unreadable), 'caption file')} cannot be read as UTF-8 text.",
            where=listed(f"{shown(name)} ({reason})" for name, reason in unreadable.items()),
            why="guessing the encoding could train wrong words without anybody noticing.",
            fix="open the file in a text editor and save it with the encoding UTF-8",
        )
    empty = [name for name, caption in captions.items() if not caption.num_lines]
    if empty:
        raise LoraGraftError(
            "LG-DATA-005",
            f"{counted(len(empty), 'empty caption file')}.",
            where=listed(shown(name) for name in empty),
            why="an empty caption teaches the image without words, which is rarely meant.",
            fix="write a caption into each, or delete the files so that the folder's class words are used",
        )
    return captions


def _check_captions(
    usable: Sequence[Found],
    pairs: Mapping[str, list[str]],
    texts: Mapping[str, Path],
    rules: Mapping[str, tuple[int, str]],
) -> None:
    if texts and not any(pairs[f.name] for f in usable):
        raise LoraGraftError(
            "LG-DATA-007",
            f"None of {counted(len(texts), 'caption file')} belongs to an image.",
            where=listed(shown(name) for name in sorted(texts)),
            why="a caption file lies beside its image and has its name: photo.txt or photo.png.txt.",
            fix="rename the caption files after their images, or move them out of the folder",
        )
    without = [f.name for f in usable if not pairs[f.name] and not rules[f.name][1]]
    if without:
        raise LoraGraftError(
            "LG-DATA-006",
            f"{len(without)} of {counted(len(usable), 'image')} without a caption.",
            where=listed(shown(name) for name in without),
            why="there is neither a caption file nor a folder name with class words to take instead.",
            fix="add photo.txt beside photo.png, name the folder like '10_my cat', or fill in class_tokens",
        )


# ---- refusals ----


def _check_arguments(default_repeats: int, caption_extensions: Sequence[str], on_bad: str) -> None:
    if on_bad not in ON_BAD:
        raise _bad_argument("on_bad", on_bad, "'stop' or 'skip'")
    if not 1 <= default_repeats <= MAX_REPEATS:
        raise _bad_argument("default_repeats", default_repeats, f"1 to {MAX_REPEATS}")
    for extension in caption_extensions:
        if (
            isinstance(caption_extensions, str)
            or not extension.startswith(".")
            or extension in IMAGE_SUFFIXES
        ):
            raise _bad_argument(
                "caption_extensions", caption_extensions, "suffixes such as ['.txt', '.caption']"
            )


def _bad_argument(name: str, value: object, expected: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-CFG-003",
        f"Setting '{name}' is {shown(repr(value), 40)}, expected {expected}.",
        where=name,
        why="the folder would be read in another way than you asked for.",
        fix=f"set {name} to {expected}",
    )


def _check_repeats(rules: Mapping[str, tuple[int, str]]) -> None:
    huge = {name: repeats for name, (repeats, _) in rules.items() if repeats > MAX_REPEATS}
    if huge:
        name, repeats = next(iter(huge.items()))
        raise LoraGraftError(
            "LG-DATA-008",
            f"A folder name asks for {repeats} repeats; at most {MAX_REPEATS} are possible.",
            where=shown(str(PurePosixPath(name).parent)),
            why="a number and '_' in front of a folder's name say how often its images count.",
            fix="put the wanted repeats in front, for instance '10_my cat', or no _ there",
        )


def _no_images(
    folder: Path, found: Walk, dropped: Sequence[Found], texts: Mapping[str, Path]
) -> LoraGraftError:
    why, fix = (
        "no file in it is a PNG, JPEG, WebP, BMP, TIFF, GIF or AVIF image.",
        "give the folder that holds the images",
    )
    if dropped:
        why = f"{counted(len(dropped), 'image')} in it, but the folder's name asks for 0 repeats."
        fix = "write a number above 0 in front of the folder's name"
    elif deeper := next((sub for sub in found.unread_folders if _holds_image(sub)), None):
        why = "only folders inside it hold images, and 'recursive' is off."
        fix = f"switch 'recursive' on, or give {shown(deeper)}"
    elif found.links or found.linked_folders:
        why = "all that it holds are links, and links that lead out of a dataset's folder are not followed."
        fix = "give the folder that the links lead to, or copy the images"
    elif texts:
        why = f"it holds {counted(len(texts), 'caption file')}, but no image."
    return LoraGraftError(
        "LG-DATA-002", "There are no images in the folder.", where=shown(folder), why=why, fix=fix
    )


def _holds_image(folder: Path) -> bool:
    files = walk(folder, recursive=True).files
    return any(PurePosixPath(f.name).suffix.casefold() in IMAGE_SUFFIXES for f in files)


def _unreadable(bad: Mapping[str, str], total: int) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-003",
        f"{len(bad)} of {counted(total, 'image')} cannot be read.",
        where=listed(f"{shown(name)} ({reason})" for name, reason in sorted(bad.items())),
        why="training on them would stop the run at a random later step.",
        fix="delete or replace them, or set on_bad to 'skip'",
    )
