"""Runs on one base, one or many: opened together, driven side by side, each ending as it does alone."""

from __future__ import annotations

import gc
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace

import torch

from . import metadata
from .assist import assist
from .checkpoint import Checkpoint, RunFolder, disk_refusal
from .config import TrainConfig, trained_encoders
from .contradictions.family import check as check_family
from .contradictions.text import check_kept
from .data.train_set import TrainSet
from .engine.distributed import ALONE, Alone
from .engine.planner import advice, is_out_of_memory
from .engine.precision import pick_device, resolve
from .engine.steps import Engine, Key, Micro
from .errors import LoraGraftError, one_line
from .events import Event, Failed, Finished, Step
from .families.opening import Base
from .fit import Fitted, check, fit
from .loop import Answer, Lane, Places, Product, lane
from .opened import open_runs
from .optim.schedules import depends_on_total
from .origin import AUTO, Origin, auto_origin, named_origin, origin_is_gone
from .paths import safe_name
from .plan import Plan, plan_run, step_losses
from .resuming import unfit
from .run import Job, Run
from .runlog import check_logger
from .sample_prompts import parse_prompt
from .usual import for_base


def train(
    base: Base,
    train_set: TrainSet,
    config: TrainConfig,
    *,
    places: Places,
    device: torch.device | str | None = None,
    workflow: str | None = None,
    fresh: bool = False,
    world: Alone = ALONE,
) -> Generator[Event, None, None]:
    """Train a LoRA and publish it; yields events, see trainer.events.

    Continues by itself from the newest checkpoint of the same run, and returns a finished run's file at
    once. ``workflow`` is ComfyUI's workflow JSON to keep in the file; ``fresh`` sets an earlier run aside.
    ``world`` are the processes that take each step together: all call this with equal arguments, and those
    that do not write yield `Step` events alone.
    """
    events = train_together(
        base,
        [(train_set, config)],
        places=places,
        device=device,
        workflow=workflow,
        fresh=fresh,
        world=world,
    )
    with closing(events):
        for _, event in events:
            yield event


def train_together(
    base: Base,
    jobs: Sequence[tuple[TrainSet, TrainConfig]],
    *,
    places: Places,
    device: torch.device | str | None = None,
    workflow: str | None = None,
    fresh: bool = False,
    world: Alone = ALONE,
) -> Generator[tuple[int, Event], None, None]:
    """Train LoRAs side by side on one base; yields (number of the job, its event).

    The base goes once over the samples of all runs whose next batches have equal shapes; each run has the
    gradients, updates, files and checkpoints that it has alone. With several jobs, one that fails ends
    with `Failed` and the others go on. Closing stops and saves all of them.
    """
    several = len(jobs) > 1
    opened = [_job(base, *job, places, device, world) for job in jobs]
    _check_apart(opened)
    world.agree(repr([(job.kin, job.plan) for job in opened]))
    with ExitStack() as stack:
        for job in opened:
            stack.callback(job.folder.close)
        products = [Product(job, places, workflow if job.config.embed_workflow else None) for job in opened]
        starts: dict[int, Checkpoint | None] = {}
        for number, product in enumerate(products):
            done, starts[number] = _open_folder(product, fresh) if world.writes else (None, None)
            if done is not None:
                del starts[number]
                yield number, done
        before = next((c.info() for c in starts.values() if c is not None), {})
        numbers, before = world.tell([list(starts), before])
        if not numbers:
            world.finish()
            return
        fitted = Fitted()
        lanes: dict[int, Lane] = {}
        try:
            runs = open_runs([opened[n] for n in numbers], places.cache, before)
            stack.callback(_let_go, runs, opened[0].precision.device)
            stack.callback(fitted.close)
            fit(runs, fitted)
            _check(runs, fitted)
            stack.callback(lanes.clear)
            stack.callback(runs[0].engine.close)
            for row, number in enumerate(numbers):
                # By their places: a name for one of them would hold the base until this function is gone.
                lanes[row] = (
                    lane(products[number], runs[row], starts[number], len(runs))
                    if world.writes
                    else assist(runs[row])
                )
                stack.callback(lanes[row].close)
            with closing(_drive(lanes, runs[0].engine, several)) as events:
                for row, event in events:
                    yield numbers[row], event
                    if world.writes and not isinstance(event, Step):
                        world.beat()
            world.finish()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise advice(error, fitted.plan) from error
            raise


