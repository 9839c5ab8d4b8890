"""Write the sample dataset: images of one creature with captions, in kohya's folder layout."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from .creatures import HERO_SEED, creature, creature_caption, draw_creature, random_pose
from .draw import COLORS

# (height, width, file type): mixed sizes and aspect ratios, all three common formats.
FILES: tuple[tuple[int, int, str], ...] = (
    (64, 64, "png"),
    (96, 96, "jpg"),
    (128, 128, "webp"),
    (80, 64, "png"),
    (96, 72, "jpg"),
    (72, 96, "webp"),
    (128, 96, "png"),
    (96, 128, "jpg"),
    (112, 112, "webp"),
    (64, 80, "png"),
    (128, 80, "jpg"),
    (80, 128, "webp"),
    (96, 96, "png"),
    (80, 80, "jpg"),
    (128, 128, "webp"),
    (112, 80, "png"),
)
REPEATS = 4


def write_dataset(root: Path, seed: int = HERO_SEED) -> Path:
    """Write images and captions of a creature into `root`/4_<name> and give that folder."""
    who = creature(seed)
    folder = root / f"{REPEATS}_{who.name}"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 77])
    order = [*rng.permutation(len(COLORS)), *rng.permutation(len(COLORS))]
    for index, (height, width, kind) in enumerate(FILES):
        pose = random_pose(rng, (height, width), COLORS[order[index]])
        path = folder / f"{who.name}_{index + 1:02}.{kind}"
        image = draw_creature(who, pose)
        if kind == "png":
            image.save(path, optimize=True)
        else:
            image.save(path, quality=92)
        path.with_suffix(".txt").write_text(creature_caption(who, pose) + "\n", "utf-8")
    return folder


def main() -> None:
    """Write the dataset of one creature seed into a folder."""
    parser = argparse.ArgumentParser(
        prog="make_dataset", description="Draw a sample dataset.", allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=HERO_SEED)
    args = parser.parse_args()
    write_dataset(args.out, args.seed)


if __name__ == "__main__":
    main()
