"""After any fault at any moment of a save, what is listed is whole and nothing older is touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api, checkpoint
from loragraft.trainer.checkpoint import INFO, LORA, MANIFEST, STATE, RunFolder, disk_refusal
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.disk import Disk, Killed
from loragraft_tests.trainer.saved import content, save, write_history

ERRORS = {errno.ENOSPC: "LG-SAVE-001", errno.EIO: "LG-SAVE-007", errno.EACCES: "LG-SAVE-007"}
NEW = 15


@pytest.fixture(autouse=True)
def no_real_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real syncs take their time, and no real power is cut."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with checkpoints 2 (the LoRA only), 5 and 10."""
    return write_history(tmp_path_factory.mktemp("history") / "run")


def before_new(history: Path, folder: Path, scene: str) -> Path:
    """Copy the history to where step 15 is about to be saved, in one of the scenes."""
    shutil.copytree(history, folder)
    target = folder / "ckpt" / f"step-{NEW:06d}"
    if scene == "only its LoRA is there":
        shutil.copytree(folder / "ckpt" / "step-000002", target)
        file = save(folder.with_name("other"), NEW).folder
        for name in (LORA, INFO):
            shutil.copy(file / name, target / name)
        checkpoint._write_manifest(target, [LORA, INFO])
        shutil.rmtree(folder.with_name("other"))
    elif scene == "a broken one is there":
        shutil.copytree(folder / "ckpt" / "step-000010", target)
        (target / STATE).write_bytes(b"broken")
    return folder


SCENES = ("nothing is there", "only its LoRA is there", "a broken one is there")


def check(folder: Path, history: Path, scene: str, *, saved: bool = False) -> None:
    """Assert the promise: start, list, verify, resume, save again."""
    run = RunFolder(folder)
    run.open()
    try:
        assert not list(folder.rglob("*.tmp-*")), "what was half-written is swept"
        listed = {c.step: c for c in run.checkpoints()}
        assert {2, 5, 10} <= set(listed), "older checkpoints are untouched"
        for step in (2, 5, 10):
            old = history / "ckpt" / f"step-{step:06d}"
            assert listed[step].lora_file.read_bytes() == (old / LORA).read_bytes()
            if listed[step].resumable:
                assert (listed[step].folder / STATE).read_bytes() == (old / STATE).read_bytes()
        resumable = {s for s, c in listed.items() if c.resumable}
        assert resumable >= {5, 10} or resumable >= {10, NEW}, "two states to continue from"
        if NEW in listed:
            lora, state = content(NEW)[1], content(NEW)[3]
            assert all(torch.equal(v, lora[k]) for k, v in api.lora_tensors(listed[NEW].lora_file).items())
            if listed[NEW].resumable:
                assert all(torch.equal(v, state[k]) for k, v in listed[NEW].tensors().items())
        else:
            assert scene != "only its LoRA is there", "the LoRA that was listed is still there"
        if saved:
            assert listed[NEW].resumable, "a save that returned is on the disk"
        assert run.save(*content(NEW)).resumable
        run.save(*content(NEW + 5))
        assert [c.step for c in run.checkpoints() if c.resumable] == [NEW, NEW + 5]
        assert len(list(folder.rglob(STATE))) == 2, "older states are gone, whatever the fault left of them"
    finally:
        run.close()


def cases(history: Path, tmp_path: Path, scene: str, **fault: Any) -> Any:
    """Yield a folder and its disk for a fault at every call of one save, and at last for none."""
    for at in range(1, 200):
        folder = before_new(history, tmp_path / f"{at}" / "run", scene)
        disk = Disk(folder, at, **fault)
        yield folder, disk
        if len(disk.calls) < at:
            return
        shutil.rmtree(tmp_path / f"{at}")
    raise AssertionError("a save has no end")


# ---- kills and power cuts at every call ----


@pytest.mark.parametrize("power", ["stays", "fails", "fails, renames lost"])
@pytest.mark.parametrize("scene", SCENES)
def test_a_kill_at_any_call_of_a_save(history: Path, tmp_path: Path, scene: str, power: str) -> None:
    tried = 0
    for folder, disk in cases(history, tmp_path, scene):
        returned = False
        try:
            with disk.watching():
                save(folder, NEW)
            returned = True
        except Killed:
            tried += 1
        if power != "stays":
            disk.cut_power(lose_renames="lost" in power)
        check(folder, history, scene, saved=returned)
    assert tried >= 25, "the calls of a save are seen"


def test_a_save_syncs_before_it_shows(history: Path, tmp_path: Path) -> None:
    """Files, then the manifest, are complete and synced in a temporary folder before it gets its name."""
    folder = before_new(history, tmp_path / "run", SCENES[0])
    disk = Disk(folder)
    with disk.watching():
        save(folder, NEW)
    kinds = [kind for kind, _ in disk.calls]
    appeared = [Path(path).name for kind, path in disk.calls if kind == "rename"]
    assert appeared == [LORA, STATE, INFO, MANIFEST, "step-000015", MANIFEST]
    shown = next(i for i, (k, p) in enumerate(disk.calls) if k == "rename" and p.endswith("step-000015"))
    assert kinds[:shown].count("sync file") == 4
    assert kinds[:shown].count("sync folder") == 4
    assert kinds[shown + 1] == "sync folder"
    assert kinds[-1] == "unlink", "an older state goes last"


