"""``loragraft train``: train a LoRA, or a sweep of them, with a progress line, until done or stopped."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import api
from ..config import DatasetConfig, TrainConfig
from ..progress import ProgressLine
from ..sweep import sweep_runs
from . import sweep
from .dataset_build import add_config_source, open_train_set
from .settings import add_base_flags, add_config_flags, open_base, read_settings
from .source import add_source
from .stop import StopFlag


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "train", help="train a LoRA", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(run=train)
    command.add_argument("--config", help="TOML file of settings; flags win over it")
    command.add_argument("--train_data_dir", help="image folder, dataset file (.json), or 'demo'")
    add_config_source(command)
    add_source(command)
    add_base_flags(command, required=False)
    command.add_argument("--output_dir", default="output", help="where runs/, loras/ and cache/ go")
    command.add_argument("--fresh", action="store_true", help="set an earlier run of the same settings aside")
    sweep.add_flag(command)
    add_config_flags(command, DatasetConfig, TrainConfig)


def train(arguments: argparse.Namespace) -> int:
    """Train; returns 0 when finished, 130 when stopped by Ctrl-C with the last step saved.

    A sweep trains its runs side by side, and returns 1 where one of them failed.
    """
    data = () if arguments.dataset_config else ("train_data_dir",)
    settings, (base_path, *_) = read_settings(arguments, "pretrained_model_name_or_path", *data)
    _, train_config = api.make_both(settings, where=str(arguments.config or "command line"))
    axes = sweep.read(arguments)
    runs = sweep_runs(axes, train_config) if axes else []  # all are checked before anything is opened
    base = open_base(base_path, arguments)
    train_set = open_train_set(arguments)
    output = Path(arguments.output_dir)
    places = api.Places(output / "runs", output / "loras", output / "cache")
    if runs:
        grids = output / "grids" / train_config.output_name
        return sweep.train(
            base, train_set, runs, places, grids, device=arguments.device, fresh=arguments.fresh
        )
    events = api.train(
        base, train_set, train_config, places=places, device=arguments.device, fresh=arguments.fresh
    )
    with StopFlag() as stop, ProgressLine(sys.stderr) as line:
        for event in events:
            line.show(event)
            if stop.wanted:
                events.close()
                print(
                    "Stopped; the last finished step is saved. The same command continues.", file=sys.stderr
                )
                return 130
            if isinstance(event, api.Finished):
                print(f"LoRA          {event.lora_file}")
                print(f"Trigger words {event.trigger_words}")
                print(f"Run folder    {event.run_folder}")
    return 0
