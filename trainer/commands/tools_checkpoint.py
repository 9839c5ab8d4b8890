"""``loragraft convert-checkpoint``: a diffusers folder to a single file, and a single file to a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import api
from .help_text import Help


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "convert-checkpoint",
        help="a diffusers folder to a single file, or a file of SD1.x, SD2.x or SDXL to a folder",
        formatter_class=Help,
    )
    command.set_defaults(run=convert_checkpoint)
    command.add_argument("model", type=Path, help="a diffusers folder, or a single .safetensors file")
    command.add_argument("--output", type=Path, required=True, help="the file, or the folder, to write")
    command.add_argument("--vae", type=Path, help="another VAE's file, to replace the model's")
    command.add_argument("--tokenizer", type=Path, help="tokenizer folder to copy into a diffusers folder")
    command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def convert_checkpoint(arguments: argparse.Namespace) -> int:
    """Convert in the direction that the model's form tells; returns 0."""
    lines = api.convert_checkpoint(
        arguments.model,
        arguments.output,
        vae=arguments.vae,
        tokenizer=arguments.tokenizer,
        overwrite=arguments.overwrite,
    )
    for line in lines:
        print(line)
    print(f"Written       {arguments.output}")
    return 0
