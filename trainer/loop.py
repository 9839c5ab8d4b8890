"""The straight line of a run: open it, take steps, save, publish; a generator of events.

A run hands out its micro-batches and is sent their losses, so that runs on one base can be driven side by
side: the lines are the same for one run and for many.

Closing the generator stops the run: the last finished step is saved first. Everything random is a
function of (seed, step, sample), so a stopped and continued run gives the same bytes as one that
never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoint import Checkpoint, check_space, disk_refusal
from .engine.spill import SpillGuard
from .engine.steps import Micro
from .events import Event, Finished, Note, Planned, Step
from .milestones import Milestones, best_line
from .optim.rates import logged_rates, set_learning_rates
from .plan import average_loss, step_losses
from .planned import cut_caption_line, planned_lines
from .publish import publish, publish_embeddings, published_name
from .resuming import restore, share_state
from .rollback import Diverged, Safety, exploded, not_finite
from .run import Job, Run
from .runlog import RunLog, write_settings
from .samples import draw_preview
from .saving import Shelf, best_step, describe, most_models, save
from .trends import Measure
from .whole_model import model_bytes, model_name, write_model


class Answer(NamedTuple):
    """What a micro-batch is answered with: its loss, on the device, and how long the pass took."""

    loss: torch.Tensor
    seconds: float


class StepResult(NamedTuple):
    """A step's mean loss, its gradient's norm before clipping, and the time spent on it.

    Passes that were shared count in full; what other runs did in between does not.
    """

    loss: float
    grad_norm: float
    seconds: float


def train_step(run: Run) -> Generator[Micro, Answer, StepResult]:
    """Take one optimizer step: hand out micro-batches, be sent their losses, update, advance ``run.step``.

    Raises LG-RUN-004 if something is not finite.
    """
    config, step, world = run.config, run.step, run.world
    set_learning_rates(run.optimizer, config, step, run.plan.total_steps, run.rate_scale)
    started, seconds = time.perf_counter(), 0.0
    batches = run.batches(step)
    sizes = [len(batch.indices) for batch in batches]
    on_device: list[torch.Tensor | None] = []
    for micro, (size, fed) in enumerate(zip(sizes, run.feed(step), strict=True)):
        run.micro = micro
        if fed is None:  # fewer images than processes
            on_device.append(None)
            continue
        seconds += time.perf_counter() - started
        answer = yield Micro(run.adapter.row, fed.tensors, len(batches) * world.divisor(size), run.setting)
        started, seconds = time.perf_counter(), seconds + answer.seconds
        on_device.append(answer.loss)
    world.meet()
    run.is_settled = False
    world.sum_gradients(run.engine, run.adapter.row)
    means = world.mean_losses(on_device, sizes)
    norm = run.engine.update(run.adapter.row, config.max_grad_norm)
    if config.scale_weight_norms:
        run.adapter.limit_norms(config.scale_weight_norms)
        run.engine.refresh(run.adapter.row)
    if run.average is not None:
        run.average.take(step + 1)
    run.draw_ahead(step + 1)
    *losses, grad_norm = torch.stack([*means, norm.float()]).tolist()  # the step's only synchronisation
    for batch, loss in zip(batches, losses, strict=True):
        if not math.isfinite(loss):
            raise not_finite(run, "loss", [batch])
    if not math.isfinite(grad_norm) and not run.scaler.is_enabled():  # a loss scaler skips such a step
        raise not_finite(run, "gradient", batches)
    run.micro_losses += losses
    run.step += 1
    run.is_settled = True
    seconds += time.perf_counter() - started
    return StepResult(math.fsum(losses) / len(losses), grad_norm, seconds)


Lane = Generator[Event | Micro, Answer | None, None]


@dataclass(frozen=True)
class Places:
    """Where a run writes: run folders, published LoRA files, the cache of encoded data, and what is rarer.

    Without ``checkpoints``, whole models go into a folder of that name beside that of the LoRA files; without
    ``embeddings``, trained words go beside the LoRA files.
    """

    runs: Path
    loras: Path
    cache: Path
    checkpoints: Path | None = None
    embeddings: Path | None = None

    @property
    def models(self) -> Path:
        """The folder of whole models."""
        return self.checkpoints or self.loras.parent / "checkpoints"


@dataclass(frozen=True)
class Product:
    """What a finished run hands over."""

    job: Job
    places: Places
    workflow: str | None

    @property
    def name(self) -> str:
        """The name under which the LoRA is published."""
        job = self.job
        return published_name(self.places.loras, job.config, job.run_id, job.words, job.folder.preview)

    @property
    def shelf(self) -> Shelf:
        """The folders in which the files appear."""
        whole = self.job.config.save_as == "checkpoint"
        places = self.places
        return Shelf(places.loras, places.embeddings or places.loras, places.models if whole else None)

    def check(self) -> None:
        """Raise LG-SAVE-005 for a name that is taken and must not be numbered."""
        job, models, name = self.job, self.shelf.models, self.name
        if models is not None:
            model_name(models, name, job.config, job.run_id)

    def check_disk(self) -> None:
        """Raise LG-SAVE-001 where the whole models that the run may write would not fit."""
        models = self.shelf.models
        if models is not None:
            check_space(models, most_models(self.job) * model_bytes(self.job.base, self.job.config))

    def make(
        self, last: Checkpoint, losses: Sequence[float], measures: Sequence[Measure], *, reused: bool
    ) -> Finished:
        """Publish the LoRA of ``last``, and the whole model where it is wanted; describe the run's end."""
        job, folder, name, models = self.job, self.job.folder, self.name, self.shelf.models
        texts = describe(job, last.step, last.remarks())
        file = publish(
            self.places.loras,
            name,
            last,
            texts,
            job.words,
            self.workflow,
            folder.preview,
            unless_there=reused,
        )
        publish_embeddings(self.shelf.embeddings, name, last, texts)
        files = tuple(c.lora_file for c in folder.checkpoints() if c.step <= last.step)
        ended = Finished(file, folder.path, last.step, job.words, tuple(losses), reused, files)
        if models is not None:
            own = model_name(models, name, job.config, job.run_id)
            whole = write_model(models, own, job.base, last, job.config, texts, self.workflow)
            ended = replace(ended, model_file=whole)
        return replace(ended, **best_step(folder, last, measures))


