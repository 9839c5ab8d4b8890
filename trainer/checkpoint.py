"""The run folder: checkpoints that are complete and verified, or not there at all.

A checkpoint is written into a temporary folder beside its place, synced, renamed, opened again and
verified against its manifest; only then are older training states dropped. safetensors and JSON only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file

from .errors import LoraGraftError
from .safefile import DISK_FULL, replace, sync_folder, write_safetensors, write_text
from .trends import Measure

LORA = "lora.safetensors"
STATE = "train_state.safetensors"
INFO = "state.json"
MANIFEST = "manifest.json"
ENDED = "ended.json"
MARK = ".tmp-"  # in the name of what is being written
DROPPED = ".dropped-"  # in the name of what is being deleted
KEEP_STATES = 2
SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint of the run ``run``; ``resumable`` is False where only the LoRA was kept."""

    step: int
    folder: Path
    run: str
    resumable: bool

    @property
    def lora_file(self) -> Path:
        """The LoRA as of this step."""
        return self.folder / LORA

    def info(self) -> dict[str, Any]:
        """Return what state.json holds."""
        result: dict[str, Any] = json.loads((self.folder / INFO).read_text(encoding="utf-8"))
        return result

    def remarks(self) -> dict[str, str]:
        """Return what the LoRA's metadata says of a run that did not go straight."""
        found = self.info().get("remarks", {})
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    def embeddings(self) -> dict[str, torch.Tensor]:
        """Return the trained embeddings of words, (vectors, D) float32 each."""
        return {word: torch.tensor(rows) for word, rows in self.info().get("embeddings", {}).items()}

    def measures(self) -> list[Measure]:
        """Return the validations so far."""
        return measures_of(self.info())

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
        self._checkpoints = path / "ckpt"
        # Not bound to a thread: a host may close a run from another one than it started in.
        self._lock = FileLock(path / "run.lock", thread_local=False)

    @property
    def preview(self) -> Path:
        """The image that is drawn at the end of the run."""
        return self.path / "samples" / "preview.png"

    def open(self) -> None:
        """Create and lock the folder and sweep what a crash left; raises LG-RUN-003 if it is held."""
        check_space(self.path, 0)
        self._checkpoints.mkdir(parents=True, exist_ok=True)
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
        self._sweep()

    def ended_at(self) -> int:
        """Return the step at which the run came to its end, all that belongs to it done; 0 before that."""
        try:
            return int(json.loads((self.path / ENDED).read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
            return 0

    def end(self, step: int) -> None:
        """Note that the run came to its end at ``step``: what is left is to publish it."""
        write_text(self.path / ENDED, json.dumps({"step": max(step, self.ended_at())}))

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def set_aside(self) -> None:
        """Rename the checkpoints so far to ckpt-old, replacing an older one: the run starts anew."""
        old = self.path / "ckpt-old"
        shutil.rmtree(old, ignore_errors=True)
        replace(self._checkpoints, old)
        (self.path / ENDED).unlink(missing_ok=True)
        self._checkpoints.mkdir()

    def checkpoints(self) -> list[Checkpoint]:
        """List the checkpoints that verify, oldest first."""
        found = (verified(folder) for folder in self._folders())
        return sorted((c for c in found if c is not None), key=lambda c: c.step)

    def save(
        self,
        step: int,
        lora: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        state: Mapping[str, torch.Tensor],
        info: Mapping[str, Any],
        keeps_state: Callable[[int], bool] = lambda step: False,
    ) -> Checkpoint:
        """Write and verify the checkpoint of ``step``; a complete one already there is kept.

        Training states stay of the newest two, and of the steps of which ``keeps_state`` says so.
        What fails once is tried again. Raises LG-SAVE-001 when the disk is full, LG-SAVE-007 when it
        cannot be written to, and LG-SAVE-002 when what was written does not read back.
        """
        target = self._checkpoints / f"step-{step:06d}"
        existing = verified(target)
        if existing is not None and existing.resumable:
            return existing
        needed = sum(t.numel() * t.element_size() for t in (*lora.values(), *state.values()))
        check_space(self.path, needed)
        try:
            try:
                self._write(target, lora, metadata, state, info)
            except OSError:  # a network drive or a virus scanner may have been in the way for a moment
                self._write(target, lora, metadata, state, info)
        except OSError as error:
            raise disk_refusal(error, self.path, needed) from error
        saved = verified(target)
        if saved is None:
            raise LoraGraftError(
                "LG-SAVE-002",
                f"The checkpoint of step {step} does not read back as it was written.",
                where=str(target),
                why="the disk or its connection changed the data.",
                fix="check the disk; queueing again continues from the newest earlier checkpoint",
            )
        self.drop_old_states(keeps_state)
        return saved

    def drop(self, step: int) -> None:
        """Delete the checkpoint of ``step``: gone at once by its name, then from the disk."""
        folder = self._checkpoints / f"step-{step:06d}"
        gone = folder.with_name(f"{folder.name}{DROPPED}{uuid.uuid4().hex[:8]}")
        replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _write(
        self,
        target: Path,
        lora: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        state: Mapping[str, torch.Tensor],
        info: Mapping[str, Any],
    ) -> None:
        temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
        old = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            temporary.mkdir(parents=True)
            write_safetensors(temporary / LORA, lora, metadata)
            write_safetensors(temporary / STATE, state)
            write_text(temporary / INFO, json.dumps(info, sort_keys=True, indent=1))
            _write_manifest(temporary, [LORA, STATE, INFO])
            if target.exists():  # broken, or without a training state; kept until the new one is in place
                replace(target, old)
            replace(temporary, target)
            sync_folder(target.parent)
        except Exception:
            if old.exists() and not target.exists():
                replace(old, target)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return [f for f in self._checkpoints.glob("step-*") if MARK not in f.name]

    def _sweep(self) -> None:
        """Put checkpoints in place that a crash left complete under a temporary name; remove the rest."""
        left = [(f, verified(f)) for f in self._checkpoints.glob(f"step-*{MARK}*")]
        for folder, found in sorted(
            left, key=lambda item: item[1] is not None and item[1].resumable, reverse=True
        ):
            target = folder.with_name(folder.name.split(MARK)[0])
            if found is not None and verified(target) is None:
                shutil.rmtree(target, ignore_errors=True)
                replace(folder, target)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        for folder in self._checkpoints.glob(f"step-*{DROPPED}*"):
            shutil.rmtree(folder, ignore_errors=True)
        for file in self.path.rglob(f"*{MARK}*"):
            with contextlib.suppress(OSError):
                file.unlink()

    def drop_old_states(self, keeps_state: Callable[[int], bool]) -> None:
        """Keep the newest training states, and wished ones; of older checkpoints the LoRA stays.

        What cannot be deleted now is next time.
        """
        with contextlib.suppress(OSError):
            self._drop_old_states(keeps_state)

    def _drop_old_states(self, keeps_state: Callable[[int], bool]) -> None:
        found = [c for f in self._folders() if (f / STATE).exists() and (c := verified(f)) is not None]
        resumable = sorted((c for c in found if c.resumable), key=lambda c: c.step)
        kept = [c for i, c in enumerate(reversed(resumable)) if i < KEEP_STATES or keeps_state(c.step)]
        for checkpoint in [c for c in resumable if c not in kept]:
            _write_manifest(checkpoint.folder, [LORA, INFO])
        for checkpoint in [c for c in found if c not in kept]:
            (checkpoint.folder / STATE).unlink()


def measures_of(info: Mapping[str, Any]) -> list[Measure]:
    """Read the validations in a state.json; raises ValueError, TypeError, IndexError for others."""
    return [Measure(int(m[0]), float(m[1]), float(m[2]), m[3] is True) for m in info.get("measures", [])]


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
        step = int(folder.name.split(MARK)[0].removeprefix("step-"))
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        return Checkpoint(step, folder, str(info["run"]), STATE in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
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


def disk_refusal(error: OSError, place: Path, needed: int = 0) -> LoraGraftError:
    """Return what to tell the user of a file that could not be read or written."""
    if error.errno in DISK_FULL:
        return _disk_full(place, needed, _free_bytes(place) or 0)
    no_disk = ", and the system knows of no disk there" if _free_bytes(place) is None else ""
    return LoraGraftError(
        "LG-SAVE-007",
        "A file of the run cannot be written or read.",
        where=str(error.filename or place),
        why=f"{error.strerror or error}{no_disk}.",
        fix="allow writing there and check the disk; queueing again continues from the newest checkpoint",
    )


def check_space(folder: Path, needed: int) -> None:
    """Raise LG-SAVE-001 where less than ``needed`` bytes and a reserve are free."""
    free = _free_bytes(folder)
    if free is not None and free < needed + SPARE_BYTES:
        raise _disk_full(folder, needed, free)


def _free_bytes(folder: Path) -> int | None:
    """Return what is free there; None where the system does not say, as of /proc and some drives."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(place)
            return usage.free if usage.total else None
    return None


def _disk_full(folder: Path, needed: int, free: int) -> LoraGraftError:
    return LoraGraftError(
        "LG-SAVE-001",
        "The disk is full.",
        where=str(folder),
        why=f"a checkpoint needs {(needed + SPARE_BYTES) / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free.",
        fix="free some space and queue again: training continues from the newest complete checkpoint",
    )
