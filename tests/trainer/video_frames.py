"""A video in three scenes, what is taken of it, and the times in the names of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from loragraft.trainer.data.frames import FrameSettings
from loragraft.trainer.data.video_files import frame_name
from loragraft_tests.trainer.videos import encode, scene

ALL = FrameSettings(every_n_frames=1, skip_blurred=False, skip_similar=False)


def stamps(dataset: Any) -> list[str]:
    """Return the times in the pictures' names."""
    return [record.path.stem.rsplit("_", 1)[1] for record in dataset.records]


def seconds(*values: float) -> list[str]:
    """Write times as names do."""
    return [frame_name("x", value, set(), "png")[2:-4] for value in values]


def write_trip(folder: Path) -> Path:
    """Write a video of 90 frames, 30 a second, in three scenes of 30, 40 and 20 frames that move."""
    frames = []
    for number, length in enumerate((30, 40, 20)):
        wide = scene(number, (192, 64))
        frames += [np.ascontiguousarray(wide[:, shift : shift + 96]) for shift in range(length)]
    return encode(folder / "trip.mp4", frames, key_every=25)