def broken_in_place(self: RunFolder, target: Path, *parts: Any) -> None:
    """Write into the checkpoint's own folder, the manifest at the end."""
    target.mkdir(parents=True, exist_ok=True)
    checkpoint.write_safetensors(target / LORA, parts[0], parts[1])
    checkpoint.write_safetensors(target / STATE, parts[2])
    checkpoint.write_text(target / INFO, json.dumps(parts[3]))
    checkpoint._write_manifest(target, [LORA, STATE, INFO])


def broken_drop_first(self: RunFolder, target: Path, *parts: Any) -> None:
    """Drop older states before the new one is written."""
    (self.path / "ckpt" / "step-000005" / STATE).unlink()
    REAL_WRITE(self, target, *parts)


def broken_delete_first(self: RunFolder, target: Path, *parts: Any) -> None:
    """Remove what lies in the place before the new one is written."""
    shutil.rmtree(target, ignore_errors=True)
    REAL_WRITE(self, target, *parts)


REAL_WRITE = RunFolder._write


@pytest.mark.parametrize(
    ("scene", "mutant", "syncs"),
    [
        (SCENES[0], REAL_WRITE, "no files"),
        (SCENES[0], REAL_WRITE, "no folders"),
        (SCENES[1], broken_in_place, "all"),
        (SCENES[0], broken_drop_first, "all"),
        (SCENES[1], broken_delete_first, "all"),
    ],
    ids=["no file sync", "no folder sync", "no rename", "drop first", "delete first"],
)
def test_broken_savers_are_caught(
    history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene: str, mutant: Any, syncs: str
) -> None:
    """The checks above can fail: each of these savers breaks them at some call."""
    caught = 0
    for folder, disk in cases(history, tmp_path, scene):
        disk.syncs_files, disk.syncs_folders = syncs != "no files", syncs != "no folders"
        returned = False
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "_write", mutant)
            try:
                with disk.watching():
                    save(folder, NEW)
                returned = True
            except Killed:
                pass
        disk.cut_power(lose_renames=True)
        try:
            check(folder, history, scene, saved=returned)
        except AssertionError:
            caught += 1
    assert caught


# ---- errors at every call ----


@pytest.mark.parametrize("error", list(ERRORS), ids=[errno.errorcode[e] for e in ERRORS])
@pytest.mark.parametrize("scene", SCENES)
def test_an_error_once_is_survived(history: Path, tmp_path: Path, scene: str, error: int) -> None:
    for folder, disk in cases(history, tmp_path, scene, error=error):
        with disk.watching():
            assert save(folder, NEW).resumable
        check(folder, history, scene, saved=True)


@pytest.mark.parametrize("error", list(ERRORS), ids=[errno.errorcode[e] for e in ERRORS])
@pytest.mark.parametrize("scene", SCENES)
def test_an_error_that_stays_is_refused_with_nothing_lost(
    history: Path, tmp_path: Path, scene: str, error: int
) -> None:
    refused = 0
    for folder, disk in cases(history, tmp_path, scene, error=error, always=True):
        returned = False
        try:
            with disk.watching():
                save(folder, NEW)
            returned = True
        except LoraGraftError as caught:
            assert caught.code == ERRORS[error]
            assert str(folder) in caught.where
            refused += 1
        check(folder, history, scene, saved=returned)
    assert refused >= 20


def test_a_disk_known_to_be_full_is_refused_before_anything_is_written(
    history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = before_new(history, tmp_path / "run", SCENES[0])
    before = runs.tree(folder)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=3 * 2**20))
    for write in (lambda: save(folder, NEW), lambda: RunFolder(tmp_path / "new").open()):
        with Refusal("LG-SAVE-001", "64 MiB", "3 MiB"):
            write()
    assert runs.tree(folder) == before
    assert not (tmp_path / "new").exists()


def test_a_place_without_a_size_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As below /proc, and on drives that do not say their size: writing itself tells what is wrong."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(total=0, used=0, free=0))
    RunFolder(tmp_path / "new").open()
    assert (tmp_path / "new").is_dir()
    error = disk_refusal(OSError(errno.ENOENT, "No such file or directory", "x"), tmp_path)
    assert error.code == "LG-SAVE-007"
    assert error.why == "No such file or directory, and the system knows of no disk there."


def test_a_disk_that_changes_what_it_is_given_is_noticed(
    history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = before_new(history, tmp_path / "run", SCENES[0])
    real = checkpoint.sync_folder

    def flip(place: Path) -> None:
        real(place)
        for file in place.glob(f"step-{NEW:06d}/{LORA}"):
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync_folder", flip)
        with Refusal("LG-SAVE-002", "step 15", str(folder)):
            save(folder, NEW)
    assert {c.step for c in RunFolder(folder).checkpoints() if c.resumable} == {5, 10}
    check(folder, history, "a broken one is there")
