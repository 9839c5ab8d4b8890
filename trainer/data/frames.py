"""Choose a video's frames: every n-th, every so often, key frames or scenes; none blurred or alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from PIL import Image

from .animation import Reel
from .frame_checks import MEASURED_PX, SCENE_PX, SceneDetector, dhash, hamming, sharpness
from .options import bad_option, checked, option
from .video import Frame

MODES = ("every_n_frames", "every_n_seconds", "key_frames", "scene_changes")
FORMATS = ("png", "jpg")


@dataclass(frozen=True)
class FrameSettings:
    """Which frames become pictures; the defaults are those of the guides."""

    mode: str = option(
        "every_n_frames",
        "Which frames are taken: every n-th one, one every so many seconds, the key frames (quickest; where "
        "the video was compressed as whole pictures), or the first frame of each scene.",
        choices=MODES,
    )
    every_n_frames: int = option(
        30,
        "For every_n_frames: 30 of a video with 30 frames a second is 1 picture a second.",
        minimum=1,
        maximum=1_000_000,
    )
    every_n_seconds: float = option(
        1.0,
        "For every_n_seconds: the time between two pictures, by the video's own times.",
        minimum=0.001,
        maximum=86_400,
    )
    scene_threshold: float = option(
        0.1,
        "For scene_changes: how much the picture must change at once, as a share of full brightness. Lower "
        "finds more scenes.",
        minimum=0.001,
        maximum=1,
        advanced=True,
    )
    start: float = option(0.0, "Leave out what comes before this many seconds.", minimum=0, maximum=86_400)
    end: float = option(
        0.0, "Leave out what comes after this many seconds; 0 reads to the end.", minimum=0, maximum=86_400
    )
    max_frames: int = option(
        200, "At most so many pictures of each video; 0 sets no limit.", minimum=0, maximum=1_000_000
    )
    skip_blurred: bool = option(True, "Leave out blurred frames (see min_sharpness).")
    min_sharpness: float = option(
        30.0,
        "For skip_blurred: the least variance of the Laplacian, measured at 512 px. The report names the "
        "values of what was left out.",
        minimum=0,
        maximum=1_000_000,
        advanced=True,
    )
    skip_similar: bool = option(
        True, "Leave out frames that are near-identical to one of the same video that was kept."
    )
    max_distance: int = option(
        6,
        "For skip_similar: in how many of the 64 bits of their difference hash two near-identical frames "
        "may differ.",
        minimum=0,
        maximum=64,
        advanced=True,
    )
    image_format: str = option(
        "png", "png loses nothing; jpg (quality 97) takes about a fifth of the space.", choices=FORMATS
    )


@dataclass
class Tally:
    """What became of the frames that were chosen from one video."""

    num_chosen: int = 0
    num_kept: int = 0
    blurred: list[float] = field(default_factory=list)
    num_similar: int = 0
    stopped_at: float | None = None
    ended_at: float = 0.0

    def text(self, settings: FrameSettings) -> str:
        """Say it in a few words."""
        words = [f"{self.num_chosen} chosen"]
        if self.blurred:
            span = f"{min(self.blurred):.0f}" if len(self.blurred) == 1 else _span(self.blurred)
            words.append(f"{len(self.blurred)} blurred (sharpness {span} < {settings.min_sharpness:g})")
        if self.num_similar:
            words.append(f"{self.num_similar} near-identical")
        words.append(f"{self.num_kept} kept")
        if self.stopped_at is not None:
            words.append(f"stopped at max_frames at {clock(self.stopped_at)}")
        return ", ".join(words)


def check_settings(settings: FrameSettings) -> FrameSettings:
    """Return the settings if they are possible; raises LG-CFG-003 with the first that is not."""
    checked(settings)
    if settings.end and settings.end <= settings.start:
        raise bad_option("end", settings.end, f"0 or more than start ({settings.start:g})")
    return settings


def kept_frames(
    video: Reel,
    settings: FrameSettings,
    tally: Tally,
    watch: Callable[[float], None] | None = None,
) -> Iterator[tuple[float, Image.Image]]:
    """Yield (seconds, picture) of each frame that is kept; ``tally`` counts the others.

    ``watch`` is called with the time of every frame that is decoded; what it raises ends the reading.
    Raises UnreadableVideoError where the file is damaged from some point on.
    """
    hashes: list[int] = []
    frames = _watched(video, settings, tally, watch)
    for frame in CHOOSERS[settings.mode](video, frames, settings):
        tally.num_chosen += 1
        if settings.skip_blurred or settings.skip_similar:
            gray = video.gray(frame, MEASURED_PX)
            if settings.skip_blurred and (value := sharpness(gray)) < settings.min_sharpness:
                tally.blurred.append(value)
                continue
            if settings.skip_similar:
                own = dhash(gray)
                if any(hamming(own, other) <= settings.max_distance for other in hashes):
                    tally.num_similar += 1
                    continue
                hashes.append(own)
        if settings.max_frames and tally.num_kept == settings.max_frames:
            tally.num_chosen -= 1
            tally.stopped_at = frame.seconds
            return
        tally.num_kept += 1
        yield frame.seconds, video.picture(frame)


def clock(seconds: float) -> str:
    """Write a time as 1:02:03.5, hours only where there are some."""
    whole, part = divmod(round(seconds * 1000), 1000)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return text + (f".{part:03}".rstrip("0") if part else "")


# ---- which frames ----


def _every_n_frames(video: Reel, frames: Iterator[Frame], settings: FrameSettings) -> Iterator[Frame]:
    return (frame for number, frame in enumerate(frames) if number % settings.every_n_frames == 0)


def _every_n_seconds(video: Reel, frames: Iterator[Frame], settings: FrameSettings) -> Iterator[Frame]:
    """Yield the first frame of each interval: by the frames' own times, so that a changing rate is right."""
    due = 0
    for frame in frames:
        # 1e-6: a time of 2.9999999 is 3, whatever fraction the file counts in.
        interval = math.floor((frame.seconds - settings.start) / settings.every_n_seconds + 1e-6)
        if interval >= due:
            due = interval + 1
            yield frame


def _key_frames(video: Reel, frames: Iterator[Frame], settings: FrameSettings) -> Iterator[Frame]:
    return (frame for frame in frames if frame.is_key)


def _scene_changes(video: Reel, frames: Iterator[Frame], settings: FrameSettings) -> Iterator[Frame]:
    detector = SceneDetector(settings.scene_threshold)
    return (frame for frame in frames if detector.is_new(video.gray(frame, SCENE_PX)))


Chooser = Callable[[Reel, Iterator[Frame], FrameSettings], Iterator[Frame]]
CHOOSERS: dict[str, Chooser] = {
    "every_n_frames": _every_n_frames,
    "every_n_seconds": _every_n_seconds,
    "key_frames": _key_frames,
    "scene_changes": _scene_changes,
}


def _watched(
    video: Reel, settings: FrameSettings, tally: Tally, watch: Callable[[float], None] | None
) -> Iterator[Frame]:
    keys_only = settings.mode == "key_frames"
    for frame in video.frames(settings.start, settings.end, keys_only=keys_only):
        if watch is not None:
            watch(frame.seconds)
        tally.ended_at = frame.seconds
        yield frame


def _span(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}"
