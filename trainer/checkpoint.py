"""The run folder: checkpoints that are complete and verified, or not there at all.

A checkpoint is written into a temporary folder beside its place, synced, renamed, opened again and
verified against its manifest; only then are older training states dropped. safetensors and JSON only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file

from .errors import LoraGraftError
from .safefile import replace, sync_folder, write_safetensors, write_text

LORA = "lora.safetensors"
STATE = "train_state.safetensors"
INFO = "state.json"
MANIFEST = "manifest.json"
KEEP_STATES = 2
SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; ``resumable`` is False where only the LoRA was kept."""

    step: int
    folder: Path
    resumable: bool

    @property
    def lora_file(self) -> Path:
        """The LoRA as of this step."""
        return self.folder / LORA

    def info(self) -> dict[str, Any]:
        """Return what state.json holds."""
        result: dict[str, Any] = json.loads((self.folder / INFO).read_text(encoding="utf-8"))
        return result

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the training state's tensors."""
        return load_file(self.folder / STATE)

    def losses(self) -> list[float]:
        """Return the loss of every micro-batch so far."""
        with safe_open(self.folder / STATE, framework="pt") as file:
            values: list[float] = file.get_tensor("micro_losses").tolist()
        return values


class RunFolder:
    """One run's folder; locked while a run works in it, so that two cannot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / "run.lock")

    def open(self) -> None:
        """Create and lock the folder and sweep what a crash left; raises LG-RUN-003 if it is held."""
        _refuse_full_disk(lambda: (self.path / "ckpt").mkdir(parents=True, exist_ok=True), self.path, 0)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise LoraGraftError(
                "LG-RUN-003",
                "Another process is training this very run.",
                where=str(self.path),
                why="two processes would write the same checkpoints.",
                fix="wait for it to end or stop it, or give this run another output_name or seed",
            ) from None
        for leftover in (self.path / "ckpt").glob("*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def set_aside(self) -> None:
        """Rename the checkpoints so far to ckpt-old, replacing an older one: the run starts anew."""
        old = self.path / "ckpt-old"
        shutil.rmtree(old, ignore_errors=True)
        replace(self.path / "ckpt", old)
        (self.path / "ckpt").mkdir()

    def checkpoints(self) -> list[Checkpoint]:
        """List the checkpoints that verify, oldest first."""
        found = (verified(folder) for folder in sorted((self.path / "ckpt").glob("step-*[0-9]")))
        return [c for c in found if c is not None]

    def save(
        self,
        step: int,
        lora: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        state: Mapping[str, torch.Tensor],
        info: Mapping[str, Any],
    ) -> Checkpoint:
        """Write and verify the checkpoint of ``step``; a complete one already there is kept.

        Raises LG-SAVE-001 when the disk is full and LG-SAVE-002 when what was written does not read back.
        """
        target = self.path / "ckpt" / f"step-{step:06d}"
        existing = verified(target)
        if existing is not None and existing.resumable:
            return existing
        needed = sum(t.numel() * t.element_size() for t in (*lora.values(), *state.values()))
        _refuse_full_disk(lambda: self._write(target, lora, metadata, state, info), self.path, needed)
        saved = verified(target)
        if saved is None:
            raise LoraGraftError(
                "LG-SAVE-002",
                f"The checkpoint of step {step} does not read back as it was written.",
                where=str(target),
                why="the disk or its connection changed the data.",
                fix="check the disk; queueing again continues from the newest earlier checkpoint",
            )
        self._drop_old_states()
        return saved

    def _write(
        self,
        target: Path,
        lora: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        state: Mapping[str, torch.Tensor],
        info: Mapping[str, Any],
    ) -> None:
        temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            temporary.mkdir(parents=True)
            write_safetensors(temporary / LORA, lora, metadata)
            write_safetensors(temporary / STATE, state)
            write_text(temporary / INFO, json.dumps(info, sort_keys=True, indent=1))
            _write_manifest(temporary, [LORA, STATE, INFO])
            if target.exists():  # broken or without a training state: the new one replaces it
                shutil.rmtree(target)
            replace(temporary, target)
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _drop_old_states(self) -> None:
        resumable = [c for c in self.checkpoints() if c.resumable]
        for checkpoint in resumable[:-KEEP_STATES]:
            _write_manifest(checkpoint.folder, [LORA, INFO])
            (checkpoint.folder / STATE).unlink()


def verified(folder: Path) -> Checkpoint | None:
    """Return the checkpoint in ``folder`` if every file in its manifest has the listed size and sha256."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names = set(manifest)
        if not {LORA, INFO} <= names <= {LORA, STATE, INFO}:
            return None
        for name, entry in manifest.items():
            file = folder / name
            if file.stat().st_size != entry["size"] or _sha256(file) != entry["sha256"]:
                return None
        return Checkpoint(int(folder.name.removeprefix("step-")), folder, STATE in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not a checkpoint: the caller looks at the next one


def _write_manifest(folder: Path, names: list[str]) -> None:
    entries = {n: {"size": (folder / n).stat().st_size, "sha256": _sha256(folder / n)} for n in names}
    write_text(folder / MANIFEST, json.dumps(entries, sort_keys=True, indent=1))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _refuse_full_disk(write: Any, folder: Path, needed: int) -> None:
    """Call ``write``; a full disk, known beforehand or met on the way, becomes LG-SAVE-001."""
    free = _free_bytes(folder)
    if free is not None and free < needed + SPARE_BYTES:
        raise _disk_full(folder, needed, free)
    try:
        write()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _disk_full(folder, needed, _free_bytes(folder) or 0) from error


def _free_bytes(folder: Path) -> int | None:
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def _disk_full(folder: Path, needed: int, free: int) -> LoraGraftError:
    return LoraGraftError(
        "LG-SAVE-001",
        "The disk is full.",
        where=str(folder),
        why=f"a checkpoint needs {(needed + SPARE_BYTES) / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free.",
        fix="free some space and queue again: training continues from the newest complete checkpoint",
    )
