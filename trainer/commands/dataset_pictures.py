"""``loragraft dataset frames`` and ``crop``: videos into pictures, and which part of pictures is trained."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from .. import api
from ..errors import LoraGraftError
from .help_text import default_text
from .source import Counter, add_source, open_dataset


def add_frames(steps: Any) -> None:
    """Add ``dataset frames``."""
    command = steps.add_parser("frames", help="take pictures out of videos")
    command.set_defaults(run=frames)
    command.add_argument("source", help="a video (MP4, MOV, MKV, WebM), or a folder of videos")
    command.add_argument("--out", required=True, help="folder that the pictures are written into")
    command.add_argument("--save", help="dataset file (.json) to write, for the next step")
    command.add_argument("--dry_run", action="store_true", help="say what would be done, and do nothing")
    command.add_argument(
        "--recursive", action=argparse.BooleanOptionalAction, default=True, help="read subfolders too"
    )
    command.add_argument("--class_tokens", default="", help="trigger words where no folder's name has some")
    command.add_argument(
        "--default_repeats", type=int, default=1, help="repeats where no folder's name has some. Default: 1."
    )
    command.add_argument(
        "--on_bad",
        choices=("stop", "skip"),
        default="stop",
        help="unreadable or damaged videos: stop and name all, or go on without them. Default: stop.",
    )
    _add_options(command, api.FrameSettings)


def frames(arguments: argparse.Namespace) -> int:
    """Extract frames and print what became of each video; returns 0."""
    settings = api.FrameSettings(**_options(arguments, api.FrameSettings))
    source = {"recursive": arguments.recursive}
    if arguments.dry_run:
        print("\n".join(api.plan_frames(arguments.source, arguments.out, settings, **source)))
        return 0
    with Counter("thousandths of the videos") as counter:
        dataset = api.extract_frames(
            arguments.source,
            arguments.out,
            settings,
            class_tokens=arguments.class_tokens,
            default_repeats=arguments.default_repeats,
            on_bad=arguments.on_bad,
            progress=counter,
            **source,
        )
    print("\n".join(dataset.lines))
    _save(dataset, arguments.save)
    return 0


def add_crop(steps: Any) -> None:
    """Add ``dataset crop``."""
    command = steps.add_parser("crop", help="choose which part of each picture is trained")
    command.set_defaults(run=crop)
    command.add_argument("source", help="image folder, dataset file (.json), or 'demo'")
    command.add_argument("--out", help="dataset file (.json) to write; without it nothing is written")
    command.add_argument("--originals", help="dataset file for the uncropped originals, as regularisation")
    command.add_argument("--reg_caption", default="", help="caption of the originals, usually the class word")
    command.add_argument("--preview", help="picture file that shows what is cut off, hatched")
    command.add_argument(
        "--boxes", help="JSON file of subjects: {picture name: [{x, y, width, height}, ...]}"
    )
    command.add_argument(
        "--several",
        choices=api.SEVERAL,
        default=api.SEVERAL[0],
        help="several boxes in a picture: all together, or the largest",
    )
    command.add_argument("--upscale_model", help=".safetensors file of an upscale model, for small pictures")
    command.add_argument(
        "--upscale_to", type=int, default=1024, help="side of the area that small pictures are enlarged to"
    )
    command.add_argument("--copy", help="folder that enlarged pictures are written into")
    command.add_argument("--device", default="cpu", help="what the upscale model runs on: cpu, cuda, ...")
    _add_options(command, api.CropSettings)
    add_source(command)


def crop(arguments: argparse.Namespace) -> int:
    """Crop, enlarge what is small where asked to, and print what to look at; returns 0."""
    if bool(arguments.upscale_model) != bool(arguments.copy):
        raise LoraGraftError(
            "LG-DATA-056",
            "Enlarging needs a model and a folder.",
            where="--upscale_model and --copy",
            why="originals are never changed, so that enlarged pictures go into a folder of their own.",
            fix="give both, or none of them",
        )
    settings = api.CropSettings(**_options(arguments, api.CropSettings))
    dataset = open_dataset(arguments.source, arguments)
    subjects = None
    if arguments.boxes:
        subjects = api.subjects_from_file(arguments.boxes, dataset, several=arguments.several)
    elif settings.mode == "subject" and any(record.mask for record in dataset.records):
        subjects = api.own_subjects(dataset)
    cropped = api.crop_dataset(dataset, settings, subjects, reg_caption=arguments.reg_caption)
    result = cropped.dataset
    if arguments.upscale_model:
        upscaler = api.open_upscaler(arguments.upscale_model, arguments.device)
        with Counter("pictures enlarged") as counter:
            result = api.upscale_small(
                result, arguments.copy, upscaler, target=arguments.upscale_to, progress=counter
            )
    print("\n".join(result.lines))
    if arguments.preview:
        sheet = Path(arguments.preview)
        sheet.parent.mkdir(parents=True, exist_ok=True)
        api.crop_preview(cropped.edits).save(sheet)
        print(f"Preview       {sheet}")
    _save(result, arguments.out)
    _save(cropped.originals, arguments.originals)
    return 0


# ---- flags ----


def _add_options(command: argparse.ArgumentParser, settings: type) -> None:
    """Give a command one flag for each setting, with its help and default from the table."""
    group = command.add_argument_group("settings")
    for item in dataclasses.fields(settings):
        info = item.metadata["info"]
        common: dict[str, Any] = {
            "default": None,
            "help": f"{info.help}{default_text(item.default)}".replace("%", "%%"),
        }
        if isinstance(item.default, bool):
            group.add_argument(f"--{item.name}", action=argparse.BooleanOptionalAction, **common)
        else:
            group.add_argument(
                f"--{item.name}", type=type(item.default), choices=info.choices or None, **common
            )


def _options(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    given = {item.name: getattr(arguments, item.name) for item in dataclasses.fields(settings)}
    return {name: value for name, value in given.items() if value is not None}


def _save(dataset: api.Dataset, file: str | None) -> None:
    if file:
        api.save_dataset(dataset, file)
        print(f"Dataset file  {file}")


STEPS = (add_frames, add_crop)
