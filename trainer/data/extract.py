"""A folder of videos into a folder of pictures, and records of these."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..errors import LoraGraftError, listed
from .caption_files import CaptionFileError, read_caption
from .extract_video import VideoJob, bring_up_to_date
from .folders import MAX_REPEATS, folder_rule, natural_key
from .frame_store import STAGING, Store, StoredFrame, read_store, state_of, superseded, write_store
from .frames import FrameSettings, check_settings
from .images import UnreadableImageError, inspect, shown
from .records import Dataset, Record
from .report import counted
from .video_files import VideoFiles, bases, find_videos

Progress = Callable[[int, int], None]

SHARES = 1000  # steps of the progress for one video
MAX_LINES = 20
LEFTOVER_AFTER_S = 24 * 3600
ON_BAD = ("stop", "skip")


def extract_frames(
    source: Path | str,
    folder: Path | str,
    settings: FrameSettings | None = None,
    *,
    recursive: bool = True,
    class_tokens: str = "",
    default_repeats: int = 1,
    on_bad: str = "stop",
    progress: Progress | None = None,
) -> Dataset:
    """Write frames of a video, or of all videos below a folder, into ``folder``, and return their records.

    What was extracted before from the same bytes under the same settings is left untouched. Folders called
    ``<repeats>_<class words>`` mean what they mean for images, and stay in the pictures' names. ``on_bad``
    "stop" raises with all videos that fail, "skip" leaves them out, or keeps what came before the damage.
    ``progress`` is called often; what it raises leaves the running video's frames unwritten.
    Raises LG-CFG-003, LG-DATA-040 to LG-DATA-046.
    """
    settings = check_settings(settings or FrameSettings())
    if on_bad not in ON_BAD:
        raise _bad_policy(on_bad)
    files = find_videos(source, recursive=recursive)
    root = Path(folder)
    store = read_store(root)
    jobs, unreadable = _look(files, settings, store)
    if unreadable and (on_bad == "stop" or not jobs):
        raise _unreadable(unreadable, len(jobs) + len(unreadable))
    root.mkdir(parents=True, exist_ok=True)
    root = root.resolve()
    _sweep(root)

    damaged: dict[str, str] = {}
    for number, job in enumerate(jobs):
        tell = _teller(progress, number, len(jobs))
        video = bring_up_to_date(root, job, store, keep_damaged=on_bad == "skip", tell=tell)
        if video is None:
            damaged[job.name] = job.damage
        elif not job.is_current:
            store[job.name] = video
            write_store(root, store)
        tell(1.0)
    if damaged:
        raise _broken_off(damaged, len(jobs))
    return _dataset(root, files, jobs, store, unreadable, class_tokens, default_repeats)


def plan_frames(
    source: Path | str,
    folder: Path | str,
    settings: FrameSettings | None = None,
    *,
    recursive: bool = True,
) -> tuple[str, ...]:
    """Say for each video what `extract_frames` would do and which files it may remove; writes nothing."""
    settings = check_settings(settings or FrameSettings())
    files = find_videos(source, recursive=recursive)
    root = Path(folder)
    store = read_store(root)
    jobs, unreadable = _look(files, settings, store)
    lines = []
    for job in jobs:
        before = store.get(job.name)
        if before is None:
            lines.append(f"{shown(job.name)}: new, to be read")
        elif job.is_current:
            lines.append(f"{shown(job.name)}: up to date, {counted(len(before.frames), 'picture')}")
        else:
            old = superseded(root, before.frames, ())
            lines.append(
                f"{shown(job.name)}: to be read again; replaces or removes {counted(len(old), 'picture')}:"
            )
            lines += [f"  {shown(name)}" for name in old]
    lines += [f"{shown(name)}: cannot be read ({reason})" for name, reason in unreadable.items()]
    return tuple(lines)


# ---- steps ----


def _look(files: VideoFiles, settings: FrameSettings, store: Store) -> tuple[list[VideoJob], dict[str, str]]:
    """Return a job for each video that can be read, and the reasons of those that cannot."""
    named = bases(file.name for file in files.videos)
    jobs, unreadable = [], dict(files.bad)
    for file in files.videos:
        repeats, _ = folder_rule(file.name, files.root_name)
        if repeats is not None and not 1 <= repeats <= MAX_REPEATS:
            unreadable[file.name] = (
                f"its folder's name asks for {repeats} repeats, possible: 1 to {MAX_REPEATS}"
            )
            continue
        job = VideoJob(file, named[file.name], settings)
        if reason := job.look(store.get(file.name)):
            unreadable[file.name] = reason
        else:
            jobs.append(job)
    return jobs, unreadable


def _teller(progress: Progress | None, number: int, total: int) -> Callable[[float], None]:
    def tell(share: float) -> None:
        if progress is not None:
            progress(number * SHARES + int(min(1.0, max(0.0, share)) * SHARES), total * SHARES)

    return tell


def _sweep(root: Path) -> None:
    """Remove what a killed process left half-written a day ago or earlier."""
    for path in root.glob(f"{STAGING}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_AFTER_S:
                shutil.rmtree(path)


# ---- records ----


def _dataset(
    root: Path,
    files: VideoFiles,
    jobs: Sequence[VideoJob],
    store: Store,
    unreadable: Mapping[str, str],
    class_tokens: str,
    default_repeats: int,
) -> Dataset:
    records, deleted, changed, bad = [], [], [], {}
    for job in jobs:
        repeats, words = _rule(job.name, files.root_name, class_tokens, default_repeats)
        for frame in store[job.name].frames:
            state = state_of(root, frame)
            if state == "deleted":
                deleted.append(frame.name)
                continue
            if state == "changed":
                changed.append(frame.name)
            try:
                records.append(_record(root, frame, state, words, repeats))
            except (UnreadableImageError, CaptionFileError) as error:
                bad[frame.name] = str(error)
    if bad:
        raise _changed_badly(bad)
    lines = _lines(files, jobs, store, unreadable, len(records))
    if deleted:
        lines.append(
            f"Deleted by hand, and left out: {counted(len(deleted), 'picture')}: {listed(deleted, limit=5)}"
        )
    if changed:
        lines.append(
            f"Changed by hand, and left so: {counted(len(changed), 'picture')}: {listed(changed, limit=5)}"
        )
    if not records:
        raise LoraGraftError(
            "LG-DATA-043",
            "No frame was kept.",
            where=listed(store[job.name].line for job in jobs),
            why=f"{len(deleted)} deleted by hand; the others were left out by the settings."
            if deleted
            else "start and end leave none, or all frames were skipped as blurred or near-identical.",
            fix="check start and end; lower min_sharpness, or switch skip_blurred and skip_similar off",
        )
    records.sort(key=lambda record: natural_key(record.name))
    return Dataset(root, tuple(records), tuple(lines))


def _rule(name: str, root_name: str, class_tokens: str, default_repeats: int) -> tuple[int, str]:
    repeats, words = folder_rule(name, root_name)
    return default_repeats if repeats is None else repeats, words or class_tokens.strip()


def _record(root: Path, frame: StoredFrame, state: str, words: str, repeats: int) -> Record:
    path = root / frame.name
    size, digest = (frame.height, frame.width), frame.content_hash
    if state == "changed":
        facts = inspect(path)
        size, digest = facts.size, facts.content_hash
    caption, source = words, "folder" if words else ""
    text = path.with_suffix(".txt")
    if text.is_file():  # written by hand, or by a tagger into the working copy
        caption, source = read_caption(text).text, "txt"
    return Record(path, frame.name, size, caption, words, repeats, digest, caption_source=source)


def _lines(
    files: VideoFiles,
    jobs: Sequence[VideoJob],
    store: Store,
    unreadable: Mapping[str, str],
    num_records: int,
) -> list[str]:
    current = sum(job.is_current for job in jobs)
    lines = [
        f"{counted(num_records, 'picture')} of {counted(len(jobs), 'video')}; up to date already: {current}."
    ]
    lines += [store[job.name].line for job in jobs[:MAX_LINES]]
    if len(jobs) > MAX_LINES:
        lines.append(f"and {len(jobs) - MAX_LINES} more videos")
    lines += [f"Left out: {shown(name)} ({reason})" for name, reason in unreadable.items()]
    if files.num_others:
        lines.append(f"Not looked at: {counted(files.num_others, 'other file')}.")
    gone = sum(len(video.frames) for name, video in store.items() if name not in {j.name for j in jobs})
    if gone:
        lines.append(f"Not used: {counted(gone, 'picture')} of videos that are no longer there.")
    return lines


# ---- refusals ----


def _bad_policy(on_bad: object) -> LoraGraftError:
    return LoraGraftError(
        "LG-CFG-003",
        f"Setting 'on_bad' is {shown(repr(on_bad), 40)}, expected one of {', '.join(ON_BAD)}.",
        where="on_bad",
        why="it says what is done about videos that cannot be read.",
        fix="set on_bad to stop or skip",
    )


def _unreadable(bad: Mapping[str, str], total: int) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-041",
        f"{len(bad)} of {counted(total, 'video')} cannot be read.",
        where=listed(f"{shown(name)} ({reason})" for name, reason in bad.items()),
        why="only sound MP4, MOV, MKV and WebM files on this machine are opened.",
        fix="convert them to MP4, remove them, or set on_bad to 'skip'",
    )


def _broken_off(damaged: Mapping[str, str], total: int) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-045",
        f"Damaged on the way: {len(damaged)} of {counted(total, 'video')}.",
        where=listed(f"{shown(name)} ({reason})" for name, reason in damaged.items()),
        why="the frames of the other videos are written, those of these are not.",
        fix="get these files again, or set on_bad to 'skip' to take the frames before the damage",
    )


def _changed_badly(bad: Mapping[str, str]) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-047",
        f"{counted(len(bad), 'picture')} changed by hand cannot be used.",
        where=listed(f"{shown(name)} ({reason})" for name, reason in bad.items()),
        why="they, or the caption files beside them, are damaged now.",
        fix="save them again, or delete them: a picture deleted by hand stays out",
    )
