"""A tiny random base of every family, opened as a single file's weights are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft_tests.trainer import (
    tiny,
    tiny_dits,
    tiny_flux,
    tiny_qwen,
    tiny_sd2,
    tiny_sd3,
    tiny_sdxl,
    tiny_t5,
)

Weights = dict[str, torch.Tensor]


def _written(write: Callable[..., Path], *more: Any, **options: Any) -> Callable[[Path], Weights]:
    def made(folder: Path) -> Weights:
        return load_file(write(folder / "tiny.safetensors", *more, **options))

    return made


# Family -> its single-file weights, made in a folder.
WEIGHTS: Mapping[str, Callable[[Path], Weights]] = {
    "sd15": _written(tiny.write_checkpoint),
    "sd2": _written(tiny_sd2.write_checkpoint),
    "sdxl": _written(tiny_sdxl.write_checkpoint),
    "sd3": _written(tiny_sd3.write_checkpoint, "sd3"),
    "sd35_large": _written(tiny_sd3.write_checkpoint, "sd35_large"),
    "sd35_medium": _written(tiny_sd3.write_checkpoint, "sd35_medium"),
    "flux": lambda folder: tiny_flux.single_file_weights(),
    "flux_schnell": lambda folder: tiny_flux.single_file_weights(guided=False),
    "chroma": lambda folder: tiny_dits.chroma_weights(),
    "flux2": lambda folder: tiny_dits.klein_weights(),
    "qwen_image": lambda folder: tiny_qwen.qwen_image_file(tiny_qwen.qwen_image_modules()),
    "z_image": lambda folder: tiny_qwen.z_image_file(tiny_qwen.z_image_modules()),
    "lumina2": lambda folder: tiny_dits.lumina_weights(),
}
TOKENIZERS: Mapping[str, Callable[[Path], Path]] = {
    "clip": tiny.write_tokenizer,
    "t5": tiny_t5.write_t5_tokenizer,
    "qwen": tiny_qwen.write_qwen_tokenizer,
    "gemma": tiny_dits.write_gemma_tokenizer,
}


def open_tiny(family: str, folder: Path) -> api.Base:
    """Open a family's tiny base; ``folder`` is for what it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = set(api.FAMILIES[family].encoders.values())
    file = folder / "whole.safetensors"
    save_file({k: v.contiguous() for k, v in WEIGHTS[family](folder).items()}, file)
    found = api.open_base(file, tokenizer=[TOKENIZERS[kind](folder / kind) for kind in sorted(kinds)])
    assert found.family.name == family
    return found
