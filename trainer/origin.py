"""Which earlier run a run continues with a new number of steps: the setting `resume`.

Where the schedule does not depend on the number of steps, a longer run is the same run and goes on by itself.
Elsewhere it is another run that begins with the earlier one's weights, optimizer, losses and place in the
data; its schedule counts with the new number. Folders of runs are untrusted: only JSON and safetensors are
read, and only from checkpoints that verify.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import INFO, STATE, Checkpoint, RunFolder, verified
from .errors import LoraGraftError, one_line
from .paths import resolve
from .plan import Plan

AUTO = "auto"
MAX_INFO_BYTES = 2**20


@dataclass(frozen=True)
class Origin:
    """Where a run came from; ``checkpoint`` is None where that is no longer there."""

    run: str
    step: int
    checkpoint: Checkpoint | None

    def identity(self, run_id: str) -> str:
        """Return the hash of a run that would be ``run_id`` by its settings and continues this one."""
        return hashlib.sha256(f"{run_id}/{self.run}/{self.step}".encode()).hexdigest()


def named_origin(runs: Path, text: str, plan: Plan, base_hash: str) -> Origin:
    """Return the checkpoint that ``text`` names: a run's folder below ``runs``, or one of its ckpt/step-...

    Raises what `paths.resolve` raises, LG-RUN-007 where it does not fit this run and LG-CFG-004 where
    nothing is left to train.
    """
    folder = resolve(runs, text, what="resume", must_exist=True)
    if folder.parent.name == "ckpt":
        found = verified(folder)
    else:
        found = next((c for c in reversed(RunFolder(folder).checkpoints()) if c.resumable), None)
    if found is None or not found.resumable:
        raise _unfit(text, "there is no whole checkpoint with a training state")
    info = found.info()
    if info.get("base") != base_hash:
        raise _unfit(text, "it was trained on another base model")
    if _plan(info)[:2] != (plan.batches_per_epoch, plan.accumulation):
        raise _unfit(text, "its images, batch size or accumulation made other batches")
    if found.step >= plan.total_steps:
        raise LoraGraftError(
            "LG-CFG-004",
            f"resume names step {found.step}, and the run is to end at step {plan.total_steps}.",
            where=f"resume: {one_line(text, 80)}",
            why="nothing would be left to train.",
            fix="raise max_train_steps or max_train_epochs: they count from the very beginning",
        )
    return Origin(found.run, found.step, found)


def auto_origin(runs: Path, kin: str, plan: Plan) -> Origin | None:
    """Return the longest run that differs from this one in its number of steps alone; None if there is none.

    A run that was continued before with this number of steps keeps the origin that it had.
    """
    infos = [(f, i) for f in _newest_states(runs) if (i := _info(f)).get("kin") == kin]
    total = plan.total_steps
    for _, info in infos:
        if _plan(info)[2] == total and (come := _origin(info)) is not None:
            return Origin(*come, _find(runs, *come))
    others = [(_step(f), f.name, f) for f, i in infos if _plan(i)[2] != total and _step(f) < total]
    for _, _, folder in sorted(others, reverse=True):
        if (found := verified(folder)) is not None and found.resumable:
            return Origin(found.run, found.step, found)
    return None


def origin_is_gone(origin: Origin) -> LoraGraftError:
    """Return the refusal of a run whose beginning was deleted before it had a state of its own."""
    return _unfit(f"run {origin.run[:8]}, step {origin.step}", "the checkpoint that it began with is gone")


def _newest_states(runs: Path) -> Iterator[Path]:
    """Yield the newest checkpoint folder of each run that holds a training state; nothing is verified yet."""
    for folder in sorted(runs.glob("*/ckpt")) if runs.is_dir() else ():
        steps = [f for f in folder.glob("step-*") if _step(f) >= 0 and (f / STATE).is_file()]
        if steps:
            yield max(steps, key=_step)


def _find(runs: Path, run: str, step: int) -> Checkpoint | None:
    for folder in sorted(runs.glob(f"*/ckpt/step-{step:06d}")):
        if _info(folder).get("run") == run and (found := verified(folder)) is not None and found.resumable:
            return found
    return None


def _info(folder: Path) -> dict[str, Any]:
    """Read a state.json of any content; {} where it is none."""
    try:
        file = folder / INFO
        if file.stat().st_size > MAX_INFO_BYTES:
            return {}
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _plan(info: dict[str, Any]) -> tuple[Any, ...]:
    found = info.get("plan")
    return tuple(found) if isinstance(found, list) and len(found) == 3 else (None, None, None)


def _origin(info: dict[str, Any]) -> tuple[str, int] | None:
    found = info.get("origin")
    if isinstance(found, list) and len(found) == 2 and isinstance(found[0], str) and type(found[1]) is int:
        return found[0], found[1]
    return None


def _step(folder: Path) -> int:
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 12 else -1


def _unfit(text: str, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-RUN-007",
        "The run that resume names cannot be continued.",
        where=f"resume: {one_line(text, 80)}",
        why=f"{why}.",
        fix="name another run, or take resume away; to train a finished LoRA on, give it as network_weights",
    )