def lane(product: Product, run: Run, newest: Checkpoint | None, runs: int) -> Lane:
    """Train one run to its end; whoever drives it takes the micro-batches through the engine."""
    try:
        begin(run, product.job, newest)
        share_state(run)
        yield from _train(run, product, newest, runs)
        if runs == 1:  # else the others' steps need what it holds
            run.engine.release()
        yield from draw_preview(run)
        run.folder.end(run.step)
        last = next(c for c in run.folder.checkpoints() if c.step == run.step)
        losses = step_losses(run.micro_losses, run.plan)
        yield product.make(last, losses, run.measures, reused=False)
    except OSError as error:
        raise disk_refusal(error, run.folder.path) from error


def begin(run: Run, job: Job, newest: Checkpoint | None) -> None:
    """Put the run to where it goes on: its own newest checkpoint, or the one of the run it continues."""
    run.origin = job.origin.checkpoint if job.origin else None
    if newest is not None:
        restore(run, newest)
    elif run.origin is not None:
        restore(run, run.origin)
        run.measures = [measure._replace(saved=False) for measure in run.measures]  # not in this folder


def _train(run: Run, product: Product, resumed: Checkpoint | None, runs: int) -> Lane:
    plan, job = run.plan, product.job
    product.check_disk()
    write_settings(run.folder.path, run.train_set, run.config, run.base)
    with RunLog(run.folder.path, run.step, last_measured(run), run.config.log_with) as log:
        lines = [*planned_lines(run, resumed, runs), *_earlier_lines(job)]
        log.lines(lines)
        yield Planned(
            plan.total_steps,
            run.step,
            plan.num_epochs,
            plan.batches_per_epoch,
            len(run.adapter.modules),
            sum(p.numel() for p in run.parameters),
            run.folder.path,
            tuple(lines),
        )
        if (cut := cut_caption_line(run)) is not None:
            log.lines([cut])
            yield Note(cut)
        run.adapter.select()
        if run.validation is not None:
            yield from run.validation.prepare()
        yield from run.inputs.prepare()
        run.world.wait_turns(0)
        for note in run.inputs.cache.notes:
            yield Note(note)
        after = Milestones(run, job, product.shelf, lambda: product.name, log)
        safety, spill = Safety(run), SpillGuard()
        try:
            yield from after.before_first_step() if resumed is None else after.catch_up()
            while run.step < plan.total_steps:
                try:
                    yield from _step(run, safety, spill, log)
                except Diverged as error:
                    note = safety.go_back(error)  # or the end
                    share_state(run)
                    after.saved_step = run.step
                    log.rewind(run.step, last_measured(run))
                    log.lines([note])
                    yield Note(note)
                    continue
                yield from after.after_step()
                if after.saved_step == run.step:
                    safety.saved()
            if (line := best_line(run.measures)) is not None:
                log.lines([line])
                yield Note(line)
        except BaseException:  # closed, or an exception thrown in by a host that interrupts
            if run.is_settled and run.step > after.saved_step:
                save(run, job)
                log.lines([f"step {run.step}: stopped and saved; queue again to continue"])
            raise


