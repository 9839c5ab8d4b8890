"""Open runs: load the base once, put all adapters on it, build the optimizers and the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from .adapters import network
from .adapters.configured import begin, preset_of, settings_of, weights_of
from .adapters.fused import fuse
from .adapters.settings import Settings as NetworkSettings
from .adapters.shares import Moment
from .config import TrainConfig, token_length
from .data.cache import TensorCache
from .engine import lean
from .engine.attention import use_attention
from .engine.attention_choice import Choice, largest_shapes
from .engine.attention_choice import choose as choose_attention
from .engine.captured import Captured
from .engine.cpu_convolutions import use_faster_ways
from .engine.packed_conv import pack_convolutions
from .engine.precision import place
from .engine.steps import Eager, Engine, Fused, Loss, Rows, Tensors, choose, parameters_of
from .errors import LoraGraftError, listed
from .inputs import Inputs, keeps_text
from .inputs.unused import check_used
from .inputs.words import Words
from .losses import micro_losses
from .optim.average import Average
from .optim.build import advice, build_optimizer
from .optim.groups import Group, as_pairs, group_tensors, lr_scale
from .parts import Parts, Target
from .run import Job, Run

Start = dict[str, torch.Tensor] | None  # the tensors of the file that a run begins from
# Settings of the base and the engine that runs side by side share, so these must be equal.
SHARED = (
    "engine",
    "deterministic",
    "attention",
    "base_storage",
    "memory",
    "blocks_to_swap",
    "gradient_checkpointing",
    "fused_backward_pass",
)


@dataclass(frozen=True)
class Trained:
    """What a job trains on the base: a network and the embeddings of words, and the optimizer of both."""

    job: Job
    settings: NetworkSettings
    adapter: network.Adapter
    words: Words
    groups: Sequence[Group]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    lines: Sequence[str]


@dataclass(frozen=True)
class Shared:
    """What the runs of one base have in common; the lines of the log are ``first``, a run's own, ``last``."""

    parts: Parts
    engine: Engine
    attention: str
    cache: TensorCache
    first: Sequence[str]
    last: Sequence[str]


def open_runs(jobs: Sequence[Job], cache: Path, before: Mapping[str, Any]) -> list[Run]:
    """Load the base once, put all runs' adapters on it and build the optimizers; nothing is trained yet.

    The jobs have one base. ``before`` is what the checkpoint to continue from says of itself, empty at a
    start: what was chosen then stays. Raises LG-RUN-010 where the jobs need different ones of what they
    share.
    """
    _check_shared(jobs)
    starts = [weights_of(job.config) for job in jobs]
    settings = [_settings(job, start) for job, start in zip(jobs, starts, strict=True)]
    parts, loaded = _load(jobs, settings)
    attention, said = _attention(parts, jobs, before)
    targets = [_targets(parts, job, own) for job, own in zip(jobs, settings, strict=True)]
    adapters = network.inject_side_by_side(parts, list(zip(settings, targets, strict=True)))
    trained = [_trained(parts, *each) for each in zip(jobs, settings, adapters, starts, strict=True)]
    runs: list[Run] = []  # which the engine's loss reads
    engine, why = _engine(parts, trained, partial(_losses, runs))
    shared = Shared(parts, engine, attention.name, TensorCache(cache), loaded, [why, *said])
    runs.extend(_run(shared, each) for each in trained)
    return runs


def _settings(job: Job, start: Start) -> NetworkSettings:
    family = job.base.family
    return settings_of(job.config, family.blocks, start, family.encoders)


def _trained(
    parts: Parts,
    job: Job,
    settings: NetworkSettings,
    adapter: network.Adapter,
    start: Start,
) -> Trained:
    """Let an adapter begin where its run does, and give all that the run trains to an optimizer."""
    config, blocks = job.config, job.base.family.blocks
    lines = begin(adapter, config, start)
    groups = group_tensors(config, ((m.target, m.tensors) for m in adapter.modules), blocks)
    words = Words(job.base, parts, job.train_set, config, job.precision)
    if words.vectors:
        groups.append(Group("embedding", config.embedding_lr * lr_scale(config), words.parameters()))
    optimizer = build_optimizer(config, as_pairs(groups))
    return Trained(job, settings, adapter, words, groups, optimizer, job.precision.scaler(), lines)


