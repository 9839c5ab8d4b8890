"""``loragraft train --sweep``: several LoRAs side by side, and one grid that compares them."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from PIL import Image

from .. import api
from ..config import TrainConfig, resolution_wh
from ..errors import LoraGraftError
from ..metadata import trigger_words
from ..progress import SweepLine
from ..safefile import write_atomically
from ..sample_prompts import parse_prompt
from ..sweep import Axis, SweepRun, read_sweep, sweep_from_table
from .help_text import NO_WORDS
from .settings import SWEEP, read_config_file
from .stop import StopFlag

WITHOUT = "without LoRA"


def add_flag(command: argparse.ArgumentParser) -> None:
    """Give the command --sweep."""
    command.add_argument(
        "--sweep",
        action="extend",
        nargs="+",
        metavar="LINE",
        help="train a LoRA with each of these values, all at once, and draw a grid of them: "
        "'learning_rate: 1e-4, 3e-4'. Of several lines ('seed: 1, 2' 'network_dim: 8, 32') every value is "
        "tried with every other; settings joined by / change together: "
        "'network_dim: 8, 32 / network_alpha: 4, 16'",
    )


def read(arguments: argparse.Namespace) -> tuple[Axis, ...]:
    """Return the sweep of --sweep, else of the config file's [sweep] table; () where there is none."""
    if arguments.sweep:
        return read_sweep("\n".join(arguments.sweep), where="--sweep")
    table = read_config_file(arguments).get(SWEEP)
    if table is None:
        return ()
    if not isinstance(table, dict):
        raise LoraGraftError(
            "LG-SWEEP-001",
            "The sweep cannot be read.",
            where=f"{arguments.config}: {SWEEP}",
            why="it is a table of settings and their values.",
            fix="write [sweep] on a line, and learning_rate = [1e-4, 3e-4] below it",
        )
    return sweep_from_table(table, where=f"{arguments.config}: [{SWEEP}]")


def train(
    base: api.Base,
    train_set: api.TrainSet,
    runs: Sequence[SweepRun],
    places: api.Places,
    grids: Path,
    *,
    device: str | None,
    fresh: bool,
) -> int:
    """Train all runs and draw their grid; returns 0, 1 if a run failed, 130 when stopped with all saved.

    ``grids`` is the beginning of the grid's path; a short hash of what it shows comes behind it.
    """
    jobs = [(train_set, run.config) for run in runs]
    ends: dict[int, api.Finished | api.Failed] = {}
    events = api.train_together(base, jobs, places=places, device=device, fresh=fresh)
    names = [run.config.output_name for run in runs]
    with closing(events), StopFlag() as stop, SweepLine(sys.stderr, names) as line:
        for number, event in events:
            line.show(number, event)
            if isinstance(event, (api.Finished, api.Failed)):
                ends[number] = event
            if stop.wanted:
                events.close()
                said = "Stopped; all runs are saved. The same command continues."
                print(said, file=sys.stderr)
                return 130
    files = {n: end.lora_file for n, end in sorted(ends.items()) if isinstance(end, api.Finished)}
    for file in files.values():
        print(f"LoRA          {file}")
    if files:
        words = trigger_words(train_set, runs[next(iter(files))].config)
        print(f"Trigger words {words or NO_WORDS}")
        rows = [(runs[number], file) for number, file in files.items()]
        print(f"Grid          {draw_grid(base, train_set, rows, grids, device=device)}")
    failed = {n: end.error for n, end in sorted(ends.items()) if isinstance(end, api.Failed)}
    for number, error in failed.items():
        print(f"Failed        {names[number]}: {error.code}  {error.what}")
    return 1 if failed else 0


def draw_grid(
    base: api.Base,
    train_set: api.TrainSet,
    rows: Sequence[tuple[SweepRun, Path]],
    start: Path,
    *,
    device: str | None,
) -> Path:
    """Draw a row for each file at strength 1 below one without LoRA; return the picture.

    Its columns are the first run's sample prompts, or the first caption. A grid that is there is not
    drawn again: its name holds a hash of all it shows.
    """
    config = rows[0][0].config
    prompts = [parse_prompt(line).prompt for line in config.sample_prompts] or [train_set.records[0].caption]
    hashes = [api.lora_metadata(file)["sshs_model_hash"] for _, file in rows]
    labels = [run.label for run, _ in rows]
    settings = {run.config.clip_skip: draw_settings(train_set, run.config) for run, _ in rows}
    shown = repr([base.weights_hash, hashes, labels, prompts, config.seed, sorted(settings.items())])
    path = start.with_name(f"{start.name}-{hashlib.sha256(shown.encode()).hexdigest()[:8]}.png")
    if path.is_file():
        return path
    drawn: dict[str, list[Image.Image]] = {}
    for clip_skip, how in settings.items():
        files = [file for run, file in rows if run.config.clip_skip == clip_skip]
        ways = [(files, [1.0])] if drawn else [(files[:1], [0.0]), (files, [1.0])]
        for some, strengths in ways:
            for cell in api.draw(
                base,
                some,
                prompts=prompts,
                seeds=[config.seed],
                strengths=strengths,
                settings=how,
                device=device,
            ):
                drawn.setdefault(cell.lora if cell.strength else WITHOUT, []).append(cell.image)
    pictures = [drawn[WITHOUT], *(drawn[file.stem] for _, file in rows)]
    columns = [f"{prompt} ({config.seed})" for prompt in prompts]
    sheet = api.grid(pictures, [WITHOUT, *labels], columns, title=start.name)
    write_atomically(path, lambda target: sheet.save(target, "png"))
    return path


def draw_settings(train_set: api.TrainSet, config: TrainConfig) -> api.DrawSettings:
    """Return how a run's samples are drawn."""
    width, height = resolution_wh(train_set.config)
    return api.DrawSettings(
        (height, width),
        config.sample_steps,
        config.sample_cfg,
        config.clip_skip,
        mixed_precision=config.mixed_precision,
    )
