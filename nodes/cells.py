"""Draw a grid's cells row by row with ComfyUI's sampler, showing progress and minding Cancel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import host
from . import host_sampling as sampling
from .axes import Column, Row, Settings


def draw_rows(
    model: Any, clip: Any, vae: Any, rows: Sequence[Row], columns: Sequence[Column], settings: Settings
) -> Iterator[list[torch.Tensor]]:
    """Yield every row's images (H, W, 3) in [0, 1] on the CPU; raises the host's interrupt on Cancel."""
    shared = dataclasses.asdict(settings)
    negative_text = shared.pop("negative")
    total = len(rows) * len(columns) * settings.steps
    progress, done = host.Progress(total), 0
    lora: tuple[Path | None, Any] = (None, None)
    for row in rows:
        row_model, row_clip = model, clip
        if row.weights is not None:
            path = row.weights.path
            if lora[0] != path:
                lora = path, sampling.read_lora(path)
            strengths = row.strength_model, row.strength_clip
            row_model, row_clip = sampling.apply_lora(model, clip, lora[1], *strengths, path.name)
        conds = {p: sampling.encode_text(row_clip, p) for p in dict.fromkeys(c.prompt for c in columns)}
        negative = sampling.encode_text(row_clip, negative_text)
        latents = []
        for column in columns:
            host.check_interrupt()
            on_step = partial(progress.add_preview, done, total)
            latents.append(
                sampling.draw(row_model, conds[column.prompt], negative, column.seed, on_step, **shared)
            )
            done += settings.steps
        yield [image for z in latents for image in sampling.decode(vae, z).cpu()]
