"""``loragraft dataset scan | convert | duplicates | orphans``: from a folder of files to clean records."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import api
from .source import Counter, add_source, open_dataset

SOURCE_HELP = "image folder, dataset file (.json), or 'demo'"


def add_scan(steps: Any) -> None:
    """Add ``scan``."""
    command = steps.add_parser("scan", help="read a folder: what is there, and what is wrong with it")
    command.set_defaults(run=scan)
    command.add_argument("source", help=SOURCE_HELP)
    command.add_argument("--out", help="dataset file (.json) to write, for further steps")
    add_source(command)


def scan(arguments: argparse.Namespace) -> int:
    """Print what a folder holds; returns 0."""
    dataset = open_dataset(arguments.source, arguments)
    print("\n".join(dataset.lines))
    save(dataset, arguments.out)
    return 0


def add_convert(steps: Any) -> None:
    """Add ``convert``."""
    command = steps.add_parser("convert", help="write all pictures in one format, numbered if wanted")
    command.set_defaults(run=convert)
    command.add_argument("source", help=SOURCE_HELP)
    command.add_argument("--out", required=True, help="folder of the copy; originals are never changed")
    command.add_argument("--format", choices=("png", "jpeg", "webp"), default="png")
    command.add_argument(
        "--quality", type=int, default=0, help="1 to 100; 0 takes 97 for jpeg and lossless webp"
    )
    command.add_argument(
        "--names", choices=("keep", "number"), default="keep", help="number: 0001, 0002, ... in each folder"
    )
    command.add_argument("--prefix", default="", help="what stands before the numbers")
    add_source(command)


def convert(arguments: argparse.Namespace) -> int:
    """Write the copy and its dataset file beside it; returns 0."""
    dataset = open_dataset(arguments.source, arguments)
    with Counter("pictures") as counter:
        copy = api.convert(
            dataset,
            arguments.out,
            format=arguments.format,
            quality=arguments.quality,
            names=arguments.names,
            prefix=arguments.prefix,
            progress=counter,
        )
    print("\n".join(copy.dataset.lines))
    folder = Path(arguments.out)
    save(copy.dataset, str(folder.with_name(f"{folder.name}.json")))
    return 0


def add_duplicates(steps: Any) -> None:
    """Add ``duplicates``."""
    command = steps.add_parser("duplicates", help="list pictures that occur more than once")
    command.set_defaults(run=duplicates)
    command.add_argument("source", help=SOURCE_HELP)
    command.add_argument("--exact_only", action="store_true", help="only equal files and equal pixels")
    command.add_argument(
        "--distance", type=int, default=4, help="bits of 64 that near duplicates may differ in"
    )
    command.add_argument("--out", help="dataset file (.json) to write, with the best of each group only")
    add_source(command)


def duplicates(arguments: argparse.Namespace) -> int:
    """Print the groups; no file is deleted. Returns 0."""
    dataset = open_dataset(arguments.source, arguments)
    with Counter("pictures") as counter:
        groups = api.find_duplicates(
            dataset, near=not arguments.exact_only, distance=arguments.distance, progress=counter
        )
    print("\n".join(api.duplicate_lines(groups)))
    if arguments.out:
        save(api.without_duplicates(dataset, groups)[0], arguments.out)
    return 0


def add_orphans(steps: Any) -> None:
    """Add ``orphans``."""
    command = steps.add_parser("orphans", help="list caption files whose image is gone")
    command.set_defaults(run=orphans)
    command.add_argument("folder", help="image folder")
    command.add_argument("--delete", action="store_true", help="delete the listed files")
    command.add_argument("--recursive", action=argparse.BooleanOptionalAction, default=True)


def orphans(arguments: argparse.Namespace) -> int:
    """List the orphans, and delete them only if asked to; returns 1 where one could not be deleted."""
    found = api.find_orphans(arguments.folder, recursive=arguments.recursive)
    for file in found:
        print(file.name)
    if not found:
        print("No caption file without an image.")
    elif not arguments.delete:
        print(f"{len(found)} files; nothing was deleted. Add --delete to delete them.")
    else:
        failed = api.remove_orphans(found)
        print(f"{len(found) - len(failed)} of {len(found)} files deleted.")
        for name in failed:
            print(f"Not deleted: {name}", file=sys.stderr)
        return 1 if failed else 0
    return 0


def save(dataset: api.Dataset, file: str | None) -> None:
    """Write the dataset file where one is named, and say so."""
    if file:
        api.save_dataset(dataset, file)
        print(f"Dataset file  {file}")


STEPS = (add_scan, add_convert, add_duplicates, add_orphans)
