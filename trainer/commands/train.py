"""``loragraft train``: train a LoRA, or a sweep of them, with a progress line, until done or stopped."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from .. import api
from ..config import DatasetConfig, TrainConfig
from ..engine.distributed import Alone
from ..engine.meetings import Stopped
from ..errors import LoraGraftError
from ..progress import ProgressLine
from ..sweep import sweep_runs
from . import foreign, processes, sweep
from .dataset_build import add_config_source, open_train_set
from .help_text import NO_WORDS, Help
from .settings import add_base_flags, add_config_flags, open_base, read_settings, settings_text
from .source import add_source
from .stop import StopFlag

OUTPUT_DIR = "output"
USAGE = "loragraft train [--config FILE] [--pretrained_model_name_or_path BASE] [--train_data_dir FOLDER] ..."


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("train", help="train a LoRA", usage=USAGE, formatter_class=Help)
    command.set_defaults(run=train)
    command.add_argument("--config", help="TOML file of settings; flags win over it")
    foreign.add_flags(command)
    command.add_argument("--train_data_dir", help="image folder, dataset file (.json), or 'demo'")
    add_config_source(command)
    add_source(command)
    add_base_flags(command, required=False)
    command.add_argument("--output_dir", help=f"where runs/, loras/ and cache/ go; else '{OUTPUT_DIR}'")
    command.add_argument("--fresh", action="store_true", help="set an earlier run of the same settings aside")
    sweep.add_flag(command)
    processes.add_flag(command)
    add_config_flags(command, DatasetConfig, TrainConfig)


def train(arguments: argparse.Namespace) -> int:
    """Train; returns 0 when finished, 130 when stopped by Ctrl-C with the last step saved.

    A sweep trains its runs side by side, and returns 1 where one of them failed. Of several processes that
    train together, all return the same, and one prints.
    """
    world = processes.join(arguments.device)
    try:
        with world:
            return _train(arguments, world)
    except Stopped:
        return _stopped(world)
    except LoraGraftError:
        if world.writes or not world.is_told:
            raise
        return 1


def _train(arguments: argparse.Namespace, world: Alone) -> int:
    foreign.apply(arguments, quiet=not world.writes)
    where = str(arguments.config or arguments.config_file or "command line")
    if arguments.print_settings:
        return _print_settings(arguments, where, world)
    data = () if arguments.dataset_config else ("train_data_dir",)
    settings, (base_path, *_) = read_settings(arguments, "pretrained_model_name_or_path", *data)
    _, train_config = api.make_both(settings, where=where)
    axes = sweep.read(arguments)
    runs = sweep_runs(axes, train_config) if axes else []  # all are checked before anything is opened
    if axes:
        processes.refuse_sweep(world)
    size = processes.whole_batch(world, train_config.train_batch_size, arguments.split_batches)
    train_config = dataclasses.replace(train_config, train_batch_size=size)
    base = open_base(base_path, arguments)
    train_set = open_train_set(arguments, lambda n: processes.whole_batch(world, n, arguments.split_batches))
    output = Path(arguments.output_dir or OUTPUT_DIR)
    places = api.Places(output / "runs", output / "loras", output / "cache")
    if runs:
        grids = output / "grids" / train_config.output_name
        return sweep.train(
            base, train_set, runs, places, grids, device=arguments.device, fresh=arguments.fresh
        )
    device = processes.device_of(world, arguments.device)
    events = api.train(
        base, train_set, train_config, places=places, device=device, fresh=arguments.fresh, world=world
    )
    return _follow(events, world)


def _print_settings(arguments: argparse.Namespace, where: str, world: Alone) -> int:
    if world.writes:
        print(settings_text(*api.make_both(read_settings(arguments)[0], where=where)))
    return 0


def _follow(events: Generator[api.Event, None, None], world: Alone) -> int:
    """Show a run's events until it ends or is stopped; return the exit code."""
    with StopFlag(launched=world.size > 1) as stop, ProgressLine(sys.stderr) as line:
        for said in processes.launcher_lines(os.environ) if world.writes else ():
            line.show(api.Note(said))
        for event in events:
            if world.writes:
                line.show(event)
            if stop.wanted:
                events.close()
                world.stop()
                return _stopped(world)
            if isinstance(event, api.Finished):
                _print_products(event)
    return 0


def _print_products(end: api.Finished) -> None:
    print(f"LoRA          {end.lora_file}")
    if end.model_file is not None:
        print(f"Checkpoint    {end.model_file}")
    print(f"Trigger words {end.trigger_words or NO_WORDS}")
    print(f"Run folder    {end.run_folder}")


def _stopped(world: Alone) -> int:
    if world.writes:
        print("Stopped; the last finished step is saved. The same command continues.", file=sys.stderr)
    return 130
