"""Write what all trainers read.

`python -m benchmarks.prepare FOLDER RESOLUTION IMAGES REPEATS ARCHITECTURE`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .architectures import ARCHITECTURES
from .cases import TRAINED, Case
from .common import NUM_IMAGES, REPEATS, ROOT, Work, load_by_path, pack


@dataclass(frozen=True)
class Prepared:
    """The files that every trainer reads; see `Work`."""

    checkpoint: Path
    images: Path
    tokenizer: Path
    files: dict[str, str] = field(default_factory=dict)
    tokenizers: dict[str, str] = field(default_factory=dict)


def prepare(folder: Path, resolution: int, shared: Path, architecture: str = "sd15") -> Prepared:
    """Write them in a process of its own, so that this one stays small.

    The weights are kept in LORAGRAFT_SCRATCH, else in ``shared``, and written once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = map(str, (resolution, NUM_IMAGES, REPEATS, architecture))
    argv = [sys.executable, "-m", "benchmarks.prepare", str(folder), *given]
    env = {"LORAGRAFT_SCRATCH": str(shared), **os.environ}
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=env)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    checkpoint, images, tokenizer = (Path(found[name]) for name in ("checkpoint", "images", "tokenizer"))
    return Prepared(checkpoint, images, tokenizer, found["files"], found["tokenizers"])


def settings_for(trainer: str, settings: dict[str, Any], case: Case) -> dict[str, Any]:
    """Return a trainer's settings; those that are to take the least memory differ by architecture."""
    return {**settings, **ARCHITECTURES[case.architecture].smallest.get(trainer, {})}


def job_of(
    case: Case, prepared: Prepared, out: Path, settings: dict[str, Any], *, trained: str = "unet", **own: Any
) -> Work:
    """Return a case as a job for one trainer with its own settings."""
    architecture = ARCHITECTURES[case.architecture]
    given: dict[str, Any] = {
        "steps": case.steps,
        "resolution": case.resolution,
        "text_encoder": TRAINED[trained],
        "batch_size": case.batch_size,
        "device": case.device,
        "precision": case.precision,
        "settings": settings,
        "rank": architecture.rank,
        "alpha": architecture.alpha,
        "architecture": case.architecture,
        "files": prepared.files,
        "tokenizers": prepared.tokenizers,
        **own,
    }
    return Work(*map(str, (prepared.checkpoint, prepared.images, prepared.tokenizer, out)), **given)


def main() -> None:
    """Write random weights, and noise images with captions; print where they and the tokenizers are."""
    folder, (resolution, count, repeats) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    pack()
    full_size = load_by_path("full_size", ROOT / "tests" / "full" / "full_size.py")
    files = write_weights(sys.argv[5], full_size.scratch(folder))
    tokenizers = find_tokenizers(sys.argv[5])
    found = {
        "checkpoint": str(files.pop("checkpoint")),
        "images": str(write_images(folder / "images", resolution, count, repeats)),
        "tokenizer": tokenizers.pop("clip"),
        "files": {role: str(file) for role, file in files.items()},
        "tokenizers": tokenizers,
    }
    print(json.dumps(found))


def write_weights(name: str, scratch: Path) -> dict[str, Path]:
    """Return the files with an architecture's random weights by their roles; SD1.5's is that of the tests."""
    if name == "sd15":
        full_size = load_by_path("full_size", ROOT / "tests" / "full" / "full_size.py")
        return {"checkpoint": full_size.write_checkpoint(scratch)}
    from .random_files import write_files

    return write_files(ARCHITECTURES[name], name, scratch)


def find_tokenizers(name: str) -> dict[str, str]:
    """Return the folders of the tokenizers that an architecture needs, by kind."""
    from loragraft.trainer.families.text.tokenizers import find_tokenizer

    return {kind: find_tokenizer(None, kind=kind) for kind in ARCHITECTURES[name].tokenizers}


def write_images(images: Path, resolution: int, count: int, repeats: int) -> Path:
    """Write square images of noise, each with a caption."""
    import numpy as np
    from PIL import Image

    inside = images / f"{repeats}_zibu"
    inside.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = rng.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
        Image.fromarray(noise).save(inside / f"image{i}.png")
        caption = f"zibu, a photo of a small red house number {i}, sky, morning light"
        (inside / f"image{i}.txt").write_text(caption, encoding="utf-8")
    return images


if __name__ == "__main__":
    main()
