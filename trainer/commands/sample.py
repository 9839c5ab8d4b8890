"""``loragraft sample``: images from any checkpoint with LoRAs, embeddings, emphasis and any sampler."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from .. import api
from ..errors import LoraGraftError
from .help_text import Help
from .settings import add_base_flags, open_base


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "sample",
        help="draw images with LoRAs, embeddings and prompt weights",
        formatter_class=Help,
    )
    command.set_defaults(run=sample)
    add_base_flags(command, required=True)
    command.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        help="words, (words:1.2), {a|b} for each of both, <lora:name:0.8>",
    )
    command.add_argument("--negative", default="", help="negative prompt")
    command.add_argument("--seeds", nargs="+", type=int, default=[1])
    command.add_argument(
        "--lora", nargs="+", default=[], metavar="FILE[:STRENGTH]", help="LoRAs of all images"
    )
    command.add_argument("--lora_dir", type=Path, help="folder of the LoRAs that prompts name")
    command.add_argument(
        "--embeddings", nargs="+", type=Path, default=[], help="textual inversions, used by name"
    )
    usual = "without it, what is usual for the base"
    command.add_argument("--sampler", choices=sorted(api.SAMPLERS), help=usual)
    command.add_argument("--schedule", choices=["own", *sorted(api.SCHEDULES)], help=usual)
    command.add_argument("--width", type=int, help=usual)
    command.add_argument("--height", type=int, help="without it, the width's, or what is usual for the base")
    command.add_argument("--steps", type=int, help=usual)
    command.add_argument("--cfg", type=float, help=f"guidance away from the negative prompt; {usual}")
    command.add_argument(
        "--guidance", type=float, help=f"distilled guidance of models that are told it (Flux.1 dev); {usual}"
    )
    command.add_argument("--clip_skip", type=int, default=1)
    command.add_argument(
        "--v_parameterization", action="store_true", help="the base predicts v and not noise"
    )
    command.add_argument("--batch", type=int, default=4, help="images drawn at once")
    command.add_argument("--output", type=Path, default=Path("output/samples"), help="folder of the images")


def sample(arguments: argparse.Namespace) -> int:
    """Draw the images into numbered files and a grid; returns 0."""
    base = open_base(arguments.pretrained_model_name_or_path, arguments)
    settings = api.SampleSettings(
        size=_size(arguments.height, arguments.width),
        steps=arguments.steps,
        cfg=arguments.cfg,
        guidance=arguments.guidance,
        sampler=arguments.sampler,
        schedule=arguments.schedule,
        negative=arguments.negative,
        clip_skip=arguments.clip_skip,
        velocity=arguments.v_parameterization,
        batch=arguments.batch,
    )
    prompts = [p for prompt in arguments.prompts for p in api.expand_wildcards(prompt)]
    drawn = api.draw_images(
        base,
        prompts,
        arguments.seeds,
        settings,
        loras=[file_and_strength(text) for text in arguments.lora],
        lora_folder=arguments.lora_dir,
        embeddings=arguments.embeddings,
        device=arguments.device,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[list[Any]] = []
    for number, drawing in enumerate(drawn):
        path = _save(drawing, arguments.output)
        print(f"{path.name}: {drawing.prompt!r}, seed {drawing.seed}", file=sys.stderr)
        if number % len(arguments.seeds) == 0:
            rows.append([])
        rows[-1].append(drawing.image)
    sheet = api.grid(rows, prompts, [f"seed {seed}" for seed in arguments.seeds], title=drawing.drawn_with)
    grid = _free(arguments.output, "grid")
    sheet.save(grid)
    print(f"Images        {arguments.output}\nGrid          {grid}")
    return 0


def _size(height: int | None, width: int | None) -> tuple[int, int] | None:
    """Return height and width; one alone is that of a square, and None where neither is given."""
    one = height or width
    return None if one is None else (height or one, width or one)


def file_and_strength(text: str) -> tuple[Path, float]:
    """Read "file.safetensors:0.8"; without a number the strength is 1. Raises LG-TOOL-016."""
    name, sign, number = text.rpartition(":")
    if not sign or number.endswith(".safetensors"):  # no colon, or a drive's
        return Path(text), 1.0
    try:
        return Path(name), float(number)
    except ValueError:
        raise LoraGraftError(
            "LG-TOOL-016",
            f"{text[:60]!r} is no LoRA with a strength.",
            where="--lora",
            why=f"{number[:20]!r} is no number.",
            fix="write file.safetensors or file.safetensors:0.8",
        ) from None


def _save(drawing: api.Drawing, folder: Path) -> Path:
    """Write an image over no other, with what it was drawn with in it."""
    path = _free(folder, f"seed{drawing.seed}")
    info = PngInfo()
    info.add_text("parameters", drawing.parameters)
    drawing.image.save(path, pnginfo=info)
    return path


def _free(folder: Path, stem: str) -> Path:
    number = 1
    while (path := folder / f"{stem}_{number:05d}.png").exists():
        number += 1
    return path
