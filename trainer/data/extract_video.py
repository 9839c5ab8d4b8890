"""One video into pictures: decoded here, encoded on other cores, moved into place only when all are there."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from .animation import open_reel
from .folders import Found
from .frame_store import STAGING, Store, StoredFrame, StoredVideo, identity, key_of, place
from .frames import FrameSettings, Tally, clock, kept_frames
from .images import shown
from .video import UnreadableVideoError
from .video_files import frame_name

SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1},  # higher levels take far longer for a few percent
    "jpg": {"format": "JPEG", "quality": 97, "subsampling": 0},
}


class VideoJob:
    """One video to be read, or found to be up to date."""

    def __init__(self, file: Found, base: str, settings: FrameSettings) -> None:
        self.file, self.name, self.base, self.settings = file, file.name, base, settings
        self.is_current = False
        self.damage = ""
        self._identity = (0, 0, "")
        self._key = ""

    def look(self, before: StoredVideo | None) -> str:
        """Find out whether it is up to date, else whether it can be read; returns the reason if it cannot."""
        try:
            self._identity = identity(self.file.path, before)
        except OSError as error:
            return error.strerror or type(error).__name__
        options = {**dataclasses.asdict(self.settings), **SAVE_OPTIONS[self.settings.image_format]}
        self._key = key_of(self._identity[2], options, self.base)
        self.is_current = before is not None and before.key == self._key
        if self.is_current:
            return ""
        try:
            with open_reel(self.file.path):
                return ""
        except UnreadableVideoError as error:
            return str(error)

    def run(
        self, root: Path, before: StoredVideo | None, *, keep_damaged: bool, tell: Callable[[float], None]
    ) -> StoredVideo | None:
        """Read the video and put its frames into place; ``tell`` hears the share that is done.

        ``damage`` says what was wrong on the way; None is returned, and nothing placed, where something was
        and ``keep_damaged`` is off. Raises UnreadableVideoError, LG-DATA-046.
        """
        staging = root / f"{STAGING}{uuid.uuid4().hex[:8]}"
        try:
            made, line = self._decode(staging, tell)
            if self.damage and not keep_damaged:
                return None
            placed = place(root, staging, made, before.frames if before else ())
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return StoredVideo(*self._identity, self._key, line, placed)

    def _decode(self, staging: Path, tell: Callable[[float], None]) -> tuple[list[StoredFrame], str]:
        settings, tally, taken = self.settings, Tally(), set[str]()
        with open_reel(self.file.path) as video, _Writer(staging, settings.image_format) as writer:
            end = settings.end or video.facts.seconds
            length = max(1e-3, end - settings.start)
            try:
                for seconds, picture in kept_frames(
                    video, settings, tally, lambda now: tell((now - settings.start) / length)
                ):
                    name = frame_name(self.base, seconds, taken, settings.image_format)
                    writer.add(name, picture)
            except UnreadableVideoError as error:
                self.damage = f"{error}, at {clock(tally.ended_at)}"
            if not self.damage and video.num_damaged:
                self.damage = f"{video.num_damaged} frames or packets are damaged"
            if not self.damage and video.is_cut_off:
                self.damage = f"cut off at {clock(tally.ended_at)} of {clock(video.facts.seconds)}"
            height, width = video.facts.size
            notes = "".join(f"; {note}" for note in (*video.facts.notes, self.damage) if note)
            line = (
                f"{shown(self.name)}: {width}x{height}, {clock(video.facts.seconds)}: {tally.text(settings)}"
            )
            return writer.finished(), line + notes


class _Writer:
    """Encode and write pictures on other threads; Pillow and the hash work outside Python's lock."""

    def __init__(self, folder: Path, image_format: str) -> None:
        self._folder, self._options = folder, SAVE_OPTIONS[image_format]
        self._num_workers = min(4, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._num_workers)
        self._waiting: deque[Future[StoredFrame]] = deque()
        self._made: list[StoredFrame] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, name: str, picture: Image.Image) -> None:
        """Take a picture; waits where more are waiting than threads, so that memory stays small."""
        self._waiting.append(self._pool.submit(self._write, name, picture))
        if len(self._waiting) > self._num_workers:
            self._made.append(self._waiting.popleft().result())

    def finished(self) -> list[StoredFrame]:
        """Return all frames in order, once they are written."""
        while self._waiting:
            self._made.append(self._waiting.popleft().result())
        return self._made

    def _write(self, name: str, picture: Image.Image) -> StoredFrame:
        buffer = io.BytesIO()
        picture.save(buffer, **self._options)
        data = buffer.getvalue()
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        return StoredFrame(name, len(data), 0, digest, picture.height, picture.width)


def bring_up_to_date(
    root: Path, job: VideoJob, store: Store, *, keep_damaged: bool, tell: Callable[[float], None]
) -> StoredVideo | None:
    """Return the video's frames, read anew only where they are not up to date; None where it is damaged."""
    if job.is_current:
        return store[job.name]
    return job.run(root, store.get(job.name), keep_damaged=keep_damaged, tell=tell)
