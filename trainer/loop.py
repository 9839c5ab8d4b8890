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
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from . import metadata
from .adapters.files import as_saved, count_zero
from .checkpoint import Checkpoint, disk_refusal
from .config import TrainConfig, resolution_wh
from .data.batches import Batch, plan_epoch
from .data.train_set import TrainSet
from .engine.precision import Precision
from .engine.spill import SpillGuard
from .engine.steps import Micro
from .errors import LoraGraftError, listed, one_line
from .events import Event, Finished, Note, Planned, Sampled, Saved, Step, Validated
from .families.opening import Base
from .losses import micro_losses
from .optim import lr_factor, optimizer_name, set_learning_rates
from .plan import Plan, average_loss, step_losses
from .progress import validation_line
from .publish import publish, published_name
from .run import Job, Run, planned_lines, restore, training_state
from .runlog import RunLog, write_settings


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
    config, step = run.config, run.step
    set_learning_rates(run.optimizer, lr_factor(config, step, run.plan.total_steps))
    started, seconds = time.perf_counter(), 0.0
    batches, on_device = run.batches(step), []
    for fed in run.feed(step):
        seconds += time.perf_counter() - started
        answer = yield Micro(run.adapter.row, fed, len(batches), run.setting)
        started, seconds = time.perf_counter(), seconds + answer.seconds
        on_device.append(answer.loss)
    run.is_settled = False
    norm = run.engine.update(run.adapter.row, config.max_grad_norm)
    run.draw_ahead(step + 1)
    *losses, grad_norm = torch.stack([*on_device, norm.float()]).tolist()  # the step's only synchronisation
    for batch, loss in zip(batches, losses, strict=True):
        if not math.isfinite(loss):
            raise _not_finite(run, "loss", [batch])
    if not math.isfinite(grad_norm) and not run.scaler.is_enabled():  # a loss scaler skips such a step
        raise _not_finite(run, "gradient", batches)
    run.micro_losses += losses
    run.step += 1
    run.is_settled = True
    seconds += time.perf_counter() - started
    return StepResult(math.fsum(losses) / len(losses), grad_norm, seconds)


Lane = Generator[Event | Micro, Answer | None, None]


@dataclass(frozen=True)
class Places:
    """Where a run writes: run folders, published LoRA files, and the cache of encoded data."""

    runs: Path
    loras: Path
    cache: Path


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

    def make(self, last: Checkpoint, losses: Sequence[float], *, reused: bool) -> Finished:
        """Publish the LoRA of ``last`` and describe the end of the run."""
        job, folder = self.job, self.job.folder
        texts = describe(job.base, job.train_set, job.config, job.plan, job.run_id, job.precision, last.step)
        file = publish(
            self.places.loras,
            self.name,
            last,
            texts,
            job.words,
            self.workflow,
            folder.preview,
            unless_there=reused,
        )
        files = tuple(c.lora_file for c in folder.checkpoints() if c.step <= last.step)
        return Finished(file, folder.path, last.step, job.words, tuple(losses), reused, files)


def lane(product: Product, run: Run, newest: Checkpoint | None, runs: int) -> Lane:
    """Train one run to its end; whoever drives it takes the micro-batches through the engine."""
    try:
        if newest is not None:
            restore(run, newest)
        yield from _train(run, newest, runs)
        yield from _preview_image(run)
        last = next(c for c in run.folder.checkpoints() if c.step == run.step)
        yield product.make(last, step_losses(run.micro_losses, run.plan), reused=False)
    except OSError as error:
        raise disk_refusal(error, run.folder.path) from error


def _train(run: Run, resumed: Checkpoint | None, runs: int) -> Lane:
    config, plan = run.config, run.plan
    write_settings(run.folder.path, run.train_set, config, run.base)
    with RunLog(run.folder.path, run.step) as log:
        lines = planned_lines(run, resumed, runs)
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
        run.adapter.select()
        if run.validation is not None:
            yield from run.validation.prepare()
        yield from run.inputs.prepare()
        for note in run.inputs.cache.notes:
            yield Note(note)
        saved_step = run.step
        guard = SpillGuard()
        try:
            while run.step < plan.total_steps:
                result = yield from train_step(run)
                while run.engine.notes:
                    yield Note(run.engine.notes.pop(0))
                event = _step_event(run, result)
                log.step(event)
                yield event
                if (spilled := _spill_note(guard, run, event)) is not None:
                    log.lines([spilled])
                    yield Note(spilled)
                if (
                    _is_due(run, config.save_every_n_steps, config.save_every_n_epochs)
                    or run.step == plan.total_steps
                ):
                    run.is_settled = False
                    saved = save(run)
                    saved_step, run.is_settled = run.step, True
                    log.lines(
                        [f"step {run.step}: saved, {saved.zero_tensors} of {saved.num_tensors} tensors zero"]
                    )
                    yield saved
                    for validated in validate(run):
                        log.lines([validation_line(validated)])
                        yield validated
                    if config.sample_every_n_steps is None:
                        yield from _samples(run)
                if config.sample_every_n_steps and run.step % config.sample_every_n_steps == 0:
                    yield from _samples(run)
        except BaseException:  # closed, or an exception thrown in by a host that interrupts
            if run.is_settled and run.step > saved_step:
                save(run)
                log.lines([f"step {run.step}: stopped and saved; queue again to continue"])
            raise


