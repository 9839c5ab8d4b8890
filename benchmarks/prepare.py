"""Write what all trainers read: `python -m benchmarks.prepare FOLDER RESOLUTION IMAGES REPEATS`."""

from __future__ import annotations

import sys
from pathlib import Path

from .common import ROOT, load_by_path, pack


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
