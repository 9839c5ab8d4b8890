"""A disk that fails, dies or loses power at a chosen moment, by standing in for the calls that change it."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """The process died here: from now on none of its calls reaches the disk."""


class Disk:
    """Count the calls that change the disk below ``root`` and end in a fault at call number ``at``.

    ``error`` is raised at that call, or at every one from there on with ``always``; without an error
    the process is killed. What was written but not synced is known, so that power can be cut.
    """

    def __init__(self, root: Path, at: int = 0, error: int | None = None, always: bool = False) -> None:
        self.root, self.at, self.error, self.always = root, at, error, always
        self.syncs_files = self.syncs_folders = True
        self.calls: list[tuple[str, str]] = []
        self.dead = False
        self._dirty: set[int] = set()
        self._renames: list[tuple[Path, Path, bytes | None]] = []

    # ---- the fault ----

    def reached(self, kind: str, path: Path | str) -> None:
        """Note a call; raise what is due."""
        if self.dead:
            raise Killed
        self.calls.append((kind, os.path.relpath(path, self.root)))
        due = len(self.calls) >= self.at if self.always else len(self.calls) == self.at
        if self.at and due:
            if self.error is not None:
                raise OSError(self.error, os.strerror(self.error), str(path))
            self.dead = True
            raise Killed

    def cut_power(self, *, lose_renames: bool) -> None:
        """Leave what was not synced half-written; undo the renames that no folder sync made durable."""
        for path in [p for p in self.root.rglob("*") if p.is_file()]:
            if path.stat().st_ino in self._dirty:
                os.truncate(path, path.stat().st_size // 2)
        for source, target, old in reversed(self._renames if lose_renames else []):
            if target.exists() and source.parent.exists() and not source.exists():
                target.rename(source)
                if old is not None:
                    target.write_bytes(old)

    # ---- the calls ----

    @contextmanager
    def watching(self) -> Iterator[Disk]:
        """Stand in for the calls while the block runs."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", self._sync)
            patch.setattr(Path, "open", self._opener(Path.open))
            patch.setattr(Path, "replace", self._renamer(Path.replace))
            patch.setattr(Path, "mkdir", self._plain("mkdir", Path.mkdir))
            patch.setattr(Path, "unlink", self._plain("unlink", Path.unlink))
            patch.setattr(shutil, "rmtree", self._remover(shutil.rmtree))
            yield self

    def _plain(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **options: Any) -> Any:
            if not (kind == "mkdir" and path.is_dir()):
                self.reached(kind, path)
            return real(path, *args, **options)

        return call

    def _remover(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, ignore_errors: bool = False) -> None:
            if not Path(path).exists():
                return
            try:
                self.reached("rmtree", path)
            except OSError:
                if not ignore_errors:
                    raise
                return
            real(path, ignore_errors=ignore_errors)

        return call

    def _renamer(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Path, target: Path) -> Path:
            self.reached("rename", target)
            old = target.read_bytes() if target.is_file() else None
            result = real(source, target)
            self._renames.append((source, target, old))
            return result

        return call

    def _sync(self, handle: int) -> None:
        info = os.fstat(handle)
        if stat.S_ISDIR(info.st_mode):
            self.reached("sync folder", self.root)
            if self.syncs_folders:
                gone = [p for p in self._renames if not p[1].parent.exists()]
                here = [
                    p for p in self._renames if p not in gone and p[1].parent.stat().st_ino == info.st_ino
                ]
                self._renames = [p for p in self._renames if p not in gone + here]
        else:
            self.reached("sync file", self.root)
            if self.syncs_files:
                self._dirty.discard(info.st_ino)

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return real(path, mode, *args, **options)
            self.reached("create", path)
            return Written(self, path, real(path, mode, *args, **options))

        return call


class Written:
    """An open file whose every write is a call of its disk; a write that fails has written half."""

    def __init__(self, disk: Disk, path: Path, file: Any) -> None:
        self._disk, self._path, self._file = disk, path, file

    def write(self, data: Any) -> Any:
        """Write, or half of it."""
        self._disk._dirty.add(os.fstat(self._file.fileno()).st_ino)
        try:
            self._disk.reached("write", self._path)
        except BaseException:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *args: Any) -> None:
        self._file.close()