def _check(runs: Sequence[Run], fitted: Fitted) -> None:
    check(runs, fitted)
    for run in runs:
        run.how += fitted.lines


def _let_go(runs: list[Run], device: torch.device) -> None:
    """Empty the list that the engine's loss reads, and free what only that cycle held."""
    runs.clear()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _drive(lanes: dict[int, Lane], engine: Engine, several: bool) -> Generator[tuple[int, Event], None, None]:
    """Let every run go on to its next micro-batch, then take the largest group of one shape together."""
    answers: dict[int, Answer | None] = dict.fromkeys(lanes)
    waiting: dict[int, Micro] = {}
    try:
        while answers:
            for row in list(answers):
                try:
                    item = lanes[row].send(answers.pop(row))
                    while not isinstance(item, Micro):
                        yield row, item
                        item = next(lanes[row])
                    waiting[row] = item
                except StopIteration:
                    pass
                except LoraGraftError as error:
                    if not several:
                        raise
                    yield row, Failed(error)
            group = _largest(waiting)
            started = time.perf_counter()
            losses = engine.backward([waiting.pop(row) for row in group]) if group else []
            seconds = time.perf_counter() - started
            answers = {row: Answer(loss, seconds) for row, loss in zip(group, losses, strict=True)}
    except GeneratorExit:
        # Stopped between two runs' turns: those whose gradients are there take their step too, so that all
        # continue from one moment, in the same company as without a stop.
        for row, answer in answers.items():
            if answer is not None:
                with suppress(StopIteration, LoraGraftError):  # its log holds the error
                    lanes[row].send(answer)
        raise


def _largest(waiting: Mapping[int, Micro]) -> list[int]:
    """Return the rows that share the commonest shape; of equally common ones, that of the first row."""
    groups: dict[Key, list[int]] = {}
    for row in sorted(waiting):
        groups.setdefault(waiting[row].shape, []).append(row)
    return max(groups.values(), key=len, default=[])


def _job(
    base: Base,
    train_set: TrainSet,
    config: TrainConfig,
    places: Places,
    device: torch.device | str | None,
    world: Alone,
) -> Job:
    if not world.writes:
        config = replace(config, resume="")  # the process that writes tells what is continued
    check_family(config, base.family, base.state_dicts)
    config, usual = for_base(config, base)
    if trained_encoders(config, base.family.encoders):
        check_kept(config)
    precision = resolve(config.mixed_precision, pick_device(device))
    plan = plan_run(train_set, config)
    check_logger(config.log_with)
    _check_sizes(train_set, config, base)
    _check_validation(train_set, config)
    warms_up = any(0 < c.token_warmup_step < 1 for c in train_set.configs)
    fixed_total = plan.total_steps if warms_up or depends_on_total(config) else None
    run_id = metadata.run_hash(base, train_set, config, fixed_total, precision.name)
    kin = metadata.run_hash(base, train_set, config, None, precision.name)
    origin, hint = _earlier_run(config, places, plan, kin, base, fixed_total is None)
    if origin is not None:
        run_id = origin.identity(run_id)
    words = metadata.trigger_words(train_set, config)
    folder = RunFolder(places.runs / f"{safe_name(config.output_name, what='output_name')}-{run_id[:8]}")
    if folder.path.exists():
        hint = ""  # it was begun before
    return Job(
        base, train_set, config, plan, precision, run_id, words, folder, kin, origin, hint, world, usual
    )