def _run(shared: Shared, trained: Trained) -> Run:
    """Return a run that has drawn nothing yet, with all that its log says of how it is computed."""
    job, words = trained.job, trained.words
    config, precision, kept_out = job.config, job.precision, job.train_set.validation
    advised = advice(config, trained.groups, job.base.family.blocks)
    common = (config, precision, shared.cache, trained.settings.text_encoder)
    inputs = Inputs(job.base, shared.parts, job.train_set, *common, job.plan.total_steps)
    validation = Inputs(job.base, shared.parts, kept_out, *common) if kept_out else None
    own = [*job.usual, *trained.lines, *words.lines(config.output_name), *check_used(job.train_set, config)]
    return Run(
        job.base,
        shared.parts,
        job.train_set,
        config,
        job.plan,
        precision,
        inputs,
        validation,
        words,
        trained.adapter,
        trained.optimizer,
        [group.label for group in trained.groups],
        trained.scaler,
        shared.engine,
        shared.attention,
        [*shared.first, *own, *shared.last, *advised, *job.world.lines(config.train_batch_size)],
        job.folder,
        job.run_id,
        world=job.world,
        average=_average(config, trained.optimizer),
    )


def _average(config: TrainConfig, optimizer: torch.optim.Optimizer) -> Average | None:
    return Average(parameters_of(optimizer), config.ema_decay) if config.ema_decay else None


def _load(jobs: Sequence[Job], settings: Sequence[NetworkSettings]) -> tuple[Parts, list[str]]:
    """Load the base and bring it to the device in the run's storage; return it and lines for the log."""
    base, precision, config = jobs[0].base, jobs[0].precision, jobs[0].config
    encoded_once = all(
        keeps_text(data, own.text_encoder, job.config)
        for job, own in zip(jobs, settings, strict=True)
        for data in (job.train_set, job.train_set.validation)
        if data is not None
    )
    parts = base.load()
    lines = list(base.notes)
    lines += place(
        parts,
        precision,
        owned=base.owned,
        storage=config.base_storage,
        text_at_every_step=not encoded_once,
    )
    if precision.device.type == "cpu" and precision.name != "fp16":
        if precision.name == "bf16":
            pack_convolutions(parts.denoiser)
        use_faster_ways(parts.denoiser)  # what is left
    if precision.device.type not in lean.NOT_ON:
        lean.keep_less(parts.denoiser)
    return parts, lines


def _check_shared(jobs: Sequence[Job]) -> None:
    first = jobs[0]
    for number, job in enumerate(jobs[1:], 2):
        different = [n for n in SHARED if getattr(job.config, n) != getattr(first.config, n)]
        if job.precision.name != first.precision.name:
            different.append("mixed_precision")
        if different:
            raise LoraGraftError(
                "LG-RUN-010",
                f"Runs 1 and {number} cannot train side by side.",
                where=listed(different),
                why="they share one base model and one engine.",
                fix="give these settings the same value in all runs, or train the runs one after the other",
            )
    for number, job in enumerate(jobs, 1):
        if job.config.train_embeddings and len(jobs) > 1:
            raise LoraGraftError(
                "LG-RUN-010",
                f"Run {number} trains embeddings and cannot train beside others.",
                where="train_embeddings",
                why="a word would mean the same embedding in all runs.",
                fix="clear train_embeddings, or train the runs one after the other",
            )
    _check_networks(jobs)


def _check_networks(jobs: Sequence[Job]) -> None:
    """Refuse runs of which one would change its engine, and so its roundings, for another's network."""
    reasons = [settings_of(job.config, None).unfused for job in jobs]
    if all(reasons) or not any(reasons) or jobs[0].config.engine == "eager":
        return
    plain, other = reasons.index(""), next(number for number, why in enumerate(reasons) if why)
    raise LoraGraftError(
        "LG-RUN-010",
        f"Runs {plain + 1} and {other + 1} cannot train side by side.",
        where=f"algo, dropout: {reasons[other]}",
        why="the first of them would run on another engine than it does alone.",
        fix="set engine to eager in all runs, or train the runs one after the other",
    )


