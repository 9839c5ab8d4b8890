"""Write a dataset's pictures, captions and masks into a folder of their own; originals are never touched.

Every file has a key: a hash over all that its bytes depend on. What has the same key as last time stays
as it is, so a second run touches nothing and one changed picture is written alone. The folder's manifest
holds the keys. Only files that it names are ever replaced or removed, and a folder without one that holds
anything is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from filelock import FileLock, Timeout
from PIL import Image

from ..errors import LoraGraftError, listed
from ..safefile import replace, write_text
from .checking import Progress, in_order
from .images import is_plain, load_upright, read_checked, shown, upright_mask
from .png import write_png
from .records import Dataset, Record

MANIFEST = ".loragraft-copy.json"
LOCK = ".loragraft-copy.lock"
MASKS = "masks"
# Part of every key: raise it when the same record and settings would be written as other bytes.
VERSION = 1
LOCK_WAIT_S = 10


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How pictures are written: ``format`` png, jpeg or webp; ``quality`` 1 to 100 (png ignores it).

    WebP is lossless at quality 100. JPEG keeps the colours' full resolution from quality 90.
    """

    format: str = "png"
    quality: int = 97

    @property
    def suffix(self) -> str:
        """Return the file suffix with its dot."""
        return {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}[self.format]

    def save(self, image: Image.Image, file: IO[bytes]) -> None:
        """Write an RGB or L image into a real file (Pillow then works outside Python's lock)."""
        if self.format == "png":
            write_png(image, file)
        elif self.format == "jpeg":
            image.save(file, "JPEG", quality=self.quality, subsampling=0 if self.quality >= 90 else 2)
        elif self.quality == 100:
            image.save(file, "WEBP", lossless=True, quality=40, method=2)
        else:
            image.save(file, "WEBP", quality=self.quality, method=4)


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture to write: ``name`` is its posix path below the folder, with suffix.

    ``key`` changes whenever the bytes would: the source's content hash and every setting. ``render``
    writes the picture into an open file; it is called only where the key is new, in a thread, and
    ``mask_render`` does so for the mask (a PNG of the same size). ``record`` gives the result its caption,
    concept, repeats and so on; path, name, size, content_hash, mask and crop are replaced.
    """

    record: Record
    name: str
    key: str
    render: Callable[[IO[bytes]], object]
    mask_render: Callable[[IO[bytes]], object] | None = None


@dataclasses.dataclass(frozen=True)
class Copy:
    """What came of it: the dataset in the folder, how many pictures were written and how many stayed."""

    dataset: Dataset
    made: int
    kept: int
    removed: int


def write_copy(
    dataset: Dataset,
    folder: Path | str,
    *,
    encoding: Encoding | None = None,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Copy:
    """Write every record's picture as training sees it (upright, cropped, sRGB) with caption and mask.

    ``names`` are posix paths without suffix, one for each record; by default the records' own.
    Raises LG-DATA-021 and LG-DATA-022, and LG-DATA-009 for a picture that changed.
    """
    encoding = encoding or Encoding()
    stems = list(names) if names is not None else own_stems(dataset.records)
    items = []
    for record, stem in zip(dataset.records, stems, strict=True):
        name = stem + encoding.suffix
        items.append(
            Item(record, name, copy_key(record, encoding), _picture(record, encoding), _mask(record))
        )
    return write_items(folder, items, lines=dataset.lines, progress=progress, workers=workers)


def copy_key(record: Record, encoding: Encoding, *more: object) -> str:
    """Return the key of a record's picture in this encoding; ``more`` are further ingredients."""
    mask = [record.mask_hash, record.mask == record.path] if record.mask is not None else None
    content = [
        VERSION,
        record.content_hash,
        record.crop,
        record.background,
        mask,
        dataclasses.astuple(encoding),
        [repr(m) for m in more],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def own_stems(records: Sequence[Record]) -> list[str]:
    """Return the records' names without suffix, kept apart where two differ in the suffix alone."""
    stems = [PurePosixPath(r.name).with_suffix("").as_posix() for r in records]
    times = Counter(stem.casefold() for stem in stems)
    return [r.name if times[stem.casefold()] > 1 else stem for r, stem in zip(records, stems, strict=True)]


def write_items(
    folder: Path | str,
    items: Sequence[Item],
    *,
    lines: Iterable[str] = (),
    progress: Progress | None = None,
    workers: int | None = None,
) -> Copy:
    """Make the folder hold exactly these pictures, their captions and masks; what is right already stays.

    ``progress`` is called as (done, total) after each; raising in it stops cleanly, and what was finished
    is kept for the next time. ``workers`` is the number of threads (by default one for each core).
    Raises LG-DATA-021 (the folder holds foreign files) and LG-DATA-022 (another process works in it).
    """
    root = Path(os.path.abspath(folder))  # noqa: PTH100 (links stay as the user wrote them)
    _check_names(items)
    root.mkdir(parents=True, exist_ok=True)
    _Manifest.open(root)  # refuses a foreign folder before anything is put into it
    with _locked(root):
        manifest = _Manifest.open(root)
        manifest.claim([name for item in items for name in _files_of(item)])
        records: list[Record] = []
        made = 0
        try:
            # Closed before the manifest is saved: by then every thread has finished its file.
            with closing(in_order(lambda item: _written(item, root, manifest), items, workers)) as done:
                for number, (record, is_new) in enumerate(done, 1):
                    records.append(record)
                    made += is_new
                    if progress is not None:
                        progress(number, len(items))
            removed = manifest.remove_others({name for item in items for name in _files_of(item)})
        finally:
            manifest.save()
    count = f"{made} written, {len(items) - made} unchanged, {removed} old files removed"
    dataset = Dataset(root, tuple(records), (*lines, f"Working copy {shown(root.name)}: {count}."))
    return Copy(dataset, made, len(items) - made, removed)


# ---- one picture ----


def _picture(record: Record, encoding: Encoding) -> Callable[[IO[bytes]], object]:
    def render(file: IO[bytes]) -> None:
        data = read_checked(record)
        if record.crop is None and is_plain(data, encoding.format):
            file.write(data)  # as it is already: encoding it again could only lose quality
        else:
            encoding.save(load_upright(record, data), file)

    return render


def _mask(record: Record) -> Callable[[IO[bytes]], object] | None:
    if record.mask is None:
        return None
    return lambda file: Encoding("png").save(upright_mask(record), file)


def _files_of(item: Item) -> list[str]:
    files = [item.name]
    files += [_caption_name(item.name)] if item.record.caption else []
    return [*files, _mask_name(item.name)] if item.mask_render else files


def _caption_name(name: str) -> str:
    return PurePosixPath(name).with_suffix(".txt").as_posix()


def _mask_name(name: str) -> str:
    return f"{MASKS}/{PurePosixPath(name).with_suffix('.png').as_posix()}"


def _written(item: Item, root: Path, manifest: _Manifest) -> tuple[Record, bool]:
    """Write what is not there yet; return the new record and whether anything of the picture was written."""
    entry, is_new = manifest.entry(item.name, item.key), False
    if entry is None:
        entry, is_new = manifest.write(item.name, item.key, item.render, with_size=True), True
    mask, mask_hash = None, ""
    if item.mask_render is not None:
        name = _mask_name(item.name)
        found = manifest.entry(name, item.key)
        if found is None:
            found, is_new = manifest.write(name, item.key, item.mask_render), True
        mask, mask_hash = root / name, found["sha256"]
    if caption := item.record.caption.encode():
        caption_name, caption_key = _caption_name(item.name), hashlib.sha256(caption).hexdigest()
        if manifest.entry(caption_name, caption_key) is None:
            manifest.write(caption_name, caption_key, lambda file: file.write(caption))
    record = dataclasses.replace(
        item.record,
        path=root / item.name,
        name=item.name,
        size=(entry["height"], entry["width"]),
        content_hash=entry["sha256"],
        mask=mask,
        mask_hash=mask_hash,
        crop=None,
    )
    return record, is_new


# ---- the manifest ----


class _Manifest:
    """What a working copy's folder holds: name -> key, size, time and hash of the file."""

    def __init__(self, root: Path, files: dict[str, dict[str, Any]]) -> None:
        self._root, self._files = root, files
        self._lock = threading.Lock()

    @classmethod
    def open(cls, root: Path) -> _Manifest:
        """Read the folder's manifest; raises LG-DATA-021 where there is none and the folder is not empty."""
        try:
            content = json.loads((root / MANIFEST).read_text("utf-8"))
            files = content["files"]
            if content["version"] != VERSION or not all(isinstance(e, dict) for e in files.values()):
                raise ValueError("another version")
            if not all(map(_stays_inside, files)):
                raise ValueError("a name leads out of the folder")
        except FileNotFoundError:
            foreign = [entry.name for entry in sorted(root.iterdir()) if entry.name != LOCK]
            if foreign:
                raise _foreign(root, foreign) from None
            files = {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _foreign(root, [f"{MANIFEST}, which cannot be read"]) from error
        return cls(root, files)

    def claim(self, names: Sequence[str]) -> None:
        """Note these names as ours before writing, so that a crash leaves nothing unknown behind."""
        unknown = [name for name in names if name not in self._files]
        foreign = [name for name in unknown if os.path.lexists(self._root / name)]
        if foreign:
            raise _foreign(self._root, foreign)
        if unknown:
            self._files.update({name: {} for name in unknown})
            self.save()

    def entry(self, name: str, key: str) -> dict[str, Any] | None:
        """Return the file's entry where it has this key and lies there as it was written, else None."""
        entry = self._files.get(name)
        if not entry or entry.get("key") != key:
            return None
        try:
            info = (self._root / name).lstat()
        except OSError:
            return None
        return entry if [info.st_size, info.st_mtime_ns] == entry.get("stat") else None

    def write(
        self, name: str, key: str, render: Callable[[IO[bytes]], object], *, with_size: bool = False
    ) -> dict[str, Any]:
        """Let ``render`` write the file beside its place, then rename it; return its new entry."""
        target = self._root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(self._root.resolve()):
            raise _foreign(self._root, [f"{name}, in a folder that is a link to elsewhere"])
        temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("x+b") as file:
                render(file)
                file.flush()
                file.seek(0)
                entry: dict[str, Any] = {"key": key, "sha256": hashlib.sha256(file.read()).hexdigest()}
                if with_size:
                    file.seek(0)
                    with Image.open(file) as image:
                        entry["width"], entry["height"] = image.size
            replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        info = target.lstat()
        entry["stat"] = [info.st_size, info.st_mtime_ns]
        with self._lock:
            self._files[name] = entry
        return entry

    def remove_others(self, wanted: set[str]) -> int:
        """Remove the files of earlier runs that are not wanted any more; return how many."""
        removed = 0
        inside = self._root.resolve()
        for name in sorted(set(self._files) - wanted):
            folder = (self._root / name).parent
            if folder.resolve().is_relative_to(inside):
                with suppress(FileNotFoundError):
                    (self._root / name).unlink()
                    removed += 1
            with self._lock:
                del self._files[name]
            with suppress(OSError):  # something is in it still
                while folder != self._root:
                    folder.rmdir()
                    folder = folder.parent
        return removed

    def save(self) -> None:
        """Write the manifest, whole or not at all, where it changed."""
        with self._lock:
            text = json.dumps({"version": VERSION, "files": self._files}, ensure_ascii=False, indent=0)
        path = self._root / MANIFEST
        if not path.exists() or path.read_text("utf-8") != text:
            write_text(path, text)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    lock = FileLock(root / LOCK)
    try:
        lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        raise LoraGraftError(
            "LG-DATA-022",
            "Another process writes into this working copy.",
            where=shown(root),
            why="two at once would mix their pictures.",
            fix="wait until it is done, or write into another folder",
        ) from None
    try:
        yield
    finally:
        lock.release()


def _check_names(items: Sequence[Item]) -> None:
    """Raise LG-DATA-023 with all names that leave the folder or that two files would share."""
    wrong = [
        item.name for item in items if not _stays_inside(item.name) or not PurePosixPath(item.name).suffix
    ]
    times = Counter(name.casefold() for item in items for name in _files_of(item))
    wrong += sorted(name for name, count in times.items() if count > 1)
    if wrong:
        raise LoraGraftError(
            "LG-DATA-023",
            f"{len(wrong)} files of the working copy cannot have the names they would get.",
            where=listed(map(shown, wrong)),
            why="two pictures, captions or masks would be written under one name, or outside the folder.",
            fix="rename the originals or their folders, or number the pictures with Convert Images",
        )


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and path.as_posix() == name


def _foreign(root: Path, names: Sequence[str]) -> LoraGraftError:
    return LoraGraftError(
        "LG-DATA-021",
        "The folder for the working copy holds other files.",
        where=f"{shown(root)}: {listed(map(shown, names), limit=8)}",
        why="only files that LoraGraft wrote itself are replaced there, so that nothing of yours is lost.",
        fix="name an empty or a new folder",
    )
