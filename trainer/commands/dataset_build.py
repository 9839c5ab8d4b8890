"""``loragraft dataset report``, ``export``, ``import``: what would be trained; other trainers' files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import api
from ..config import KINDS, DatasetConfig
from ..data.report_html import save_report_html
from ..data.report_images import picture_files
from ..data.report_text import save_report_json
from ..data.tagger_models import read_labels
from ..data.toml_text import save_settings
from ..data.working_copy import Encoding
from ..errors import LoraGraftError
from .help_text import Help
from .settings import add_config_flags, config_flags, read_settings
from .source import Counter, add_source, open_dataset

NUMBERS = {
    "train_batch_size": (1, "images per batch where the dataset says nothing"),
    "gradient_accumulation_steps": (1, "batches per step"),
    "max_train_epochs": (1, "epochs"),
}


def add_report(steps: Any) -> None:
    """Add ``dataset report``."""
    command = _step(steps, "report", "show what would be trained: buckets, captions, steps, and what to mend")
    command.set_defaults(run=report)
    _add_input(command)
    command.add_argument("--kind", choices=KINDS[1:], help="what the LoRA is to learn")
    for name, (default, help_text) in NUMBERS.items():
        command.add_argument(f"--{name}", type=int, help=f"{help_text}; default {default}")
    command.add_argument("--tokenizer", help="folder with vocab.json and merges.txt, to count tokens exactly")
    command.add_argument("--tagger_csv", help="a tagger's selected_tags.csv, to know trigger words it has")
    command.add_argument("--json", help="write the report into this JSON file")
    command.add_argument("--html", help="write the report with pictures into this HTML file")
    command.add_argument("--pictures", help="write the report's pictures into this folder")


def add_export(steps: Any) -> None:
    """Add ``dataset export``."""
    command = _step(steps, "export", "write folders and a dataset.toml for kohya's trainer")
    command.set_defaults(run=export)
    _add_input(command)
    command.add_argument("--out", required=True, help="folder for images/ and dataset.toml")
    command.add_argument("--format", choices=("png", "jpeg", "webp"), default="png")
    command.add_argument("--quality", type=int, default=97, help="of jpeg and webp, 1 to 100")
    command.add_argument("--relative", action="store_true", help="write paths as seen from dataset.toml")


def add_import(steps: Any) -> None:
    """Add ``dataset import``."""
    command = _step(steps, "import", "read a dataset config of kohya or HCP-Diffusion into dataset files")
    command.set_defaults(run=import_config)
    command.add_argument("dataset_config", help="kohya's .toml or .json, or HCP-Diffusion's .yaml")
    _add_reading(command)
    add_config_flags(command, DatasetConfig)
    command.add_argument("--config", help="TOML file of settings for what the dataset config leaves out")
    command.add_argument("--out", required=True, help="dataset file (.json); settings go beside it (.toml)")


def open_train_set(
    arguments: argparse.Namespace, whole_batch: Callable[[int], int] | None = None
) -> api.TrainSet:
    """Freeze what the flags name: --dataset_config, or --train_data_dir with an optional --reg_data_dir.

    ``whole_batch`` turns a batch size of the config into that of all processes that train together.
    Raises LG-CLI-002, LG-DATA-094, and what reading and freezing raise.
    """
    if arguments.dataset_config and (arguments.train_data_dir or arguments.reg_data_dir):
        raise LoraGraftError(
            "LG-DATA-094",
            "--dataset_config and --train_data_dir are given together.",
            where="--dataset_config, --train_data_dir, --reg_data_dir",
            why="the config names its own folders.",
            fix="give one of them",
        )
    if arguments.dataset_config:
        settings, _ = read_settings(arguments)
        blocks = open_blocks(Path(arguments.dataset_config), arguments, settings)
        if whole_batch is not None:
            blocks = [
                replace(block, batch_size=whole_batch(block.batch_size)) if block.batch_size else block
                for block in blocks
            ]
        return api.freeze_blocks(blocks)
    settings, (path,) = read_settings(arguments, "train_data_dir")
    config, _ = api.make_both(settings, where=str(arguments.config or "command line"))
    dataset = open_dataset(path, arguments)
    if arguments.reg_data_dir:
        dataset = api.add_regularisation(dataset, open_dataset(arguments.reg_data_dir, arguments))
    return api.build_train_set(dataset, config)


def open_blocks(file: Path, arguments: argparse.Namespace, settings: dict[str, Any]) -> list[api.Block]:
    """Read a dataset config; ``settings`` serve what it leaves out."""
    flags = config_flags()
    for key in settings:
        if key not in flags:
            api.make_both({key: settings[key]}, where=str(arguments.config))  # refuses it with a suggestion
    data = {key: value for key, value in settings.items() if flags[key][0] is DatasetConfig}
    data |= getattr(arguments, "subset_defaults", {})
    with Counter("folders") as counter:
        return api.read_blocks(
            file,
            base=data,
            overrides=getattr(arguments, "overrides", ()),
            on_bad=getattr(arguments, "on_bad", "stop"),
            missing_captions=arguments.missing_captions,
            progress=counter,
        )


def report(arguments: argparse.Namespace) -> int:
    """Print the report, and write the files that the flags ask for; returns 0."""
    train_set = open_train_set(arguments)
    batch, accumulation, epochs = (getattr(arguments, n) or d for n, (d, _) in NUMBERS.items())
    count = api.token_counter(arguments.tokenizer) if arguments.tokenizer else None
    tags = read_labels(Path(arguments.tagger_csv)).names if arguments.tagger_csv else ()
    known = api.known_word(tags, count)
    view = api.Viewpoint(arguments.kind or "", batch, accumulation, epochs, count, known)
    data = api.report_data(train_set, view)
    print("\n".join(api.report_lines(data)))
    if arguments.json:
        save_report_json(data, Path(arguments.json))
    if arguments.html or arguments.pictures:
        with Counter("pictures") as counter:
            pictures = api.report_pictures(train_set, data, counter)
        if arguments.html:
            save_report_html(data, Path(arguments.html), pictures)
        if arguments.pictures:
            folder = Path(arguments.pictures)
            folder.mkdir(parents=True, exist_ok=True)
            for name, image in picture_files(pictures):
                image.save(folder / name)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write folders and dataset.toml; returns 0."""
    train_set = open_train_set(arguments)
    encoding = Encoding(arguments.format, arguments.quality)
    with Counter("images") as counter:
        done = api.export_kohya(
            train_set, arguments.out, encoding=encoding, relative=arguments.relative, progress=counter
        )
    print("\n".join((*done.lines, f"Config        {done.file}")))
    return 0


