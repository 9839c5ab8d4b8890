"""Write what all trainers read: `python -m benchmarks.prepare FOLDER RESOLUTION IMAGES REPEATS`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .common import NUM_IMAGES, REPEATS, ROOT, load_by_path, pack


@dataclass(frozen=True)
class Prepared:
    """The files that every trainer reads."""

    checkpoint: Path
    images: Path
    tokenizer: Path


def prepare(folder: Path, resolution: int, shared: Path) -> Prepared:
    """Write them in a process of its own, so that this one stays small.

    The checkpoint is kept in LORAGRAFT_SCRATCH, else in ``shared``, and written once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = map(str, (resolution, NUM_IMAGES, REPEATS))
    argv = [sys.executable, "-m", "benchmarks.prepare", str(folder), *sizes]
    env = {"LORAGRAFT_SCRATCH": str(shared), **os.environ}
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=env)
    return Prepared(*map(Path, done.stdout.splitlines()[-3:]))


def main() -> None:
    """Write the random checkpoint and noise images with captions; print their paths and the tokenizer."""
    folder, (resolution, count, repeats) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    import numpy as np
    from PIL import Image

    pack()
    from loragraft.trainer import api

    full_size = load_by_path("full_size", ROOT / "tests" / "full" / "full_size.py")
    checkpoint = full_size.write_checkpoint(full_size.scratch(folder))
    images = folder / "images"
    inside = images / f"{repeats}_zibu"
    inside.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = rng.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
        Image.fromarray(noise).save(inside / f"image{i}.png")
        caption = f"zibu, a photo of a small red house number {i}, sky, morning light"
        (inside / f"image{i}.txt").write_text(caption, encoding="utf-8")
    print(checkpoint, images, Path(api.find_tokenizer(None)), sep="\n")


if __name__ == "__main__":
    main()
