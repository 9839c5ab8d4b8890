"""Scan a folder into records: which images there are, what each is called, and how often it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import LoraGraftError, listed
from .checking import Progress, Seen, check_images
from .folders import MAX_REPEATS, Found, Walk, by_name, folder_rule, resolve_root, suffix_of, walk
from .images import ImageFacts, UnreadableImageError, is_image, shown
from .masks import pair_masks, split_masks
from .records import Dataset, Record
from .report import counted
from .scan_captions import JSON_SUFFIX, CaptionFinder
from .scan_lines import LeftOut, caption_lines, image_lines, left_out_lines, mask_lines, names_of
from .scan_options import IMAGE_SUFFIXES, JSON, SIDECAR, ScanOptions, scan_options


def scan_folder(
    root: Path | str, *, seen: Seen | None = None, progress: Progress | None = None, **options: Any
) -> Dataset:
    """Read a folder of images, captions and masks; ``options`` are the fields of `ScanOptions`.

    Folders called ``<repeats>_<class words>`` say how often their images count and what stands in for
    a missing caption; ``class_tokens`` and ``default_repeats`` serve where no folder says so. Every
    image is decoded once, except those whose very state ``seen`` knows; ``on_bad`` "stop" raises
    LG-DATA-003 with all that fail, "skip" leaves them out. ``progress`` is called as (done, total).
    Raises LG-DATA-001 to LG-DATA-008 and LG-DATA-024 to LG-DATA-026.
    """
    return _Scan(root, scan_options(**options), seen, progress).run()


def complete(
    dataset: Dataset,
    *,
    on_bad: str = "stop",
    max_pixels: int = ScanOptions().max_pixels,
    seen: Seen | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Dataset:
    """Hash and decode what a scan with check="header" only glanced at; other records stay as they are.

    Raises LG-DATA-003 for unreadable images (left out where ``on_bad`` is "skip"), and LG-DATA-026 for masks.
    """
    todo = [record for record in dataset.records if not record.content_hash]
    masks = [r.mask for r in todo if r.mask is not None and r.mask != r.path]
    paths = [*(record.path for record in todo), *masks]
    results = check_images(paths, max_pixels=max_pixels, seen=seen, progress=progress, workers=workers)
    looked = dict(zip(paths, results, strict=True))
    bad = {r.name: reason for r in todo if isinstance(reason := looked[r.path], str)}
    if bad and (on_bad == "stop" or len(bad) == len(dataset.records)):
        raise _unreadable(bad, len(dataset.records))
    _refuse_bad_masks({str(m): reason for m in masks if isinstance(reason := looked[m], str)})
    records = [_completed(record, looked) for record in dataset.records if record.name not in bad]
    lines = left_out_lines(LeftOut(bad=bad), Walk())
    return dataset.replaced(records, f"Hashed and decoded: {counted(len(todo), 'image')}.", *lines)


def _completed(record: Record, looked: Mapping[Path, ImageFacts | str]) -> Record:
    facts = looked.get(record.path)
    if record.content_hash or not isinstance(facts, ImageFacts):
        return record
    mask = looked[record.mask] if record.mask else None
    return dataclasses.replace(
        record,
        size=facts.size if record.crop is None else record.size,
        content_hash=facts.content_hash,
        mask_hash=mask.content_hash if isinstance(mask, ImageFacts) else "",
    )


class _Scan:
    """One scan of one folder; each method is one stage of it."""

    def __init__(
        self, root: Path | str, options: ScanOptions, seen: Seen | None, progress: Progress | None
    ) -> None:
        self._options, self._seen, self._progress = options, seen, progress
        self._folder, self._root_name = resolve_root(root)
        self._found = walk(self._folder, recursive=options.recursive, in_order=False)
        json = (JSON_SUFFIX,) if {JSON, SIDECAR} & set(options.captions) else ()
        self._caption_suffixes = (*options.caption_suffixes, *json)
        self._left = LeftOut()
        self._facts: dict[str, ImageFacts] = {}

    def run(self) -> Dataset:
        """Return the dataset."""
        options, left, found = self._options, self._left, self._found
        files, masks = self._masks_apart()
        texts = {file.name: file.place for file in files if self._may_be_caption(file.name)}
        images, left.others, left.bad = _sort_out(file for file in files if file.name not in texts)
        images.sort(key=by_name)  # captions, most of the other files, need no order
        self._rules = {file.name: self._rule(file.name) for file in images}
        _check_repeats(self._rules)
        dropped = [file for file in images if self._rules[file.name][0] < 1]
        left.zero_repeats = names_of(dropped)
        images = [file for file in images if self._rules[file.name][0] >= 1]
        if not images and not left.bad and not found.bad:
            raise self._no_images(dropped, texts)

        pairs, unused = pair_masks(names_of(images), masks) if masks else ({}, [])
        usable = self._check(images, pairs)
        every = [*names_of([*images, *dropped]), *left.bad]
        words = {name: self._words(name) for name in every}
        captions = CaptionFinder(texts, options).find(names_of(usable), every, words)
        left.others += captions.others
        records = tuple(
            self._record(file, pairs.get(file.name), *captions.found[file.name]) for file in usable
        )
        self._check_reg(records)
        lines = [
            *image_lines(records, self._root_name, self._facts, options),
            *caption_lines(records, captions, options),
            *mask_lines(records, names_of(unused), options),
            *left_out_lines(left, found),
        ]
        return Dataset(self._folder, records, tuple(lines))

    # ---- stages ----

    def _may_be_caption(self, name: str) -> bool:
        return name.casefold().endswith(self._caption_suffixes)

    def _masks_apart(self) -> tuple[list[Found], list[Found]]:
        """Return the files outside the folder of masks, and the masks; raises LG-DATA-025."""
        files = self._found.files
        if self._options.masks != "folder":
            return files, []
        folder = self._options.mask_folder
        if folder and not Path(folder).is_absolute():
            files, inside = split_masks(files, PurePosixPath(folder).as_posix())
        else:
            inside = walk(resolve_root(folder)[0], recursive=True).files
        masks = sorted((f for f in inside if suffix_of(f.name) in IMAGE_SUFFIXES), key=by_name)
        if not masks:
            raise _no_masks(folder, "it holds no images, or does not exist.")
        return files, masks

    def _rule(self, name: str) -> tuple[int, str]:
        repeats, words = folder_rule(name, self._root_name)
        default = self._options.default_repeats
        return default if repeats is None else repeats, words or self._options.class_tokens.strip()

    def _words(self, name: str) -> str:
        return self._rules[name][1] if name in self._rules else self._rule(name)[1]

    def _check(self, images: Sequence[Found], masks: Mapping[str, Found]) -> list[Found]:
        """Look at every image and mask; return the usable images. Raises LG-DATA-003, -025 and -026."""
        options, left = self._options, self._left
        wanted = [*images, *masks.values()]
        results = check_images(
            [file.place for file in wanted],
            header_only=options.check == "header",
            max_pixels=options.max_pixels,
            seen=self._seen,
            progress=self._progress,
        )
        bad = {}
        for file, result in zip(images, results[: len(images)], strict=True):
            if isinstance(result, str):
                bad[file.name] = result
            else:
                self._facts[file.name] = result
        bad_masks = {}
        self._mask_hashes: dict[str, str] = {}
        for mask, result in zip(masks.values(), results[len(images) :], strict=True):
            if isinstance(result, str):
                bad_masks[mask.name] = result
            else:
                self._mask_hashes[mask.name] = result.content_hash
        all_bad = left.bad | bad | self._found.bad
        if all_bad and options.on_bad == "stop":
            raise _unreadable(all_bad, len(images) + len(all_bad) - len(bad))
        left.bad = all_bad
        _refuse_bad_masks(bad_masks)
        usable = [file for file in images if file.name in self._facts]
        if options.animated == "leave out":
            left.animated = [file.name for file in usable if self._facts[file.name].is_animated]
            usable = [file for file in usable if not self._facts[file.name].is_animated]
        if not usable and left.animated:
            raise self._no_images([], {})
        if not usable:
            raise _unreadable(left.bad, len(left.bad))
        if options.masks == "folder" and not any(file.name in masks for file in usable):
            raise _no_masks(options.mask_folder, "none of its masks has the name of an image.")
        return usable

    def _record(self, file: Found, mask: Found | None, caption: str, source: str) -> Record:
        repeats, words = self._rules[file.name]
        facts = self._facts[file.name]
        mask_path, mask_hash = (mask.path, self._mask_hashes[mask.name]) if mask else (None, "")
        if self._options.masks == "alpha" and facts.has_alpha:
            mask_path, mask_hash = file.path, facts.content_hash
        return Record(
            path=file.path,
            name=file.name,
            size=facts.size,
            caption=caption,
            concept=words,
            repeats=repeats,
            content_hash=facts.content_hash,
            mask=mask_path,
            mask_hash=mask_hash,
            background=self._options.background,
            is_reg=self._options.is_reg or self._in_reg_folder(file.name),
            caption_source=source,
        )

    def _in_reg_folder(self, name: str) -> bool:
        wanted = self._options.reg_folder.strip("/").casefold()
        return bool(wanted) and wanted in name.casefold().split("/")[:-1]

    # ---- refusals ----

    def _check_reg(self, records: Sequence[Record]) -> None:
        reg_folder = self._options.reg_folder.strip("/")
        if reg_folder and not self._options.is_reg and not any(record.is_reg for record in records):
            raise LoraGraftError(
                "LG-DATA-027",
                f"There are no regularisation images in a subfolder {shown(reg_folder, 40)!r}.",
                where="reg_folder",
                why="training would go without them, or take them for images of the subject.",
                fix="write the name of a subfolder, or leave reg_folder empty",
            )

    def _no_images(self, dropped: Sequence[Found], texts: Mapping[str, str | Path]) -> LoraGraftError:
        found = self._found
        why, fix = (
            "no file in it is a PNG, JPEG, WebP, BMP, TIFF, GIF, AVIF or HEIC image.",
            "give the folder that holds the images",
        )
        if dropped:
            why = f"{counted(len(dropped), 'image')} in it, but the folder's name asks for 0 repeats."
            fix = "write a number above 0 in front of the folder's name"
        elif self._left.animated:
            why = f"{counted(len(self._left.animated), 'image')} in it, all animated and left out."
            fix = "set animated to 'first frame', or extract their frames"
        elif deeper := next((sub for sub in found.unread_folders if _holds_image(sub)), None):
            why = "only folders inside it hold images, and 'recursive' is off."
            fix = f"switch 'recursive' on, or give {shown(deeper)}"
        elif found.links or found.linked_folders:
            why = (
                "all that it holds are links, and links that lead out of a dataset's folder are not followed."
            )
            fix = "give the folder that the links lead to, or copy the images"
        elif texts:
            why = f"it holds {counted(len(texts), 'caption file')}, but no image."
        return LoraGraftError(
            "LG-DATA-002",
            "There are no images in the folder.",
            where=shown(self._folder),
            why=why,
            fix=fix,
        )


def _sort_out(files: Iterable[Found]) -> tuple[list[Found], list[str], dict[str, str]]:
    """Split files into images (by content, or by a name that promises one), others and unreadable ones."""
    images, others, bad = [], [], {}
    for file in files:
        try:
            if suffix_of(file.name) in IMAGE_SUFFIXES or is_image(file.place):
                images.append(file)
            else:
                others.append(file.name)
        except UnreadableImageError as error:
            bad[file.name] = str(error)
    return images, others, bad


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


def _holds_image(folder: Path) -> bool:
    files = walk(folder, recursive=True).files
    return any(suffix_of(f.name) in IMAGE_SUFFIXES for f in files)


def _unreadable(bad: Mapping[str, str], total: int) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-003",
        f"{len(bad)} of {counted(total, 'image')} cannot be read.",
        where=_reasons(bad),
        why="training on them would stop the run at a random later step.",
        fix="delete or replace them, or set on_bad to 'skip'",
    )


def _refuse_bad_masks(bad: Mapping[str, str]) -> None:
    if bad:
        raise LoraGraftError(
            "LG-DATA-026",
            f"{counted(len(bad), 'mask')} cannot be read.",
            where=_reasons(bad),
            why="without its mask an image would be learned everywhere.",
            fix="replace or delete these masks",
        )


def _no_masks(folder: str, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-025",
        "There are no masks for these images.",
        where=f"mask_folder: {shown(folder or '(empty)')}",
        why=why,
        fix="give a folder with one picture for each image, of the same name, or set masks to 'none'",
    )


def _reasons(bad: Mapping[str, str]) -> str:
    return listed(f"{shown(name)} ({reason})" for name, reason in sorted(bad.items()))