def import_config(arguments: argparse.Namespace) -> int:
    """Write a dataset file and a file of settings for each dataset of a config; returns 0."""
    settings, _ = read_settings(arguments)
    blocks = open_blocks(Path(arguments.dataset_config), arguments, settings)
    out = Path(arguments.out)
    for number, block in enumerate(blocks, 1):
        stem = out.stem if len(blocks) == 1 else f"{out.stem}-{number}"
        file = out.with_name(f"{stem}.json")
        api.save_dataset(block.dataset, file)
        save_settings(block.config, block.batch_size, file.with_suffix(".toml"))
        print(
            "\n".join(
                (*block.dataset.lines, f"Dataset       {file}", f"Settings      {file.with_suffix('.toml')}")
            )
        )
    if len(blocks) > 1:
        print(
            f"{len(blocks)} datasets with settings of their own: train them together with --dataset_config "
            f"{arguments.dataset_config}",
            file=sys.stderr,
        )
    return 0


def add_config_source(command: argparse.ArgumentParser) -> None:
    """Give a command the flags of a dataset config and of regularisation images."""
    command.add_argument("--dataset_config", help="dataset config of kohya (.toml) or HCP-Diffusion (.yaml)")
    command.add_argument("--reg_data_dir", help="folder of regularisation images")
    command.add_argument(
        "--missing_captions",
        choices=("stop", "empty"),
        default="stop",
        help="images of a dataset config without any words: stop, or train them so",
    )


def _add_input(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", help="TOML file of settings; flags win over it")
    command.add_argument("--train_data_dir", help="image folder, dataset file (.json), or 'demo'")
    add_config_source(command)
    add_source(command)
    add_config_flags(command, DatasetConfig)


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument("--on_bad", choices=("stop", "skip"), default="stop", help="unreadable images")
    command.add_argument(
        "--missing_captions", choices=("stop", "empty"), default="stop", help="no words at all"
    )


def _step(steps: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = steps.add_parser(name, help=text, formatter_class=Help)
    return command


STEPS = (add_report, add_export, add_import)
