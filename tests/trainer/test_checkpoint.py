"""Checkpoints: damage is never listed, enough is kept, and one process at a time works on a run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer import api, checkpoint
from loragraft.trainer.checkpoint import INFO, LORA, MANIFEST, STATE, RunFolder, verified
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.saved import save, write_history

ERRORS = {errno.ENOSPC: "LG-SAVE-001", errno.EIO: "LG-SAVE-007", errno.EACCES: "LG-SAVE-007"}


@pytest.fixture(autouse=True)
def no_real_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real syncs take their time, and no real power is cut."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with checkpoints 2 (the LoRA only), 5 and 10."""
    return write_history(tmp_path_factory.mktemp("history") / "run")


# ---- damage ----


def damages(data: bytes) -> dict[str, bytes | None]:
    """Return versions of a file that differ from it."""
    flips = {
        f"bit {at}": data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        for at in sorted({0, 7, len(data) // 3, len(data) // 2, len(data) - 1})
    }
    return {
        **flips,
        "cut": data[:-1],
        "half": data[: len(data) // 2],
        "empty": b"",
        "longer": data + b"\0",
        "gone": None,
    }


@pytest.mark.parametrize("name", [LORA, STATE, INFO, MANIFEST])
def test_a_damaged_checkpoint_is_not_listed(history: Path, tmp_path: Path, name: str) -> None:
    whole = (history / "ckpt" / "step-000010" / name).read_bytes()
    for kind, data in damages(whole).items():
        folder = shutil.copytree(history, tmp_path / kind)
        file = folder / "ckpt" / "step-000010" / name
        file.unlink()
        if data is not None:
            file.write_bytes(data)
        if name == MANIFEST and kind == "longer":
            continue  # its content is the same
        steps = [c.step for c in RunFolder(folder).checkpoints()]
        assert steps == [2, 5], kind


@pytest.mark.parametrize(
    "manifest",
    [
        {}, [], None, "text", {LORA: {}}, {LORA: 1, INFO: 2}, {"../../x": {"size": 0, "sha256": ""}},
        {LORA: None, INFO: None, STATE: None},
        {LORA: {"size": -1, "sha256": None}, INFO: {"size": 1, "sha256": []}},
    ],
)  # fmt: skip
def test_a_manifest_of_any_content_is_not_believed(history: Path, tmp_path: Path, manifest: Any) -> None:
    folder = shutil.copytree(history, tmp_path / "run") / "ckpt" / "step-000010"
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert verified(folder) is None


def test_a_manifest_that_names_a_file_outside_is_not_read(history: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(history, tmp_path / "run") / "ckpt" / "step-000010"
    entries = json.loads((folder / MANIFEST).read_text("utf-8"))
    (tmp_path / "secret").write_bytes(b"")
    entries["../../../secret"] = {"size": 0, "sha256": checkpoint._sha256(tmp_path / "secret")}
    (folder / MANIFEST).write_text(json.dumps(entries), encoding="utf-8")
    assert verified(folder) is None


def test_a_manifest_of_great_depth(history: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(history, tmp_path / "run") / "ckpt" / "step-000010"
    (folder / MANIFEST).write_text("[" * 200_000, encoding="utf-8")
    assert verified(folder) is None


def test_whatever_else_lies_there_is_no_checkpoint(history: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(history, tmp_path / "run")
    good = folder / "ckpt" / "step-000010"
    for name in ("step-", "step-x", "step-000010-copy", "other", "step-000010.bak"):
        shutil.copytree(good, folder / "ckpt" / name)
    (folder / "ckpt" / "step-000099").write_bytes(b"a file")
    assert [c.folder.name for c in RunFolder(folder).checkpoints()] == [
        "step-000002", "step-000005", "step-000010",
    ]  # fmt: skip


# ---- keeping ----


def test_two_states_and_every_lora_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        saved = save(tmp_path / "run", step)
        assert saved.step == step and saved.resumable
        listed = RunFolder(tmp_path / "run").checkpoints()
        assert [c.step for c in listed] == list(range(1, step + 1))
        assert [c.step for c in listed if c.resumable] == list(range(1, step + 1))[-2:]
        assert len(list((tmp_path / "run").rglob(STATE))) == min(2, step)
        assert listed[-1].losses() == [float(i) for i in range(step)]


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        save(tmp_path / "run", step)
    listed = RunFolder(tmp_path / "run").checkpoints()
    assert [(c.step, c.resumable) for c in listed] == [(999_998, False), (999_999, True), (1_000_000, True)]


def test_a_complete_checkpoint_is_not_written_again(tmp_path: Path) -> None:
    first = save(tmp_path / "run", 3)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in first.folder.iterdir()}
    save(tmp_path / "run", 3)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in first.folder.iterdir()} == before


def test_equal_content_makes_equal_files(tmp_path: Path) -> None:
    save(tmp_path / "a", 3)
    save(tmp_path / "b", 3)
    assert runs.tree(tmp_path / "a") == runs.tree(tmp_path / "b")


# ---- one at a time ----


def test_a_folder_is_opened_once(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.open()
    with Refusal("LG-RUN-003", str(tmp_path / "run")):
        second.open()
    first.close()
    second.open()
    second.close()
    second.close()


def test_a_refused_opener_sweeps_nothing(history: Path, tmp_path: Path) -> None:
    """What looks left over may be what the other process is writing."""
    folder = shutil.copytree(history, tmp_path / "run")
    first = RunFolder(folder)
    first.open()
    writing = folder / "ckpt" / "step-000011.tmp-12345678"
    writing.mkdir()
    with Refusal("LG-RUN-003"):
        RunFolder(folder).open()
    assert writing.is_dir()
    first.close()


# ---- in a run ----


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_run_on_a_failing_disk_stops_and_continues(
    training: runs.Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    options = {"max_train_steps": 6, "save_every_n_steps": 2}
    never = runs.Training(
        training.base, training.train_set, api.Places(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    )
    never.finish(**options)
    real: Callable[..., None] = checkpoint.write_safetensors

    def failing(path: Path, *args: Any) -> None:
        if "step-000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(error, "injected", str(path))
        real(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_safetensors", failing)
        with Refusal(ERRORS[error], "queu"):
            training.events(**options)
    folder = runs.run_folder(training.places)
    assert [p.name for p in (folder / "ckpt").iterdir()] == ["step-000002"]
    assert ERRORS[error] in (folder / "log.log").read_text("utf-8")
    assert not training.places.loras.exists()
    events = training.events(**options)
    assert runs.only(events, api.Planned).first_step == 2
    assert runs.tree(training.places.loras) == runs.tree(never.places.loras)


def test_a_loras_folder_that_cannot_be_written_loses_no_training(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.places.loras.parent.mkdir(exist_ok=True)
    training.places.loras.write_bytes(b"a file where the folder should be")
    with Refusal("LG-SAVE-007", str(training.places.loras)):
        training.events()
    training.places.loras.unlink()
    monkeypatch.setattr(api.Base, "load", lambda self: pytest.fail("trained again"))
    assert training.finish().lora_file.is_file()


def test_a_runs_folder_that_cannot_be_made(training: runs.Training) -> None:
    training.places.runs.write_bytes(b"a file")
    with Refusal("LG-SAVE-007", str(training.places.runs)):
        training.events()


def test_left_over_files_of_a_kill_are_swept_everywhere_in_the_run(training: runs.Training) -> None:
    training.stop_after(1)
    folder = runs.run_folder(training.places)
    left = [folder / "run.toml.tmp-0badc0de", folder / "log.jsonl.tmp-0badc0de"]
    left.append(runs.newest(folder) / "manifest.json.tmp-0badc0de")
    for path in left:
        path.write_bytes(b"half")
    training.finish()
    assert not [p for p in left if p.exists()]
