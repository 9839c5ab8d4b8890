"""``loragraft train``: train a LoRA, with a progress line, until it is done or stopped."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from .. import api
from ..config import DatasetConfig, TrainConfig
from ..progress import ProgressLine
from .dataset_build import add_config_source, open_train_set
from .settings import add_base_flags, add_config_flags, open_base, read_settings
from .source import add_source


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
    add_config_flags(command, DatasetConfig, TrainConfig)


def train(arguments: argparse.Namespace) -> int:
    """Train; returns 0 when finished, 130 when stopped by Ctrl-C with the last step saved."""
    data = () if arguments.dataset_config else ("train_data_dir",)
    settings, (base_path, *_) = read_settings(arguments, "pretrained_model_name_or_path", *data)
    _, train_config = api.make_both(settings, where=str(arguments.config or "command line"))
    base = open_base(base_path, arguments)
    train_set = open_train_set(arguments)
    output = Path(arguments.output_dir)
    places = api.Places(output / "runs", output / "loras", output / "cache")
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


class StopFlag:
    """The first Ctrl-C asks for a stop after the running step; the second ends the process at once."""

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> StopFlag:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
