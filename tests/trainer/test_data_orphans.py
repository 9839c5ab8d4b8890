"""Orphans: listed first, deleted only when asked, and never anything that was not listed."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from loragraft.trainer.__main__ import main
from loragraft.trainer.data.orphans import find_orphans, remove_orphans
from loragraft_tests.trainer.data_folders import Refusal, fill

S = (32, 32)
FILES = {
    "a.png": S,
    "a.txt": "a",
    "a.png.txt": "a",
    "a.png.json": "{}",
    "A.caption": "capitals do not matter",
    "clip.mp4": b"?",
    "clip.txt": "of a video",
    "broken.png": b"<html>",
    "broken.txt": "of a broken image",
    "config.json": "{}",
    ".hidden.txt": "x",
    "sub/b.jpg": S,
    "sub/b.txt": "b",
}
ORPHANS = {
    "gone.txt": "x",
    "gone.caption": "x",
    "gone.jpg.txt": "x",
    "gone.jpg.json": "{}",
    "a.jpg.txt": "of a.jpg, which is not there",
    "sub/a.txt": "its image lies in another folder",
}


def names(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() or p.is_symlink()}


def test_what_is_an_orphan(tmp_path: Path) -> None:
    fill(tmp_path, {**FILES, **ORPHANS})
    assert {file.name for file in find_orphans(tmp_path)} == set(ORPHANS)
    assert {f.name for f in find_orphans(tmp_path, recursive=False)} == {n for n in ORPHANS if "/" not in n}
    with Refusal("LG-DATA-001"):
        find_orphans(tmp_path / "gone")


def test_accents_in_either_composition(tmp_path: Path) -> None:
    fill(tmp_path, {unicodedata.normalize("NFC", "caf\u00e9.png"): S})
    fill(tmp_path, {unicodedata.normalize("NFD", "caf\u00e9.txt"): "x"})
    assert find_orphans(tmp_path) == []


def test_links_are_left_alone(tmp_path: Path) -> None:
    fill(tmp_path, {"set/a.png": S, "outside.txt": "x"})
    (tmp_path / "set" / "gone.txt").symlink_to(tmp_path / "outside.txt")
    (tmp_path / "set" / "also gone.txt").symlink_to(tmp_path / "set" / "a.png")
    assert find_orphans(tmp_path / "set") == []


def test_the_command_deletes_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, {**FILES, **ORPHANS})
    before = names(tmp_path)
    assert main(["dataset", "orphans", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ORPHANS) and "6 files; nothing was deleted" in out
    assert names(tmp_path) == before
    assert main(["dataset", "orphans", str(tmp_path), "--delete"]) == 0
    assert "6 of 6 files deleted" in capsys.readouterr().out
    assert names(tmp_path) == before - set(ORPHANS)
    assert main(["dataset", "orphans", str(tmp_path), "--delete"]) == 0
    assert "No caption file without an image." in capsys.readouterr().out


def test_only_what_was_listed_is_deleted(tmp_path: Path) -> None:
    fill(tmp_path, {**FILES, **ORPHANS})
    listed = find_orphans(tmp_path)
    fill(tmp_path, {"late.txt": "x"})
    (tmp_path / "gone.txt").unlink()
    assert remove_orphans(listed) == []
    assert names(tmp_path) == {*FILES, "late.txt"}


def test_what_cannot_be_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"a.png": S, "b.txt": "x"})
    listed = find_orphans(tmp_path)

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert remove_orphans(listed) == ["b.txt (Permission denied)"]
