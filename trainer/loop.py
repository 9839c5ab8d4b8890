"""The straight line of a run: open it, take steps, save, publish; a generator of events.

Closing the generator stops the run: the last finished step is saved first. Everything random is a
function of (seed, step, sample), so a stopped and continued run gives the same bytes as one that
never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from . import metadata
from .adapters.files import as_saved, count_zero
from .checkpoint import Checkpoint, RunFolder
from .config import TrainConfig, resolution_wh
from .data.batches import Batch
from .data.train_set import TrainSet
from .engine.precision import resolve
from .errors import LoraGraftError, listed
from .events import Event, Finished, Note, Planned, Sampled, Saved, Step
from .families.opening import Base
from .objective import diffusion_loss, min_snr_weight
from .optim import depends_on_total, lr_factor, set_learning_rates
from .plan import Plan, average_loss, plan_run, step_losses
from .publish import finished_file, publish, published_name
from .run import Run, open_run, planned_lines, restore, training_state
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
    config, schedule, step = run.config, run.base.family.schedule, run.step
    set_learning_rates(run.optimizer, lr_factor(config, step, run.plan.total_steps))
    batches = run.batches(step)
    losses: list[float] = []
    sample = 0
    for batch in batches:
        fed = run.inputs.draw(step, sample, batch)
        sample += len(batch.indices)
        noisy = schedule.add_noise(fed.latents, fed.noise, fed.t)
        cond = run.inputs.cond(fed.captions)
        with run.precision.autocast():
            pred = run.base.family.predict(run.parts, noisy, fed.t, cond)
        weight = (
            None
            if config.min_snr_gamma is None
            else min_snr_weight(schedule.snr(fed.t), config.min_snr_gamma)
        )
        loss = diffusion_loss(pred, fed.noise, weight)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise _not_finite(run, "loss", batch)
        run.scaler.scale(loss / len(batches)).backward()
    run.scaler.unscale_(run.optimizer)
    grad_norm = float(nn.utils.clip_grad_norm_(run.parameters, config.max_grad_norm or math.inf))
    if (
        not math.isfinite(grad_norm) and not run.scaler.is_enabled()
    ):  # a loss scaler skips such a step by itself
        raise _not_finite(run, "gradient", batches[-1])
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
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
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = resolve(config.mixed_precision, device)
    plan = plan_run(train_set, config)
    fixed_total = plan.total_steps if depends_on_total(config) else None
    run_id = metadata.run_hash(base, train_set, config, fixed_total, precision.name)
    name = published_name(places.loras, config, run_id)
    kept = workflow if config.embed_workflow else None
    folder = RunFolder(places.runs / f"{config.output_name}-{run_id[:8]}")
    folder.open()
    try:
        if fresh:
            folder.set_aside()
        newest = _newest(folder, plan.total_steps)
        words = metadata.trigger_words(train_set, config)
        if newest is not None and newest.step == plan.total_steps:
            file = finished_file(places.loras, name, newest, config, words, kept)
            yield _finished(file, folder, newest, plan, words, reused=True)
            return
        run = open_run(base, train_set, config, folder, run_id, plan, precision, places.cache)
        if newest is not None:
            restore(run, newest)
        yield from _train(run, newest)
        last = run.folder.checkpoints()[-1]
        preview = yield from _preview_image(run)
        file = publish(places.loras, name, last, words, kept, preview)
        yield _finished(file, folder, last, plan, words, reused=False)
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
        yield from run.inputs.prepare()
        for note in run.inputs.cache.notes:
            yield Note(note)
        saved_step = run.step if resumed else -1
        try:
            while run.step < plan.total_steps:
                started = time.perf_counter()
                result = train_step(run)
                event = _step_event(run, result, time.perf_counter() - started)
                log.step(event)
                yield event
                if (
                    _is_due(run, config.save_every_n_steps, config.save_every_n_epochs)
                    or run.step == plan.total_steps
                ):
                    saved = save(run)
                    saved_step = run.step
                    log.lines(
                        [f"step {run.step}: saved, {saved.zero_tensors} of {saved.num_tensors} tensors zero"]
                    )
                    yield saved
                    if config.sample_every_n_steps is None:
                        yield from _samples(run)
                if config.sample_every_n_steps and run.step % config.sample_every_n_steps == 0:
                    yield from _samples(run)
        except GeneratorExit:
            if run.step > max(saved_step, 0):
                save(run)
                log.lines([f"step {run.step}: stopped and saved; queue again to continue"])
            raise


def save(run: Run) -> Saved:
    """Write and verify a checkpoint of the run as it is."""
    config = run.config
    lora_tensors = as_saved(run.adapter.state_dict(), config.save_precision)
    texts = metadata.build(
        run.base,
        run.train_set,
        config,
        run=run.run_id,
        precision=run.precision.name,
        step=run.step,
        epoch=math.ceil(run.step / run.plan.steps_per_epoch),
        total_steps=run.plan.total_steps,
        num_epochs=run.plan.num_epochs,
        batches_per_epoch=run.plan.batches_per_epoch,
        optimizer=f"{type(run.optimizer).__module__}.{type(run.optimizer).__name__}",
    )
    info = {
        "step": run.step,
        "run": run.run_id,
        "torch": torch.__version__,
        "device": run.precision.device.type,
    }
    if run.scaler.is_enabled():
        info["scaler"] = run.scaler.state_dict()
    checkpoint = run.folder.save(
        run.step, lora_tensors, metadata.with_hashes(texts, lora_tensors), training_state(run), info
    )
    zero = count_zero({k: v for k, v in lora_tensors.items() if not k.endswith(".alpha")})
    return Saved(run.step, checkpoint.folder, checkpoint.lora_file, len(lora_tensors), zero)


def _step_event(run: Run, result: StepResult, seconds: float) -> Step:
    names = {id(p): part for part in ("text_encoder", "denoiser") for p in run.adapter.parameters(part)}
    rates = {names[id(g["params"][0])]: float(g["lr"]) for g in run.optimizer.param_groups}
    epoch = math.ceil(run.step / run.plan.steps_per_epoch)
    average = average_loss(run.micro_losses, run.plan)
    return Step(run.step, run.plan.total_steps, epoch, result.loss, average, rates, result.grad_norm, seconds)


def _is_due(run: Run, every_steps: int | None, every_epochs: int | None) -> bool:
    by_step = every_steps is not None and run.step % every_steps == 0
    return by_step or (every_epochs is not None and run.step % (every_epochs * run.plan.steps_per_epoch) == 0)


def _samples(run: Run) -> Iterator[Sampled]:
    for number, prompt in enumerate(run.config.sample_prompts):
        yield _sample(run, prompt, run.folder.path / "samples" / f"step-{run.step:06d}-{number:02d}.png")


def _sample(run: Run, prompt: str, path: Path) -> Sampled:
    width, height = resolution_wh(run.train_set.config)
    config = run.config
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
    path.parent.mkdir(exist_ok=True)
    image.save(path)
    return Sampled(run.step, prompt, config.seed, image, path)


def _preview_image(run: Run) -> Generator[Event, None, Path | None]:
    if not run.config.preview_image:
        return None
    prompt = run.config.sample_prompts[0] if run.config.sample_prompts else run.train_set.records[0].caption
    sampled = _sample(run, prompt, run.folder.path / "samples" / "preview.png")
    yield sampled
    return sampled.path


def _finished(
    file: Path, folder: RunFolder, last: Checkpoint, plan: Plan, words: str, *, reused: bool
) -> Finished:
    losses = tuple(step_losses(last.losses(), plan))
    files = tuple(c.lora_file for c in folder.checkpoints() if c.step <= last.step)
    return Finished(file, folder.path, last.step, words, losses, reused, files)


def _newest(folder: RunFolder, total_steps: int) -> Checkpoint | None:
    usable = [c for c in folder.checkpoints() if c.resumable and c.step <= total_steps]
    return usable[-1] if usable else None


def _not_finite(run: Run, what: str, batch: Batch) -> LoraGraftError:
    good = run.folder.checkpoints()
    kept = (
        f"the checkpoint of step {good[-1].step} is intact ({good[-1].folder})"
        if good
        else "no checkpoint was written yet"
    )
    return LoraGraftError(
        "LG-RUN-004",
        f"The {what} became NaN or infinite at step {run.step + 1}.",
        where="images: " + listed(run.train_set.records[i].name for i in batch.indices),
        why=f"the learning rate {run.config.learning_rate:g} is too high, {run.precision.name} too coarse, "
        f"or an image broken; {kept}.",
        fix="lower the learning rate, or set mixed_precision to bf16 or fp32, or remove the named images",
    )
