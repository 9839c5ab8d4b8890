"""Short runs on the tiny base: settings, and ways to drive a run to an event, to its end or to a stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from loragraft.trainer import api, loop
from loragraft.trainer.data.batches import Batch, plan_epoch

Kind = TypeVar("Kind")
SMALL_BUCKETS = {"resolution": 32, "min_bucket_reso": 16, "max_bucket_reso": 64, "bucket_reso_steps": 8}


def train_set(folder: Path, **settings: Any) -> api.TrainSet:
    """Scan a folder and freeze it with buckets around 32x32."""
    config = api.make(api.DatasetConfig, {**SMALL_BUCKETS, **settings})
    return api.build_train_set(api.scan_folder(folder), config)


def settings(**changes: Any) -> api.TrainConfig:
    """Return the settings of a short run with a batch size that leaves a partial batch."""
    values = {
        "output_name": "x",
        "network_dim": 4,
        "network_alpha": 2,
        "learning_rate": 1e-3,
        "max_train_steps": 4,
        "train_batch_size": 3,
        "sample_steps": 2,
        "preview_image": False,
    }
    return api.make(api.TrainConfig, {**values, **changes})


@dataclass(frozen=True)
class Training:
    """One way to call ``api.train`` again and again: the same base, images and places."""

    base: api.Base
    train_set: api.TrainSet
    places: api.Places

    def elsewhere(self, name: str, **changes: Any) -> Training:
        """Return the same runs in other folders, beside these."""
        root = self.places.runs.parent / name
        places = api.Places(root / "runs", root / "loras", root / "cache")
        return dataclasses.replace(self, places=places, **changes)

    def start(self, *, workflow: str | None = None, fresh: bool = False, **changes: Any) -> Any:
        """Return the run's generator of events."""
        return api.train(
            self.base,
            self.train_set,
            settings(**changes),
            places=self.places,
            device="cpu",
            workflow=workflow,
            fresh=fresh,
        )

    def events(self, **changes: Any) -> list[api.Event]:
        """Run to the end and return all events."""
        return list(self.start(**changes))

    def finish(self, **changes: Any) -> api.Finished:
        """Run to the end and return the last event."""
        return only(self.events(**changes), api.Finished)

    def stop_after(self, step: int, **changes: Any) -> None:
        """Run until ``step`` is taken, then close the run as Cancel does."""
        with closing(self.start(**changes)) as events:
            for event in events:
                if isinstance(event, api.Step) and event.step == step:
                    return
        raise AssertionError(f"the run ended before step {step}")


def trained(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """Return the tensors that an optimizer trains."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def of(events: list[api.Event] | Iterator[api.Event], kind: type[Kind]) -> list[Kind]:
    """Return the events of one kind."""
    return [event for event in events if isinstance(event, kind)]


def only(events: list[api.Event], kind: type[Kind]) -> Kind:
    """Return the one event of this kind."""
    (event,) = of(events, kind)
    return event


def losses(events: list[api.Event]) -> list[float]:
    """Return the loss of every step."""
    return [event.loss for event in of(events, api.Step)]


def epoch_parts(train_set: api.TrainSet, epoch: int, accumulation: int) -> list[list[Batch]]:
    """Return the epoch's batches at seed 42 and batch size 3, as many to a step as are accumulated."""
    plan = plan_epoch(train_set, 3, 42, epoch)
    return [plan[i : i + accumulation] for i in range(0, len(plan), accumulation)]


def newest(run_folder: Path) -> Path:
    """Return the newest checkpoint's folder."""
    return max((run_folder / "ckpt").glob("step-??????"))


def run_folder(places: api.Places) -> Path:
    """Return the only run's folder."""
    (folder,) = places.runs.iterdir()
    return folder


def tree(root: Path) -> dict[str, bytes]:
    """Return every file below ``root`` with its content."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


class Enough(Exception):
    """What was to be seen was seen."""


def look_inside(
    training: Training, monkeypatch: pytest.MonkeyPatch, look: Callable[[Any], None], **changes: Any
) -> None:
    """Open a run, prepare its data, and end it after ``look``."""

    def begin(run: Any, *_: Any) -> None:
        list(run.inputs.prepare())
        look(run)
        raise Enough

    with monkeypatch.context() as patched, pytest.raises(Enough):
        patched.setattr(loop, "begin", begin)
        list(training.start(**changes))
