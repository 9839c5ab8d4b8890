"""``loragraft lora``: what is done with LoRA files after training, one sub-command for each job."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from .. import api
from ..errors import LoraGraftError
from .help_text import Help


def add(commands: Any) -> None:
    """Add the group to the parser."""
    group = commands.add_parser("lora", help="resize, merge, extract, check, describe and convert LoRA files")
    jobs = group.add_subparsers(required=True, metavar="JOB")
    for name, text, arguments, run in JOBS:
        job = jobs.add_parser(name, help=text, formatter_class=Help)
        arguments(job)
        job.set_defaults(run=run)


def _resize_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument("lora", type=Path, help="LoRA file")
    _add_output(job)
    job.add_argument(
        "--new_rank", type=int, required=True, help="the rank, or with a dynamic method the most"
    )
    job.add_argument("--new_conv_rank", type=int, help="the same for convolutions; without it new_rank")
    job.add_argument(
        "--dynamic_method", choices=("sv_ratio", "sv_fro", "sv_cumulative"), help="a rank per module"
    )
    job.add_argument("--dynamic_param", type=float, help="how much is kept, for instance 0.9 of sv_fro")
    job.add_argument("--device", default="cpu", help="where to compute")


def resize(arguments: argparse.Namespace) -> int:
    """Resize a LoRA; returns 0."""
    settings = api.ResizeSettings(
        arguments.new_rank,
        arguments.new_conv_rank,
        arguments.dynamic_method or "fixed",
        arguments.dynamic_param,
    )
    return _told(api.resize_lora(arguments.lora, _output(arguments), settings, device=arguments.device))


def _merge_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument("lora", type=Path, nargs="+", help="two LoRA files or more")
    _add_output(job)
    job.add_argument("--ratios", type=float, nargs="+", help="a ratio for each file; without it 1")
    job.add_argument(
        "--method",
        default="concat",
        choices=("concat", "svd", "add"),
        help="concat: exact, ranks are added; svd: brought to --new_rank; add: kohya's sum of factors",
    )
    job.add_argument("--new_rank", type=int, help="rank of svd")
    job.add_argument("--new_conv_rank", type=int, help="rank of svd for convolutions; without it new_rank")


def merge(arguments: argparse.Namespace) -> int:
    """Merge LoRAs into one; returns 0."""
    settings = api.MergeSettings(arguments.method, arguments.new_rank, arguments.new_conv_rank)
    ratios = arguments.ratios or [1.0] * len(arguments.lora)
    return _told(api.merge_lora(arguments.lora, ratios, _output(arguments), settings))


def _merge_checkpoint_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument("checkpoint", type=Path, help="single-file checkpoint")
    job.add_argument("lora", type=Path, nargs="+", help="LoRA files")
    _add_output(job)
    job.add_argument("--ratios", type=float, nargs="+", help="a ratio for each file; without it 1")
    job.add_argument("--device", default="cpu", help="where to compute")


def merge_checkpoint(arguments: argparse.Namespace) -> int:
    """Merge LoRAs into a checkpoint; returns 0."""
    ratios = arguments.ratios or [1.0] * len(arguments.lora)
    if len(ratios) != len(arguments.lora):
        raise LoraGraftError(
            "LG-TOOL-005",
            "Every LoRA needs its ratio.",
            where="--ratios",
            why=f"there are {len(arguments.lora)} LoRAs and {len(ratios)} ratios.",
            fix="write as many ratios as files",
        )
    pairs = list(zip(arguments.lora, ratios, strict=True))
    output = _output(arguments)
    return _told(api.merge_checkpoint(arguments.checkpoint, pairs, output, device=arguments.device))


def _extract_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument("original", type=Path, help="the checkpoint that was trained from")
    job.add_argument("tuned", type=Path, help="the trained checkpoint")
    _add_output(job)
    job.add_argument("--dim", type=int, default=4, help="rank")
    job.add_argument("--conv_dim", type=int, help="rank of 3x3 convolutions; without it they are left out")
    job.add_argument(
        "--clamp_quantile", type=float, default=0.99, help="larger values are cut off; 1 cuts none"
    )
    job.add_argument(
        "--min_diff", type=float, default=0.01, help="a text encoder that differs less than this is left out"
    )
    job.add_argument("--device", default="cpu", help="where to compute")


def extract(arguments: argparse.Namespace) -> int:
    """Extract a LoRA from two checkpoints; returns 0."""
    settings = api.ExtractSettings(
        arguments.dim, arguments.conv_dim, arguments.clamp_quantile, arguments.min_diff
    )
    output = _output(arguments)
    files = arguments.original, arguments.tuned
    return _told(api.extract_lora_file(*files, output, settings, device=arguments.device))


def _check_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument("lora", type=Path, help="LoRA file")
    job.add_argument("--clip_skip", type=int, help="what it was trained with, if the file does not say")
    job.add_argument("--quiet", action="store_true", help="only the verdict, no line for each tensor")


def check(arguments: argparse.Namespace) -> int:
    """Check a LoRA; returns 0, or 1 where something is wrong with it."""
    found = api.check_lora(arguments.lora, clip_skip=arguments.clip_skip)
    if not arguments.quiet:
        print("tensor,shape,mean(abs),min(abs),norm")
        for row in found.rows:
            print(row)
    for line in (*found.remarks, *(f"zero: {key}" for key in found.zero)):
        print(line)
    return 0 if found.good else 1


def _metadata_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument("lora", type=Path, help="LoRA file")
    job.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=TEXT", help="title=..., trigger_phrase=..., tags=..."
    )
    job.add_argument("--remove", nargs="+", default=[], metavar="KEY", help="keys to remove")
    job.add_argument("--thumbnail", type=Path, help="picture to put into the file, shrunk to 256 px")
    job.add_argument("--output", type=Path, help="where the changed file goes; without it the file itself")
    job.add_argument("--overwrite", action="store_true", help="change the file itself, or replace the output")


def metadata(arguments: argparse.Namespace) -> int:
    """Show a file's metadata, or change it; returns 0."""
    told = api.lora_metadata(arguments.lora)
    if arguments.set or arguments.remove or arguments.thumbnail:
        changes = dict(_key_and_text(entry) for entry in arguments.set)
        picture = Image.open(arguments.thumbnail) if arguments.thumbnail else None
        told = api.edit_metadata(
            arguments.lora,
            changes,
            remove=arguments.remove,
            thumbnail=picture,
            output=arguments.output,
            overwrite=arguments.overwrite,
        )
    for line in api.metadata_lines(told):
        print(line)
    return 0


