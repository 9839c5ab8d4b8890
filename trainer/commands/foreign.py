"""What a run starts from besides its own settings: another trainer's config, or a preset.

Both lie below --config and the flags. What an import says (filled in, without meaning here) is printed
before anything is opened.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import api
from ..errors import LoraGraftError
from .settings import PLACES, take_files

YAML = (".yaml", ".yml")
# Places of an import that are flags of their own here, with the flag's name.
FLAGS = {
    **{name: name for name in PLACES},
    "reg_data_dir": "reg_data_dir",
    "dataset_config": "dataset_config",
    "output_dir": "output_dir",
}


def add_flags(command: argparse.ArgumentParser) -> None:
    """Give a command --config_file, the changes of an HCP-Diffusion file, --recipe and --print_settings."""
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="changes of an HCP-Diffusion config, such as train.train_epochs=10",
    )
    command.add_argument(
        "--config_file",
        metavar="FILE",
        help="config of another trainer, unchanged: kohya's or lora-scripts' .toml, the .json of kohya_ss' "
        "GUI, kohya's command line as text (.txt, .sh, .bat, .ps1), HCP-Diffusion's .yaml",
    )
    command.add_argument(
        "--recipe",
        nargs="+",
        metavar="NAME",
        choices=list(api.presets()),
        help="preset of starting values from the guides: one for what is learnt, one for the network and "
        f"one for the memory, of {', '.join(api.presets())}",
    )
    command.add_argument(
        "--print_settings", action="store_true", help="print the settings that a run would have, and stop"
    )


def apply(arguments: argparse.Namespace, *, quiet: bool = False) -> None:
    """Put an import's or a preset's settings below the flags, and its places where no flag names one.

    Prints every note unless ``quiet``. Raises LG-CLI-004 for two starting points, and LG-IMP and LG-CFG
    errors of an import.
    """
    _check_together(arguments)
    start: dict[str, Any] = {}
    notes: list[str] = []
    if arguments.config_file:
        start, notes = _apply_import(arguments)
    elif arguments.recipe:
        chosen = api.preset(arguments.recipe)
        start = dict(chosen.settings)
        notes = [f"{name} {value} ({chosen.sources[name]})" for name, value in chosen.settings.items()]
        if chosen.relative_time != 1:
            notes.append(f"A step takes about {chosen.relative_time:g} times as long as plain LoRA's.")
    arguments.start = start
    for note in () if quiet else notes:
        print(f"Config        {note}", file=sys.stderr)


def _apply_import(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    file = Path(arguments.config_file)
    imported = api.read_foreign(file, overrides=arguments.overrides)
    named_data = arguments.train_data_dir or arguments.dataset_config
    for place, flag in FLAGS.items():
        # Data that a flag names takes the place of all that the config names.
        hidden = named_data and flag in ("train_data_dir", "dataset_config")
        if place in imported.places and getattr(arguments, flag) is None and not hidden:
            setattr(arguments, flag, imported.places[place])
    take_files(dict(imported.places), arguments)
    if arguments.dataset_config:
        arguments.subset_defaults = _subset_defaults(imported.reading)
    else:
        for option, value in imported.reading.items():
            if not hasattr(arguments, option):
                setattr(arguments, option, value)
    settings = dict(imported.settings)
    if "sample_prompts" in imported.places:
        settings["sample_prompts"] = list(api.read_prompts(Path(imported.places["sample_prompts"])))
    return settings, list(imported.notes)


def _subset_defaults(reading: dict[str, Any]) -> dict[str, Any]:
    """Return what a scan's options mean for the folders of a dataset config that say nothing themselves."""
    defaults: dict[str, Any] = {}
    if "captions" in reading:
        defaults["caption_extension"] = f".{reading['captions'][0]}"
    if reading.get("masks") == "alpha":
        defaults["alpha_mask"] = True
    return defaults


def _check_together(arguments: argparse.Namespace) -> None:
    for other in ("recipe", "config"):
        if arguments.config_file and getattr(arguments, other):
            raise LoraGraftError(
                "LG-CLI-004",
                f"--config_file and --{other} are given together.",
                where=f"--config_file, --{other}",
                why="a config of another trainer says everything, its trainer's defaults included.",
                fix=f"leave --{other} out, and change single settings with flags",
            )
    if arguments.overrides and not str(arguments.config_file or "").casefold().endswith(YAML):
        raise LoraGraftError(
            "LG-CLI-004",
            "KEY=VALUE is given without an HCP-Diffusion config.",
            where=" ".join(arguments.overrides),
            why="it changes a value of such a file.",
            fix="add --config_file FILE.yaml, or write --KEY VALUE",
        )