def _check_sizes(train_set: TrainSet, config: TrainConfig, base: Base) -> None:
    """Refuse buckets and sizes of samples that the base model cannot have."""
    multiple = base.family.latent_multiple
    buckets = [*train_set.buckets, *(train_set.validation.buckets if train_set.validation else ())]
    odd = next((b for b in buckets if b[0] % multiple or b[1] % multiple), None)
    if odd is not None:
        steps = -(-64 // multiple) * multiple
        raise LoraGraftError(
            "LG-CFG-004",
            f"The bucket {odd[0]}x{odd[1]} is no size for '{base.family.name}'.",
            where="resolution, bucket_reso_steps",
            why=f"its sides have to be multiples of {multiple}.",
            fix=f"build the dataset with bucket_reso_steps {steps}, and a resolution that is a multiple",
        )
    for prompt in map(parse_prompt, config.sample_prompts):
        if (prompt.width or 0) % multiple or (prompt.height or 0) % multiple:
            raise LoraGraftError(
                "LG-CFG-004",
                f"A sample of {prompt.width or 'any'}x{prompt.height or 'any'} is no size for "
                f"'{base.family.name}'.",
                where=f"sample_prompts: {one_line(prompt.prompt, 60)}",
                why=f"its sides have to be multiples of {multiple}.",
                fix=f"give --w and --h multiples of {multiple}",
            )


def _check_validation(train_set: TrainSet, config: TrainConfig) -> None:
    """Refuse settings of a validation where no image is kept out of training."""
    given = [
        n
        for n in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
        if getattr(config, n)
    ]
    if given and train_set.validation is None:
        raise LoraGraftError(
            "LG-CFG-004",
            f"{given[0]} is given, and no image is kept out of training.",
            where=given[0],
            why="there is nothing to measure.",
            fix=f"set validation_split to 0.1 or so, or take {given[0]} away",
        )


def _earlier_run(
    config: TrainConfig, places: Places, plan: Plan, kin: str, base: Base, continues_by_itself: bool
) -> tuple[Origin | None, str]:
    """Return the run that this one continues, and what to say where it could or cannot."""
    if config.resume not in ("", AUTO):
        return named_origin(places.runs, config.resume, plan, base.weights_hash), ""
    if continues_by_itself:
        return None, ""
    found = auto_origin(places.runs, kin, plan)
    if config.resume == AUTO:
        return found, "" if found else "resume: there is no earlier run of these settings; starts afresh"
    if found is None or found.checkpoint is None:
        return None, ""
    folder = found.checkpoint.folder.parents[1].name
    return (
        None,
        f"{folder} has trained {found.step} steps with these settings; resume: auto would go on from there",
    )


def _check_apart(jobs: Sequence[Job]) -> None:
    """Refuse jobs that are one and the same run, or that would publish under one name."""
    for number, job in enumerate(jobs):
        for other in range(number):
            if jobs[other].config.output_name == job.config.output_name:
                raise LoraGraftError(
                    "LG-RUN-011",
                    f"Runs {other + 1} and {number + 1} have the same output_name.",
                    where=f"output_name: {one_line(job.config.output_name, 80)}",
                    why="their files could not be told apart.",
                    fix="give each run a name of its own",
                )


def _open_folder(product: Product, fresh: bool) -> tuple[Finished | None, Checkpoint | None]:
    """Lock the run's folder; return its product if it is finished, else the checkpoint to continue from."""
    job, folder = product.job, product.job.folder
    metadata.with_workflow({}, product.workflow)  # what cannot be kept at the end is refused at the start
    product.check()  # likewise a name that is taken
    try:
        folder.open()
        if fresh:
            folder.set_aside()
        found = folder.checkpoints()
        for checkpoint in found:
            if checkpoint.run != job.run_id:  # copied here, or a folder name that two runs share
                raise unfit(checkpoint, f"run {checkpoint.run[:8]} wrote it")
        total = job.plan.total_steps
        last = next((c for c in found if c.step == total), None)
        source = next((c for c in reversed(found) if c.resumable and c.step >= total), None)
        is_done = source is not None and (source.step > total or folder.ended_at() >= total)
        if last is not None and source is not None and is_done:
            losses = step_losses(source.losses(), job.plan)[: last.step]
            return product.make(last, losses, source.measures(), reused=True), None
        newest = next((c for c in reversed(found) if c.resumable and c.step <= total), None)
        if newest is None and job.origin is not None and job.origin.checkpoint is None:
            raise origin_is_gone(job.origin)
        return None, newest
    except OSError as error:
        raise disk_refusal(error, folder.path) from error