def last_measured(run: Run) -> int:
    """Return the step of the last validation, 0 before the first."""
    return run.measures[-1].step if run.measures else 0


def _step(run: Run, safety: Safety, spill: SpillGuard, log: RunLog) -> Lane:
    """Take one step and tell it; raises `Diverged` where the run cannot go on from it."""
    result = yield from train_step(run)
    has_exploded = safety.explodes(result.loss)
    run.is_settled = not has_exploded  # a stop now must not save it
    while run.engine.notes:
        yield Note(run.engine.notes.pop(0))
    event = step_event(run, result)
    log.step(event)
    yield event
    if (spilled := _spill_note(spill, run, event)) is not None:
        log.lines([spilled])
        yield Note(spilled)
    if has_exploded:
        raise exploded(run)


def _earlier_lines(job: Job) -> list[str]:
    """Say which earlier run this one continues, or could."""
    if job.origin is not None:
        at, total = job.origin.step, job.plan.total_steps
        return [f"continues run {job.origin.run[:8]} from its step {at} on, to step {total}"]
    return [job.hint] if job.hint else []


def step_event(run: Run, result: StepResult) -> Step:
    """Return what a step, just taken, tells the caller."""
    when = (run.step - 1, run.plan.total_steps, run.rate_scale)
    rates = logged_rates(run.optimizer, run.group_labels, run.config, *when)
    epoch = math.ceil(run.step / run.plan.steps_per_epoch)
    average = average_loss(run.micro_losses, run.plan)
    return Step(
        run.step,
        run.plan.total_steps,
        epoch,
        result.loss,
        average,
        rates,
        result.grad_norm,
        result.seconds,
        _key_norms(run),
    )


def _key_norms(run: Run) -> dict[str, float]:
    lengths = run.adapter.lengths
    if lengths is None:
        return {}
    return {
        "keys_scaled": lengths.scaled,
        "average_key_norm": lengths.mean,
        "maximum_key_norm": lengths.largest,
    }


def _spill_note(guard: SpillGuard, run: Run, event: Step) -> str | None:
    """Ask the guard about a step on a GPU."""
    device = run.precision.device
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    used = max(total - free, torch.cuda.memory_reserved(device))
    shapes = tuple((batch.bucket, len(batch.indices)) for batch in run.batches(run.step - 1))
    return guard.feed(event.seconds, used, total, kind=shapes)
