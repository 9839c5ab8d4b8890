"""The straight line of a run: open it, take steps, save, publish; a generator of events.

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
from .checkpoint import Checkpoint, RunFolder, disk_refusal
from .config import TrainConfig, resolution_wh
from .data.batches import Batch, plan_epoch
from .data.train_set import TrainSet
from .engine.precision import Precision, pick_device, resolve, strict
from .errors import LoraGraftError, listed, one_line
from .events import Event, Finished, Note, Planned, Sampled, Saved, Step, Validated
from .families.opening import Base
from .optim import depends_on_total, lr_factor, optimizer_name, set_learning_rates
from .paths import safe_name
from .plan import Plan, average_loss, plan_run, step_losses
from .progress import validation_line
from .publish import publish, published_name
from .run import Run, micro_loss, open_run, planned_lines, restore, training_state, unfit
from .runlog import RunLog, write_settings


@dataclass(frozen=True)
class Places:
    """Where a run writes: run folders, published LoRA files, and the cache of encoded data."""

    runs: Path
    loras: Path
    cache: Path


class StepResult(NamedTuple):
    """A step's mean loss and its gradient's norm before clipping."""

    loss: float
    grad_norm: float


def train_step(run: Run) -> StepResult:
    """Take one optimizer step and advance ``run.step``; raises LG-RUN-004 if something is not finite."""
    config, step = run.config, run.step
    set_learning_rates(run.optimizer, lr_factor(config, step, run.plan.total_steps))
    batches = run.batches(step)
    on_device: list[torch.Tensor] = []
    sample = 0
    for batch in batches:
        fed = run.inputs.draw(step, sample, batch)
        sample += len(batch.indices)
        on_device.append(run.engine.backward(fed, len(batches)))
    norm = run.engine.update(config.max_grad_norm)
    *losses, grad_norm = torch.stack([*on_device, norm.float()]).tolist()  # the step's only synchronisation
    for batch, loss in zip(batches, losses, strict=True):
        if not math.isfinite(loss):
            raise _not_finite(run, "loss", [batch])
    if not math.isfinite(grad_norm) and not run.scaler.is_enabled():  # a loss scaler skips such a step
        raise _not_finite(run, "gradient", batches)
    run.micro_losses += losses
    run.step += 1
    return StepResult(math.fsum(losses) / len(losses), grad_norm)


def train(
    base: Base,
    train_set: TrainSet,
    config: TrainConfig,
    *,
    places: Places,
    device: torch.device | str | None = None,
    workflow: str | None = None,
    fresh: bool = False,
) -> Generator[Event, None, None]:
    """Train a LoRA and publish it; yields events, see trainer.events.

    Continues by itself from the newest checkpoint of the same run, and returns a finished run's file at
    once. ``workflow`` is ComfyUI's workflow JSON to keep in the file; ``fresh`` sets an earlier run aside.
    """
    precision = resolve(config.mixed_precision, pick_device(device))
    plan = plan_run(train_set, config)
    warms_up = any(0 < c.token_warmup_step < 1 for c in train_set.configs)
    fixed_total = plan.total_steps if warms_up or depends_on_total(config) else None
    run_id = metadata.run_hash(base, train_set, config, fixed_total, precision.name)
    words = metadata.trigger_words(train_set, config)
    folder = RunFolder(places.runs / f"{safe_name(config.output_name, what='output_name')}-{run_id[:8]}")
    kept = workflow if config.embed_workflow else None
    metadata.with_workflow({}, kept)  # what cannot be kept at the end is refused at the start
    published_name(places.loras, config, run_id, words, folder.preview)

    def product(last: Checkpoint, losses: Sequence[float], *, reused: bool) -> Finished:
        name = published_name(places.loras, config, run_id, words, folder.preview)
        texts = describe(base, train_set, config, plan, run_id, precision, last.step)
        file = publish(places.loras, name, last, texts, words, kept, folder.preview, unless_there=reused)
        files = tuple(c.lora_file for c in folder.checkpoints() if c.step <= last.step)
        return Finished(file, folder.path, last.step, words, tuple(losses), reused, files)

    try:
        folder.open()
        if fresh:
            folder.set_aside()
        found = folder.checkpoints()
        for checkpoint in found:
            if checkpoint.run != run_id:  # copied here, or a folder name that two runs share
                raise unfit(checkpoint, f"run {checkpoint.run[:8]} wrote it")
        last = next((c for c in found if c.step == plan.total_steps), None)
        source = next((c for c in reversed(found) if c.resumable and c.step >= plan.total_steps), None)
        if last is not None and source is not None:
            yield product(last, step_losses(source.losses(), plan)[: last.step], reused=True)
            return
        newest = next((c for c in reversed(found) if c.resumable and c.step < plan.total_steps), None)
        run = open_run(base, train_set, config, folder, run_id, plan, precision, places.cache)
        if newest is not None:
            restore(run, newest)
        yield from _train(run, newest)
        yield from _preview_image(run)
        last = next(c for c in folder.checkpoints() if c.step == run.step)
        yield product(last, step_losses(run.micro_losses, plan), reused=False)
    except OSError as error:
        raise disk_refusal(error, folder.path) from error
    finally:
        folder.close()


def _train(run: Run, resumed: Checkpoint | None) -> Generator[Event, None, None]:
    config, plan = run.config, run.plan
    write_settings(run.folder.path, run.train_set, config, run.base)
    with RunLog(run.folder.path, run.step) as log:
        lines = planned_lines(run, resumed)
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
        if run.validation is not None:
            yield from run.validation.prepare()
        yield from run.inputs.prepare()
        for note in run.inputs.cache.notes:
            yield Note(note)
        saved_step = run.step
        steady = True  # between steps and saves: the run is what its last finished step left
        try:
            while run.step < plan.total_steps:
                started, steady = time.perf_counter(), False
                with strict(config.deterministic):
                    result = train_step(run)
                steady = True
                while run.engine.notes:
                    yield Note(run.engine.notes.pop(0))
                event = _step_event(run, result, time.perf_counter() - started)
                log.step(event)
                yield event
                if (
                    _is_due(run, config.save_every_n_steps, config.save_every_n_epochs)
                    or run.step == plan.total_steps
                ):
                    steady = False
                    saved = save(run)
                    saved_step, steady = run.step, True
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
            if steady and run.step > saved_step:
                save(run)
                log.lines([f"step {run.step}: stopped and saved; queue again to continue"])
            raise
        finally:
            run.engine.close()


@torch.no_grad()
def validate(run: Run) -> Iterator[Validated]:
    """Measure the loss on the images kept out of training, where there are any; nothing is learned."""
    if run.validation is None:
        return
    total, seen = 0.0, 0
    for batch in plan_epoch(run.validation.train_set, run.config.train_batch_size, run.config.seed, 0):
        fed = run.validation.draw(0, seen, batch)  # always those of step 0, so that values compare
        on_device = tuple(None if x is None else x.to(run.precision.device) for x in fed)
        loss = micro_loss(run.base, run.parts, run.config, run.validation, run.precision, on_device)
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


def _step_event(run: Run, result: StepResult, seconds: float) -> Step:
    names = {id(p): part for part in ("text_encoder", "denoiser") for p in run.adapter.parameters(part)}
    factor = lr_factor(run.config, run.step - 1, run.plan.total_steps)
    rates = {names[id(g["params"][0])]: g["base_lr"] * factor for g in run.optimizer.param_groups}
    epoch = math.ceil(run.step / run.plan.steps_per_epoch)
    average = average_loss(run.micro_losses, run.plan)
    return Step(run.step, run.plan.total_steps, epoch, result.loss, average, rates, result.grad_norm, seconds)


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
    try:
        with run.precision.autocast():
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
