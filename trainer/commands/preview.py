"""``loragraft preview``: prompts x seeds x strengths x LoRA files as one labelled picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import api
from .help_text import Help
from .settings import add_base_flags, open_base


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "preview",
        help="draw prompts with a LoRA at several strengths",
        formatter_class=Help,
    )
    command.set_defaults(run=preview)
    add_base_flags(command, required=True)
    command.add_argument(
        "--lora", nargs="+", required=True, help="LoRA files, for instance a run's checkpoints"
    )
    command.add_argument("--prompts", nargs="+", required=True, help="{a|b} draws with each of both")
    command.add_argument("--trigger_words", default="", help="prompts with them are drawn without them too")
    command.add_argument("--negative", default="", help="negative prompt")
    command.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    command.add_argument(
        "--strengths", default="0, 0.7-1 [2]", help="numbers and ranges; 0 is without the LoRA"
    )
    command.add_argument("--width", type=int, default=512)
    command.add_argument("--height", type=int, default=512)
    command.add_argument("--steps", type=int, help="without it, what is usual for the base")
    command.add_argument("--cfg", type=float, help="guidance; without it, what is usual for the base")
    command.add_argument("--clip_skip", type=int, default=1)
    command.add_argument("--output", default="output/grid.png", help="where the grid goes")


def preview(arguments: argparse.Namespace) -> int:
    """Draw the grid into one picture file; returns 0."""
    base = open_base(arguments.pretrained_model_name_or_path, arguments)
    strengths = api.parse_range(arguments.strengths)
    files = [Path(f) for f in arguments.lora]
    size = api.DrawSettings(
        (arguments.height, arguments.width),
        arguments.steps,
        arguments.cfg,
        arguments.clip_skip,
        arguments.negative,
    )
    drawn = api.draw(
        base,
        files,
        prompts=_prompts(arguments.prompts, arguments.trigger_words),
        seeds=arguments.seeds,
        strengths=strengths,
        settings=size,
        device=arguments.device,
    )
    rows: dict[tuple[str, int], list[Any]] = {}
    for cell in drawn:
        rows.setdefault((cell.prompt, cell.seed), []).append(cell.image)
        print(f"{cell.lora} at {cell.strength:g}: {cell.prompt!r}, seed {cell.seed}", file=sys.stderr)
    columns = [f"{f.stem} {s:g}" if len(files) > 1 else f"{s:g}" for f in files for s in strengths]
    sheet = api.grid(
        list(rows.values()), [f"{p} ({s})" for p, s in rows], columns, title=", ".join(arguments.lora)
    )
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)
    print(f"Grid          {output}")
    return 0


def _prompts(texts: Sequence[str], trigger: str) -> list[str]:
    """Return every combination of the prompts' choices, and each without its trigger words as well."""
    every = [prompt for text in texts for prompt in api.expand_wildcards(text)]
    return list(dict.fromkeys(p for prompt in every for p in (prompt, api.without_words(prompt, trigger))))
