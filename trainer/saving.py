"""Saves on the way: what a checkpoint holds, which ones stay, which is the best, what is published early."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import metadata
from .adapters.files import as_saved, count_zero
from .checkpoint import Checkpoint, RunFolder
from .config import TrainConfig
from .events import Saved
from .optim.find import optimizer_name
from .plan import Plan, is_due, save_every_epochs
from .publish import checkpoint_name, delete_published, publish_checkpoint, publish_embeddings
from .resuming import training_facts, training_state
from .run import Job, Run, as_used
from .safefile import write_text
from .trends import Measure, best
from .whole_model import write_model

BEST = "best.json"


def save_is_due(run: Run) -> bool:
    """Say whether the run saves after this step."""
    every = run.config.save_every_n_steps, save_every_epochs(run.config, run.plan)
    return run.step == run.plan.total_steps or is_due(run.step, *every, run.plan)


def save(run: Run, job: Job) -> Saved:
    """Write and verify a checkpoint of the run as it is; drop the training states that need not stay."""
    with as_used(run):  # copies, because what is trained comes back to its place afterwards
        lora = {k: v.clone() for k, v in as_saved(run.adapter.saved(), run.config.save_precision).items()}
        embeddings = run.words.saved()
    remarks = remarks_of(run, job)
    texts = describe(job, run.step, remarks)
    info = {
        "step": run.step,
        "run": run.run_id,
        "torch": torch.__version__,
        "device": run.precision.device.type,
        "engine": run.engine.name,
        "attention": run.attention,
        "kin": job.kin,
        "base": run.base.weights_hash,
        "plan": [run.plan.batches_per_epoch, run.plan.accumulation, run.plan.total_steps],
        **({"remarks": remarks} if remarks else {}),
        **({"embeddings": embeddings} if embeddings else {}),
        **({"origin": [job.origin.run, job.origin.step]} if job.origin else {}),
        **training_facts(run),
    }
    checkpoint = run.folder.save(
        run.step,
        lora,
        metadata.with_hashes(texts, lora),
        training_state(run),
        info,
        keeps_state=state_rule(run, job),
    )
    zero = count_zero({k: v for k, v in lora.items() if not k.endswith(".alpha")})
    return Saved(run.step, checkpoint.folder, checkpoint.lora_file, len(lora), zero)


def state_rule(run: Run, job: Job) -> Callable[[int], bool]:
    """Return a function that says of which steps the training state stays, beside the newest ones."""
    rule = Kept(job.config, job.plan, states=True)
    return lambda step: rule.by_rule(step, run.step)


def remarks_of(run: Run, job: Job) -> dict[str, str]:
    """Return what the LoRA's metadata says of a run that did not go straight."""
    remarks = {}
    if job.origin is not None:
        remarks["loragraft_continues"] = f"run {job.origin.run} from step {job.origin.step}"
    if run.rolled_back is not None:
        at, to = run.rolled_back
        remarks["loragraft_rolled_back"] = f"from step {at} to step {to}, from there half the learning rate"
    return remarks