@torch.no_grad()
def validate(run: Run) -> Iterator[Validated]:
    """Measure the loss on the images kept out of training, where there are any; nothing is learned."""
    if run.validation is None:
        return
    total, seen = 0.0, 0
    run.adapter.select()
    for batch in plan_epoch(run.validation.train_set, run.config.train_batch_size, run.config.seed, 0):
        fed = run.validation.draw(0, seen, batch)  # always those of step 0, so that values compare
        on_device = tuple(None if x is None else x.to(run.precision.device) for x in fed)
        loss = micro_losses(run.parts, run.validation, [run.config], on_device)
        total, seen = total + loss.item() * len(batch.indices), seen + len(batch.indices)
    yield Validated(run.step, total / seen, seen)


def save(run: Run) -> Saved:
    """Write and verify a checkpoint of the run as it is."""
    lora_tensors = as_saved(run.adapter.state_dict(), run.config.save_precision)
    texts = describe(run.base, run.train_set, run.config, run.plan, run.run_id, run.precision, run.step)
    info = {
        "step": run.step,
        "run": run.run_id,
        "torch": torch.__version__,
        "device": run.precision.device.type,
        "engine": run.engine.name,
        "attention": run.attention,
    }
    if run.scaler.is_enabled():
        info["scaler"] = run.scaler.state_dict()
    checkpoint = run.folder.save(
        run.step, lora_tensors, metadata.with_hashes(texts, lora_tensors), training_state(run), info
    )
    zero = count_zero({k: v for k, v in lora_tensors.items() if not k.endswith(".alpha")})
    return Saved(run.step, checkpoint.folder, checkpoint.lora_file, len(lora_tensors), zero)


def describe(
    base: Base,
    train_set: TrainSet,
    config: TrainConfig,
    plan: Plan,
    run_id: str,
    precision: Precision,
    step: int,
) -> dict[str, str]:
    """Return the metadata of the run's LoRA at ``step``, all but what depends on its tensors."""
    return metadata.build(
        base,
        train_set,
        config,
        run=run_id,
        precision=precision.name,
        step=step,
        epoch=math.ceil(step / plan.steps_per_epoch),
        total_steps=plan.total_steps,
        num_epochs=plan.num_epochs,
        batches_per_epoch=plan.batches_per_epoch,
        optimizer=optimizer_name(config),
    )


def _step_event(run: Run, result: StepResult) -> Step:
    factor = lr_factor(run.config, run.step - 1, run.plan.total_steps)
    groups = zip(run.group_parts, run.optimizer.param_groups, strict=True)
    rates = {part: group["base_lr"] * factor for part, group in groups}
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
    )


def _spill_note(guard: SpillGuard, run: Run, event: Step) -> str | None:
    """Ask the guard about a step on a GPU."""
    device = run.precision.device
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    used = max(total - free, torch.cuda.memory_reserved(device))
    shapes = tuple((batch.bucket, len(batch.indices)) for batch in run.batches(run.step - 1))
    return guard.feed(event.seconds, used, total, kind=shapes)


def _is_due(run: Run, every_steps: int | None, every_epochs: int | None) -> bool:
    by_step = every_steps is not None and run.step % every_steps == 0
    return by_step or (every_epochs is not None and run.step % (every_epochs * run.plan.steps_per_epoch) == 0)


def _samples(run: Run) -> Iterator[Sampled | Note]:
    for number, prompt in enumerate(run.config.sample_prompts):
        yield _sample(run, prompt, run.folder.path / "samples" / f"step-{run.step:06d}-{number:02d}.png")


def _sample(run: Run, prompt: str, path: Path) -> Sampled | Note:
    """Draw one image; one that cannot be drawn (memory) is no reason to end a run."""
    width, height = resolution_wh(run.train_set.config)
    config = run.config
    run.adapter.select()
    try:
        (image,) = run.base.family.sample(
            run.parts,
            [prompt],
            negative="",
            seeds=[config.seed],
            size=(height, width),
            steps=config.sample_steps,
            cfg=config.sample_cfg,
            clip_skip=config.clip_skip,
        )
    except (RuntimeError, MemoryError) as error:
        return Note(f"The sample of step {run.step} could not be drawn: {one_line(str(error), 300)}")
    path.parent.mkdir(exist_ok=True)
    image.save(path)
    return Sampled(run.step, prompt, config.seed, image, path)


def _preview_image(run: Run) -> Iterator[Sampled | Note]:
    if run.config.preview_image:
        prompts = run.config.sample_prompts or (run.train_set.records[0].caption,)
        yield _sample(run, prompts[0], run.folder.preview)


def _not_finite(run: Run, what: str, batches: Sequence[Batch]) -> LoraGraftError:
    indices = sorted({i for batch in batches for i in batch.indices})
    good = run.folder.checkpoints()
    kept = (
        f"the checkpoint of step {good[-1].step} is intact ({good[-1].folder})"
        if good
        else "no checkpoint was written yet"
    )
    return LoraGraftError(
        "LG-RUN-004",
        f"The {what} became NaN or infinite at step {run.step + 1}.",
        where="images: " + listed(run.train_set.records[i].name for i in indices),
        why=f"the learning rate {run.config.learning_rate:g} is too high, {run.precision.name} too coarse, "
        f"or an image broken; {kept}.",
        fix="lower the learning rate, or set mixed_precision to bf16 or fp32, or remove the named images",
    )