def _convert_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument("lora", type=Path, help="LoRA file")
    _add_output(job)
    job.add_argument("--to", required=True, choices=api.NAMINGS, help="the naming that readers expect")


def convert(arguments: argparse.Namespace) -> int:
    """Convert a LoRA's naming; returns 0."""
    return _told(api.convert_lora(arguments.lora, _output(arguments), arguments.to))


JOBS = (
    ("resize", "another rank, fixed or by singular values", _resize_arguments, resize),
    ("merge", "several LoRAs into one", _merge_arguments, merge),
    ("merge-checkpoint", "LoRAs into a checkpoint", _merge_checkpoint_arguments, merge_checkpoint),
    ("extract", "the LoRA between two checkpoints", _extract_arguments, extract),
    ("check", "sizes, norms and untrained modules", _check_arguments, check),
    ("metadata", "show or change what a file says of itself", _metadata_arguments, metadata),
    ("convert", "kohya's, diffusers' or ComfyUI's naming", _convert_arguments, convert),
)


def _add_output(job: argparse.ArgumentParser) -> None:
    job.add_argument("--output", type=Path, required=True, help="where the result goes")
    job.add_argument("--save_precision", default="same", choices=api.PRECISIONS, help="number format")
    job.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def _output(arguments: argparse.Namespace) -> api.Output:
    return api.Output(arguments.output, arguments.save_precision, arguments.overwrite)


def _told(written: api.Written) -> int:
    for line in written.lines:
        print(line)
    print(f"Written       {written.path}")
    return 0


def _key_and_text(entry: str) -> tuple[str, str]:
    key, sign, text = entry.partition("=")
    if not sign:
        raise LoraGraftError(
            "LG-TOOL-014",
            f"{entry[:60]!r} sets nothing.",
            where="--set",
            why="an entry is a key, an equals sign and a text.",
            fix='write for instance --set title="My LoRA"',
        )
    return key.strip(), text