def describe(job: Job, step: int, remarks: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of the run's LoRA at ``step``, all but what depends on its tensors."""
    plan = job.plan
    texts = metadata.build(
        job.base,
        job.train_set,
        job.config,
        run=job.run_id,
        precision=job.precision.name,
        step=step,
        epoch=math.ceil(step / plan.steps_per_epoch),
        total_steps=plan.total_steps,
        num_epochs=plan.num_epochs,
        batches_per_epoch=plan.batches_per_epoch,
        optimizer=optimizer_name(job.config),
    )
    return {**texts, **remarks}


@dataclass(frozen=True)
class Kept:
    """Which saves stay, by the settings: their LoRAs, or with ``states`` their training states.

    As in kohya's trainer: of the saves of every n epochs the last ``save_last_n_epochs``, of those of every n
    steps the ones that are at most ``save_last_n_steps`` steps older than the last of them.
    """

    config: TrainConfig
    plan: Plan
    states: bool = False

    def by_rule(self, step: int, now: int) -> bool:
        """Say whether a rule keeps the save of ``step`` at step ``now``.

        Without any rule all LoRAs stay, and no training state by rule (the newest ones stay anyway). The end
        of the run is no numbered save: it pushes none out.
        """
        now = min(now, self.plan.total_steps - 1)
        config, suffix = self.config, "_state" if self.states else ""
        last_epochs: int | None = getattr(config, f"save_last_n_epochs{suffix}")
        last_steps: int | None = getattr(config, f"save_last_n_steps{suffix}")
        if last_epochs is None and last_steps is None:
            return not self.states
        epochs = save_every_epochs(config, self.plan)
        apart = None if epochs is None else epochs * self.plan.steps_per_epoch
        reach = None if last_epochs is None or apart is None else (last_epochs - 1) * apart
        return self._within(step, now, apart, reach) or self._within(
            step, now, config.save_every_n_steps, last_steps
        )

    def _within(self, step: int, now: int, apart: int | None, reach: int | None) -> bool:
        """Say whether ``step`` is one of the saves that lie ``apart``, at most ``reach`` before the last."""
        if apart is None or step % apart:
            return False
        return not self.states if reach is None else step >= now // apart * apart - reach


def names_of(name: str, step: int, config: TrainConfig, plan: Plan) -> list[str]:
    """Return the names under which the save of ``step`` is published on the way, as kohya's trainer has them.

    One after an epoch, one after so many steps, or both; none at the end: that file has no number.
    """
    if not config.publish_checkpoints or step >= plan.total_steps:
        return []
    names = []
    if is_due(step, None, save_every_epochs(config, plan), plan):
        names.append(f"{name}-{step // plan.steps_per_epoch:06d}")
    if is_due(step, config.save_every_n_steps, None, plan):
        names.append(f"{name}-step{step:08d}")
    return names


@dataclass(frozen=True)
class Shelf:
    """Where a run's files appear: LoRAs, trained embeddings, and whole models where these are made too."""

    loras: Path
    embeddings: Path
    models: Path | None

    @property
    def folders(self) -> list[Path]:
        """All folders, each once."""
        found = (self.loras, self.embeddings, self.models)
        return list(dict.fromkeys(folder for folder in found if folder is not None))


def publish_on_the_way(shelf: Shelf, name: str, job: Job, checkpoint: Checkpoint) -> list[Path]:
    """Put a save into the folders under its names; a file of others' is left and a number appended."""
    texts = describe(job, checkpoint.step, checkpoint.remarks())
    written = []
    for wished in names_of(name, checkpoint.step, job.config, job.plan):
        own = checkpoint_name(shelf.loras, wished, job.run_id)
        written.append(publish_checkpoint(shelf.loras, own, checkpoint, texts))
        publish_embeddings(shelf.embeddings, own, checkpoint, texts)
        if shelf.models is not None:
            own = checkpoint_name(shelf.models, wished, job.run_id)
            written.append(write_model(shelf.models, own, job.base, checkpoint, job.config, texts))
    return written


def most_models(job: Job) -> int:
    """Return how many whole models a run may come to have beside each other."""
    if job.config.save_as != "checkpoint":
        return 0
    total, kept = job.plan.total_steps, Kept(job.config, job.plan)
    return 1 + sum(
        len(names_of("", step, job.config, job.plan)) for step in range(1, total) if kept.by_rule(step, total)
    )


def thin_out(run: Run, job: Job, shelf: Shelf, name: Callable[[], str]) -> list[int]:
    """Drop the saves that need not stay, and their published files; return their steps.

    The best, the newest, and those with a training state to keep stay.
    """
    if job.config.save_last_n_epochs is None and job.config.save_last_n_steps is None:
        return []
    rule, good = Kept(job.config, job.plan), best(run.measures)
    dropped = []
    for checkpoint in run.folder.checkpoints():
        step = checkpoint.step
        if rule.by_rule(step, run.step) or step == run.step or (good is not None and step == good.step):
            continue
        with suppress(OSError):  # tried again at the next save
            for published in names_of(name(), step, job.config, job.plan):
                for folder in shelf.folders:
                    delete_published(folder, published, job.run_id)
            if not checkpoint.resumable:
                run.folder.drop(step)
                dropped.append(step)
    return dropped


def mark_best(run: Run) -> None:
    """Write best.json: the save of the lowest validation loss, and all values so far."""
    good = best(run.measures)
    if good is not None:
        content = {
            "step": good.step,
            "loss": good.loss,
            "file": f"ckpt/step-{good.step:06d}/lora.safetensors",
            "validations": [[m.step, m.loss] for m in run.measures],
        }
        write_text(run.folder.path / BEST, json.dumps(content, indent=1))


def best_step(folder: RunFolder, last: Checkpoint, measures: Sequence[Measure]) -> dict[str, Any]:
    """Return what `Finished` says of the validations up to ``last``, and of the best save."""
    there = {c.step for c in folder.checkpoints()}
    good = best([m for m in measures if m.step in there])
    pairs = tuple((m.step, m.loss) for m in measures if m.step <= last.step)
    return {"validations": pairs, "best_step": None if good is None else good.step}
