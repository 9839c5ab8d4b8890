"""What contradicts itself in how a record becomes a sample."""

from __future__ import annotations

from ..config import DatasetConfig, resolution_wh
from ..errors import LoraGraftError
from .refusals import bad_value


def check(config: DatasetConfig, where: str) -> None:
    """Raise LG-CFG-003 to -006 for the first fault."""
    _check_resolution(config, where)
    _check_dataset(config, where)


def _check_dataset(config: DatasetConfig, where: str) -> None:
    if config.num_bucket and (config.bucket_no_upscale or not config.enable_bucket):
        other = "bucket_no_upscale" if config.bucket_no_upscale else "enable_bucket = false"
        raise LoraGraftError(
            "LG-CFG-004",
            f"num_bucket is given together with {other}.",
            where=where,
            why="num_bucket makes buckets of one area from the images' aspect ratios.",
            fix=f"set num_bucket to 0, or take {other} back",
        )
    if config.caption_template and not config.caption_template.strip():
        raise bad_value(
            "caption_template", config.caption_template, "empty or text with {caption} in it", where
        )


def _check_resolution(config: DatasetConfig, where: str) -> None:
    width, height = resolution_wh(config)
    step = config.bucket_reso_steps
    if step % 8:
        raise bad_value(
            "bucket_reso_steps", step, "a multiple of 8 (one latent pixel is 8 image pixels)", where
        )
    for side in (width, height):
        if side % step:
            near = max(step, round(side / step) * step)
            raise LoraGraftError(
                "LG-CFG-005",
                f"resolution {width}x{height} is not a multiple of {step}.",
                where=f"{where}: resolution",
                why=f"the base model works on whole blocks; bucket_reso_steps is {step}.",
                fix=f"use {near} instead of {side}, or another bucket_reso_steps",
            )
    if (
        config.enable_bucket
        and not config.min_bucket_reso <= min(width, height) <= max(width, height) <= config.max_bucket_reso
    ):
        raise LoraGraftError(
            "LG-CFG-006",
            f"resolution {width}x{height} lies outside the bucket limits "
            f"{config.min_bucket_reso} to {config.max_bucket_reso}.",
            where=f"{where}: min_bucket_reso, max_bucket_reso",
            why="no bucket of the wanted area could exist.",
            fix=f"for instance {min(width, height) // 2} and {max(width, height) * 2}",
        )
