"""A run's records on disk: settings as TOML, steps as JSON, lines for reading, TensorBoard."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from .config import TrainConfig, as_dict
from .data.train_set import TrainSet
from .errors import LoraGraftError
from .events import Step, Validated
from .families.opening import Base
from .safefile import write_text


def write_settings(folder: Path, train_set: TrainSet, config: TrainConfig, base: Base) -> None:
    """Write run.toml: the resolved settings, as the command line reads them."""
    tables = {"dataset": as_dict(train_set.config), "train": as_dict(config)}
    head = f"# base {base.weights_hash}\n# data {train_set.fingerprint}\n"
    write_text(folder / "run.toml", head + "\n".join(_table(name, values) for name, values in tables.items()))


class RunLog:
    """log.jsonl (every step), validation.jsonl (every validation), log.log (for reading), TensorBoard.

    A continued run drops what is to be done again.
    """

    def __init__(self, folder: Path, first_step: int, last_measured: int, log_with: str = "auto") -> None:
        self.folder, self._with = folder, log_with
        self._steps, self._validations = folder / "log.jsonl", folder / "validation.jsonl"
        self._board: Any = None
        self._cut(first_step, last_measured)

    def _cut(self, last_step: int, last_measured: int) -> None:
        for file, last in ((self._steps, last_step), (self._validations, last_measured)):
            if file.exists():
                lines = file.read_text(encoding="utf-8").splitlines()
                write_text(file, "".join(line + "\n" for line in lines if _step_of(line) <= last))
        if self._with != "none":
            self._board = _tensorboard(self.folder / "tensorboard", last_step)

    def __enter__(self) -> RunLog:
        self._jsonl = self._steps.open("a", encoding="utf-8")
        self._log = (self.folder / "log.log").open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, GeneratorExit):
            self.lines([str(error)])
        self._jsonl.close()
        self._log.close()
        if self._board is not None:
            self._board.close()

    def rewind(self, last_step: int, last_measured: int) -> None:
        """Forget what came after: the run went back."""
        self._jsonl.close()
        if self._board is not None:
            self._board.close()
        self._cut(last_step, last_measured)
        self._jsonl = self._steps.open("a", encoding="utf-8")

    def step(self, event: Step) -> None:
        """Record one step."""
        finite = {k: None if _is_infinite(v) else v for k, v in dataclasses.asdict(event).items()}
        self._jsonl.write(json.dumps(finite) + "\n")
        self._jsonl.flush()
        norms = "".join(f" {name} {value:.4g}" for name, value in event.key_norms.items())
        steps = f"step {event.step}/{event.total_steps}"
        self.lines([f"{steps} loss {event.loss:.5f} avr_loss {event.avr_loss:.5f}{norms}"])
        if self._board is not None:
            self._board.add_scalar("loss/current", event.loss, event.step)
            self._board.add_scalar("loss/average", event.avr_loss, event.step)
            for part, rate in event.learning_rates.items():
                self._board.add_scalar(f"lr/{part}", rate, event.step)
            for name, value in event.key_norms.items():
                self._board.add_scalar(f"max_norm/{name}", value, event.step)

    def validated(self, event: Validated) -> None:
        """Record one validation, image by image."""
        entry = {"step": event.step, "loss": event.loss, "images": dict(event.images)}
        with self._validations.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if self._board is not None:
            self._board.add_scalar("loss/validation", event.loss, event.step)

    def lines(self, lines: Iterable[str]) -> None:
        """Record lines for reading."""
        self._log.writelines(line + "\n" for line in lines)
        self._log.flush()


def check_logger(log_with: str) -> None:
    """Raise LG-RUN-013 where TensorBoard is asked for and not installed."""
    if log_with == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError:
            raise LoraGraftError(
                "LG-RUN-013",
                "TensorBoard files are asked for, and tensorboard is not installed.",
                where="log_with: tensorboard",
                why="nothing could write them.",
                fix="pip install tensorboard, or set log_with to auto: log.jsonl holds the same figures",
            ) from None


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # optional: the JSON log holds the same figures
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _is_infinite(value: Any) -> bool:
    """Say whether JSON has no number for it: the gradient of a step that the loss scaler skipped."""
    return isinstance(value, float) and not math.isfinite(value)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut short by a crash: dropped


def _table(name: str, values: dict[str, Any]) -> str:
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    return f"[{name}]\n" + "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        # TOML's basic strings escape as JSON's do, but for the DEL character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
