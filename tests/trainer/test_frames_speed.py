"""Frame extraction against a plain PyAV loop, by turns on the same video.

Processor seconds are compared: they say the same on a busy machine as on a quiet one. That pictures are
compressed on other cores while the next frames are decoded does not count in our favour here.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from loragraft.trainer.data.extract import extract_frames
from loragraft.trainer.data.frames import FrameSettings
from loragraft_tests.trainer.videos import encode

ROUNDS = 3
FRAMES, EVERY = 900, 30


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 30 seconds of 720p that pan over a picture."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (90, 160, 3), dtype=np.uint8))
    wide = np.asarray(small.resize((1600, 900), Image.Resampling.BICUBIC))
    turns = [(150 + 150 * np.sin(n / 40), 80 + 80 * np.cos(n / 33)) for n in range(FRAMES)]
    frames = (np.ascontiguousarray(wide[int(y) : int(y) + 720, int(x) : int(x) + 1280]) for x, y in turns)
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", list(frames), crf=23)


def plain(source: Path, folder: Path) -> int:
    """Decode everything and write every 30th frame, as one would write it down."""
    folder.mkdir()
    with av.open(str(source)) as container:
        container.streams.video[0].thread_type = "SLICE"
        written = 0
        for number, frame in enumerate(container.decode(video=0)):
            if number % EVERY == 0:
                frame.to_image().save(folder / f"{number:06}.png", compress_level=1)
                written += 1
    return written


@pytest.mark.slow
@pytest.mark.parametrize("checks", [False, True])
def test_as_fast_as_a_plain_loop(clip: Path, tmp_path: Path, checks: bool) -> None:
    settings = dataclasses.replace(
        FrameSettings(), every_n_frames=EVERY, skip_blurred=checks, skip_similar=checks, max_distance=0
    )
    ours, theirs = [], []
    for turn in range(ROUNDS):
        begun = time.process_time()
        num_plain = plain(clip, tmp_path / f"plain{turn}")
        theirs.append(time.process_time() - begun)
        begun = time.process_time()
        dataset = extract_frames(clip, tmp_path / f"ours{turn}", settings)
        ours.append(time.process_time() - begun)
        assert len(dataset.records) == num_plain == FRAMES // EVERY
        for name in (f"plain{turn}", f"ours{turn}"):
            shutil.rmtree(tmp_path / name)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    told = (
        f"{FRAMES} frames of 720p, every {EVERY}th, checks {'on' if checks else 'off'}: "
        f"{statistics.median(ours):.2f} CPU seconds, plain loop "
        f"{statistics.median(theirs):.2f}, ratio {ratio:.2f}"
    )
    print(told)
    assert ratio <= 1.2, told
