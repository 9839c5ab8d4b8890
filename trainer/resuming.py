"""A run's state: all that a continued run needs, and how a run is put back to where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError

from .checkpoint import Checkpoint, measures_of
from .errors import LoraGraftError, one_line
from .optim.state import pack, unpack
from .run import Run


def training_state(run: Run) -> dict[str, torch.Tensor]:
    """Return all that a continued run needs: adapter and optimizer state in full precision, losses."""
    tensors = {f"adapter.{k}": v for k, v in run.adapter.state_dict().items()}
    tensors.update(run.words.state())
    tensors.update(pack(run.optimizer))
    if run.average is not None:
        tensors.update(run.average.state())
    tensors["micro_losses"] = torch.tensor(run.micro_losses, dtype=torch.float32)
    return tensors


def training_facts(run: Run) -> dict[str, Any]:
    """Return what `training_state` needs beside tensors, as JSON holds it; empty for most runs."""
    facts: dict[str, Any] = {}
    if run.scaler.is_enabled():
        facts["scaler"] = run.scaler.state_dict()
    if run.measures:
        facts["measures"] = [list(measure) for measure in run.measures]
    if run.rolled_back is not None:
        facts["rolled_back"] = list(run.rolled_back)
    return facts


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put the run back to where ``checkpoint`` was written; raises LG-RUN-007 if it does not fit."""
    try:
        put_back(run, checkpoint.step, checkpoint.tensors(), checkpoint.info())
    except (
        *(SafetensorError, KeyError, TypeError, ValueError, IndexError),
        *(RuntimeError, AttributeError, OverflowError),
    ) as error:
        raise unfit(checkpoint, one_line(str(error), 200)) from error


def put_back(run: Run, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Put the run back to ``step``, of which `training_state` and `training_facts` were kept."""
    run.adapter.load_state_dict(
        {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")}
    )
    run.words.load(tensors)
    unpack(run.optimizer, tensors)
    if run.average is not None:
        run.average.load(tensors)
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(facts["scaler"])
    run.engine.reload(run.adapter.row)
    run.micro_losses = tensors["micro_losses"].tolist()
    if len(run.micro_losses) != run.plan.micro_batches(step):
        raise ValueError("it took other batches")
    run.measures = measures_of(facts)
    went_back = facts.get("rolled_back")
    run.rolled_back = None if went_back is None else (int(went_back[0]), int(went_back[1]))
    run.step = step


def share_state(run: Run) -> None:
    """Bring the run to where the process that writes has it, in every other process."""
    told = run.world.spread(lambda: (training_state(run), {**training_facts(run), "step": run.step}))
    if told is not None:
        put_back(run, int(told[1]["step"]), *told)


def unfit(checkpoint: Checkpoint, why: str) -> LoraGraftError:
    """Return the refusal of a checkpoint that is whole, but not this run's."""
    return LoraGraftError(
        "LG-RUN-007",
        f"The checkpoint of step {checkpoint.step} cannot be continued.",
        where=str(checkpoint.folder),
        why=f"it does not fit this run: {why}.",
        fix="start the run afresh (existing_run on the node, --fresh on the command line)",
    )