def _targets(parts: Parts, job: Job, settings: NetworkSettings) -> list[Target]:
    """List the modules that a run may train: those of its settings, or with ranks from a file, all."""
    family, config = job.base.family, job.config
    if settings.given is not None:
        return family.targets(parts, convolutions=True, preset="everything")
    conv = settings.conv_dim is not None or bool(settings.conv_blocks)
    return family.targets(parts, convolutions=conv, preset=preset_of(config), norms=config.train_norm)


def _engine(parts: Parts, trained: Sequence[Trained], losses_of: Loss) -> tuple[Engine, str]:
    """Return the engine that the settings and the machine allow, and a line on why it is this one."""
    config, precision, processes = trained[0].job.config, trained[0].job.precision, trained[0].job.world.size
    optimizers, scalers = [each.optimizer for each in trained], [each.scaler for each in trained]
    if config.fused_backward_pass and processes > 1:
        raise LoraGraftError(
            "LG-CFG-004",
            "fused_backward_pass is on, but several processes train together.",
            where="fused_backward_pass",
            why="their gradients must be added up before a step, and each would be used and gone.",
            fix="switch fused_backward_pass off, or train in one process",
        )
    name, why = choose(config.engine, precision, optimizers, processes, _unfused(trained))
    line = f"{name} steps ({why})"
    device, deterministic = precision.device, config.deterministic
    if name == "eager":
        inside = config.fused_backward_pass
        return Eager(losses_of, optimizers, scalers, device, deterministic, inside), line
    flat, banks = fuse(parts, [each.adapter for each in trained], precision.dtype)
    fused = Fused(losses_of, optimizers, flat, banks, device, deterministic)
    return (Captured(fused) if name == "captured" else fused), line


def _unfused(trained: Sequence[Trained]) -> str:
    """Say why what is trained needs plain modules; "" where it does not."""
    if reason := next((each.settings.unfused for each in trained if each.settings.unfused), ""):
        return reason
    if trained[0].words.vectors:
        return "embeddings of words are trained"
    return "the optimizer steps within the backward pass" if trained[0].job.config.fused_backward_pass else ""


def _attention(parts: Parts, jobs: Sequence[Job], before: Mapping[str, Any]) -> tuple[Choice, list[str]]:
    """Choose how the denoiser's attention is computed, put it in, and say so."""
    config, precision, multiple = jobs[0].config, jobs[0].precision, jobs[0].base.family.latent_multiple
    width, height = max((b for job in jobs for b in job.train_set.buckets), key=lambda b: b[0] * b[1])
    images = sum(job.world.largest(job.config.train_batch_size) for job in jobs)
    text = max(token_length(job.config) for job in jobs) + 2
    shapes = largest_shapes(parts.denoiser, images, (height // multiple, width // multiple), text)
    choice = choose_attention(
        config.attention,
        precision.device,
        precision.dtype,
        shapes,
        deterministic=config.deterministic,
        before=before.get("attention"),
    )
    installed = use_attention(parts.denoiser, choice.name)
    lines = [f"{choice.name} attention ({choice.why})"]
    return choice, lines + ([installed.note] if installed.note else [])


def _losses(runs: Sequence[Run], rows: Rows, tensors: Tensors) -> torch.Tensor:
    """Return the mean loss of each run's slice, (len(rows),); ``tensors`` are a `Fed`'s, joined."""
    active = [runs[row] for row in rows]
    active[0].adapter.rows.active = rows
    samples = cast(torch.Tensor, tensors[0]).shape[0] // len(rows)
    active[0].adapter.rows.moments = {
        row: Moment(run.config.seed, run.step, run.micro, run.part(), samples)
        for row, run in zip(rows, active, strict=True)
    }
    return micro_losses(active[0].parts, active[0].inputs, [run.config for run in active], tensors)
