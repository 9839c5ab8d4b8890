"""Open runs: load the base once, put all adapters on it, build the optimizers and the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from .engine.attention import use_attention
from .engine.attention_choice import Choice, largest_shapes
from .engine.attention_choice import choose as choose_attention
from .engine.captured import Captured
from .engine.packed_conv import pack_convolutions
from .engine.precision import Precision, place
from .engine.small_maps import use_matrix_products
from .engine.steps import Eager, Engine, Fused, Loss, Rows, Tensors, choose, parameters_of
from .errors import LoraGraftError, listed
from .families.opening import Base
from .inputs import Inputs, keeps_text
from .inputs.unused import check_used
from .inputs.words import Words
from .losses import micro_losses
from .optim.average import Average
from .optim.build import advice, build_optimizer
from .optim.groups import Group, as_pairs, group_tensors, lr_scale
from .parts import Parts, Target
from .run import Job, Run

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


def open_runs(jobs: Sequence[Job], cache: Path, before: Mapping[str, Any]) -> list[Run]:
    """Load the base once, put all runs' adapters on it and build the optimizers; nothing is trained yet.

    The jobs have one base. ``before`` is what the checkpoint to continue from says of itself, empty at a
    start: what was chosen then stays. Raises LG-RUN-010 where the jobs need different ones of what they
    share.
    """
    _check_shared(jobs)
    base, precision, config = jobs[0].base, jobs[0].precision, jobs[0].config
    starts = [weights_of(job.config) for job in jobs]
    family = base.family
    settings = [
        settings_of(j.config, family.blocks, s, family.encoders) for j, s in zip(jobs, starts, strict=True)
    ]
    parts, lines = _load(jobs, settings)
    attention, said = _attention(parts, jobs, before)
    targets = [_targets(base, parts, *pair) for pair in zip((j.config for j in jobs), settings, strict=True)]
    adapters = network.inject_side_by_side(parts, list(zip(settings, targets, strict=True)))
    begun = [begin(*each) for each in zip(adapters, (j.config for j in jobs), starts, strict=True)]
    groups = [
        group_tensors(job.config, ((m.target, m.tensors) for m in adapter.modules), base.family.blocks)
        for job, adapter in zip(jobs, adapters, strict=True)
    ]
    words = [Words(base, parts, job.train_set, job.config, precision) for job in jobs]
    for job, own, each in zip(jobs, groups, words, strict=True):
        if each.vectors:
            own.append(Group("embedding", job.config.embedding_lr * lr_scale(job.config), each.parameters()))
    optimizers = [build_optimizer(job.config, as_pairs(own)) for job, own in zip(jobs, groups, strict=True)]
    runs: list[Run] = []
    scalers = [precision.scaler() for _ in jobs]
    losses_of = partial(_losses, runs)
    processes = jobs[0].world.size
    unfused = next((own.unfused for own in settings if own.unfused), "")
    if words[0].vectors:
        unfused = unfused or "embeddings of words are trained"
    engine, why = _engine(
        parts, config, precision, losses_of, optimizers, scalers, adapters, processes, unfused
    )
    store = TensorCache(cache)
    for job, own, adapter, optimizer, scaler, sorted_tensors, lines_of, trained_words in zip(
        jobs, settings, adapters, optimizers, scalers, groups, begun, words, strict=True
    ):
        common = (job.config, precision, store, own.text_encoder)
        advised = advice(job.config, sorted_tensors, base.family.blocks)
        inputs = Inputs(base, parts, job.train_set, *common, job.plan.total_steps)
        kept_out = job.train_set.validation
        validation = Inputs(base, parts, kept_out, *common) if kept_out else None
        lines_of = [*lines_of, *trained_words.lines(job.config.output_name)]
        lines_of += check_used(job.train_set, job.config)
        runs.append(
            Run(
                base,
                parts,
                job.train_set,
                job.config,
                job.plan,
                precision,
                inputs,
                validation,
                trained_words,
                adapter,
                optimizer,
                [group.label for group in sorted_tensors],
                scaler,
                engine,
                attention.name,
                [
                    *(*lines, *job.usual, *lines_of, why, *said, *advised),
                    *job.world.lines(job.config.train_batch_size),
                ],
                job.folder,
                job.run_id,
                world=job.world,
                average=_average(job.config, optimizer),
            )
        )
    return runs


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
        use_matrix_products(parts.denoiser)  # what is left
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


def _targets(base: Base, parts: Parts, config: TrainConfig, settings: NetworkSettings) -> list[Target]:
    """List the modules that a run may train: those of its settings, or with ranks from a file, all."""
    if settings.given is not None:
        return base.family.targets(parts, convolutions=True, preset="everything")
    conv = settings.conv_dim is not None or bool(settings.conv_blocks)
    preset = preset_of(config)
    return base.family.targets(parts, convolutions=conv, preset=preset, norms=config.train_norm)


def _engine(
    parts: Parts,
    config: TrainConfig,
    precision: Precision,
    losses_of: Loss,
    optimizers: Sequence[torch.optim.Optimizer],
    scalers: Sequence[torch.amp.GradScaler],
    adapters: Sequence[network.Adapter],
    processes: int,
    unfused: str,
) -> tuple[Engine, str]:
    """Return the engine that the settings and the machine allow, and a line on why it is this one.

    ``unfused`` says why a network needs plain modules, if one does.
    """
    inside = config.fused_backward_pass
    if inside and processes > 1:
        raise LoraGraftError(
            "LG-CFG-004",
            "fused_backward_pass is on, but several processes train together.",
            where="fused_backward_pass",
            why="their gradients must be added up before a step, and each would be used and gone.",
            fix="switch fused_backward_pass off, or train in one process",
        )
    unfused = unfused or ("the optimizer steps within the backward pass" if inside else "")
    name, why = choose(config.engine, precision, optimizers, processes, unfused)
    line = f"{name} steps ({why})"
    device, deterministic = precision.device, config.deterministic
    if name == "eager":
        return Eager(losses_of, optimizers, scalers, device, deterministic, inside), line
    flat, banks = fuse(parts, adapters, precision.dtype)
    fused = Fused(losses_of, optimizers, flat, banks, device, deterministic)
    return (Captured(fused) if name == "captured" else fused), line


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
