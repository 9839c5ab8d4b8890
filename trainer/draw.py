"""Draw with LoRA files on an opened base, without a host: for `loragraft preview` and the demo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .adapters.attach import attach
from .adapters.files import PREDICTION, TERMINAL, VELOCITY, read_metadata, read_tensors
from .adapters.network import remove, set_strength
from .engine.precision import pick_device, place, resolve
from .families.base import Reading
from .families.drawing import Guided, sample
from .families.opening import Base


@dataclass(frozen=True)
class Settings:
    """How to draw; ``size`` is (height, width) in pixels. Steps and cfg None: what is usual for the base."""

    size: tuple[int, int] = (512, 512)
    steps: int | None = None
    cfg: float | None = None
    clip_skip: int = 1
    negative: str = ""
    mixed_precision: str = "auto"
    batch: int = 8


@dataclass(frozen=True)
class Drawn:
    """One image and what it was drawn from; ``lora`` is the file's name without suffix."""

    lora: str
    strength: float
    prompt: str
    seed: int
    image: Image.Image


def draw(
    base: Base,
    lora_files: Sequence[Path],
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    strengths: Sequence[float],
    settings: Settings,
    device: torch.device | str | None = None,
) -> Iterator[Drawn]:
    """Yield an image for every file, strength, prompt and seed, in this order."""
    precision = resolve(settings.mixed_precision, pick_device(device))
    parts = base.load()
    place(parts, precision, owned=base.owned, text_at_every_step=False)
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    for file in lora_files:
        targets = base.family.targets(parts, convolutions=True, preset="everything")
        adapter, texts = attach(parts, read_tensors(file), targets), read_metadata(file)
        for strength in strengths:
            set_strength(adapter, strength)
            for start in range(0, len(wanted), settings.batch):
                batch = wanted[start : start + settings.batch]
                images = sample(
                    base.family,
                    parts,
                    [prompt for prompt, _ in batch],
                    seeds=[seed for _, seed in batch],
                    size=settings.size,
                    steps=settings.steps or base.family.look.steps,
                    guided=Guided(
                        settings.negative,
                        base.family.look.cfg if settings.cfg is None else settings.cfg,
                        velocity=bool(base.velocity) or texts.get(PREDICTION) == VELOCITY,
                        zero_terminal_snr=bool(base.zero_terminal) or texts.get(TERMINAL) == "True",
                    ),
                    reading=Reading(clip_skip=settings.clip_skip),
                )
                for (prompt, seed), image in zip(batch, images, strict=True):
                    yield Drawn(file.stem, strength, prompt, seed, image)
        remove(parts, adapter)
