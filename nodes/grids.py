"""Grid files: pictures that no file's name is taken from, and what is in them as JSON. No host needed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .axes import Column, Row, Settings


def to_pil(image: torch.Tensor) -> Image.Image:
    """Turn an image (H, W, 3) in [0, 1] into the picture that ComfyUI's SaveImage would write."""
    return Image.fromarray(np.clip(255.0 * image.numpy(), 0, 255).astype(np.uint8))


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """Turn a picture into a ComfyUI image batch (1, H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255.0)[None]


def report(rows: Sequence[Row], columns: Sequence[Column], settings: Settings) -> dict[str, Any]:
    """Say what every row and column of a grid is."""
    return {
        "rows": [
            {
                "lora": row.weights.path.name if row.weights else None,
                "label": row.label,
                "strength_model": row.strength_model,
                "strength_clip": row.strength_clip,
            }
            for row in rows
        ],
        "columns": [
            {"prompt": c.prompt, "seed": c.seed, "index": b, "without_trigger": c.untriggered}
            for c in columns
            for b in range(settings.batch_size)
        ],
        "settings": dataclasses.asdict(settings),
    }


def png_info(prompt: Any, extra: Mapping[str, Any] | None) -> PngInfo:
    """Return the PNG texts from which ComfyUI opens the workflow again."""
    info = PngInfo()
    if prompt:
        info.add_text("prompt", json.dumps(prompt))
    for key, value in (extra or {}).items():
        info.add_text(key, json.dumps(value))
    return info


def write(
    folder: Path, stem: str, picture: Image.Image, told: dict[str, Any] | None, info: PngInfo | None
) -> Path:
    """Write <stem>_<number>.png, and its .json if ``told`` is given, over no file; return the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / f"{stem}_{number:05d}.png"
        try:
            with path.open("xb") as file:
                picture.save(file, "png", pnginfo=info)
            break
        except FileExistsError:
            number += 1
    if told is not None:
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(told, indent=1, ensure_ascii=False), "utf-8")
        temporary.replace(path.with_suffix(".json"))
    return path
