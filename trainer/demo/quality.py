"""Measure the demo base: is what it draws what was asked for, and does the checker see right?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image

from .checker import read_scene
from .creatures import HERO_SEED, OTHER_SEEDS, creature, draw_creature, random_pose
from .draw import (
    BIG_SIZES_PX,
    SIZES_PX,
    Scene,
    all_combos,
    draw_scene,
    random_scene,
    sentence_caption,
    tag_caption,
)
from .latents import decode, encode
from .recogniser import is_creature
from .sample import sample
from .train_unet import TextToLatent
from .train_vae import to_images, to_pixels

PROMPTS = 224
SAMPLE_STEPS = 20
CFG = 4.0
BATCH = 32


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """List scenes that go round all held-out combinations in turn; the rest is drawn from the seed."""
    rng = np.random.default_rng([seed, 9])
    combos = all_combos(held_out=True)
    return [random_scene(rng, combos=[combos[i % len(combos)]]) for i in range(count)]


def grid(images: Sequence[Image.Image], columns: int, cell_px: int = 68) -> Image.Image:
    """Lay images out in rows on grey."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell_px, rows * cell_px), (128, 128, 128))
    for index, image in enumerate(images):
        sheet.paste(image, ((index % columns) * cell_px + 2, (index // columns) * cell_px + 2))
    return sheet


def measure_base(
    model: TextToLatent, vae: AutoencoderKL, seed: int, count: int = PROMPTS, sheet: Path | None = None
) -> dict[str, Any]:
    """Sample held-out prompts, tags and sentences by turns, and give the shares that are right."""
    scenes = held_out_scenes(count, seed)
    prompts = [
        tag_caption(s) if i // 56 % 2 == 0 else sentence_caption(s, i % 2) for i, s in enumerate(scenes)
    ]
    images: list[Image.Image] = []
    for start in range(0, count, BATCH):
        part = prompts[start : start + BATCH]
        images += sample(
            model, vae, part, [seed + start + i for i in range(len(part))], (64, 64), SAMPLE_STEPS, CFG
        )
    if sheet:
        grid(images, 28).save(sheet)
    hits = np.array([read_scene(image).agrees(scene) for image, scene in zip(images, scenes, strict=True)])
    small = np.array([scene.size == "small" for scene in scenes])
    tags = np.array([i // 56 % 2 == 0 for i in range(count)])
    right = np.logical_and(hits[:, 0], hits[:, 1])

    def share(values: np.ndarray) -> float:
        return round(float(values.mean()), 4)

    return {
        "prompts": count,
        "steps": SAMPLE_STEPS,
        "cfg": CFG,
        "right_shape": share(hits[:, 0]),
        "right_colors": share(hits[:, 1]),
        "right_all": share(right),
        "right_all_tags": share(right[tags]),
        "right_all_sentences": share(right[~tags]),
        "right_shape_small": share(hits[small, 0]),
        "right_shape_large": share(hits[~small, 0]),
    }


def measure_checkers(vae: AutoencoderKL, seed: int, count: int = 200) -> dict[str, float]:
    """Give the checker's and the recogniser's accuracy on drawings, and on their VAE reconstructions."""
    device = next(vae.parameters()).device
    rng = np.random.default_rng([seed, 10])
    sizes = (*SIZES_PX, *BIG_SIZES_PX)
    scenes = [random_scene(rng, sizes[rng.integers(len(sizes))]) for _ in range(count)]
    who = [HERO_SEED, *OTHER_SEEDS]
    seeds = [HERO_SEED if i % 2 else who[1 + i // 2 % 10] for i in range(count)]
    poses = [random_pose(rng, SIZES_PX[i % len(SIZES_PX)]) for i in range(count)]
    creatures = [draw_creature(creature(s), p) for s, p in zip(seeds, poses, strict=True)]

    def through_vae(image: Image.Image) -> Image.Image:
        return to_images(decode(vae, encode(vae, to_pixels([image]).to(device))))[0]

    def read(images: list[Image.Image]) -> float:
        return float(np.mean([all(read_scene(i).agrees(s)) for i, s in zip(images, scenes, strict=True)]))

    def told(images: list[Image.Image]) -> float:
        hits = [is_creature(i, HERO_SEED) == (s == HERO_SEED) for i, s in zip(images, seeds, strict=True)]
        return float(np.mean(hits))

    drawn = [draw_scene(scene) for scene in scenes]
    return {
        "checker_on_drawn": round(read(drawn), 4),
        "checker_on_reconstructed": round(read([through_vae(i) for i in drawn]), 4),
        "recogniser_on_drawn": round(told(creatures), 4),
        "recogniser_on_reconstructed": round(told([through_vae(i) for i in creatures]), 4),
    }
