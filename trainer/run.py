"""Everything that a step needs, how it is opened, and how it is put back to where it stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from .adapters import lora
from .adapters.fused import fuse
from .checkpoint import Checkpoint, RunFolder
from .config import TrainConfig, denoiser_lr, encoder_lr
from .data.batches import Batch, plan_epoch
from .data.cache import TensorCache
from .data.train_set import TrainSet
from .engine.attention import use_attention
from .engine.attention_choice import Choice, largest_shapes
from .engine.attention_choice import choose as choose_attention
from .engine.captured import Captured
from .engine.packed_conv import pack_convolutions
from .engine.precision import Precision, place
from .engine.small_maps import use_matrix_products
from .engine.steps import Eager, Engine, Fused, Key, Loss, Rows, Tensors, choose, parameters_of
from .errors import LoraGraftError, listed, one_line
from .families.opening import Base
from .inputs import Fed, Inputs, keeps_text
from .losses import micro_losses
from .optim import build_optimizer
from .parts import Parts
from .plan import Plan


@dataclass(frozen=True)
class Job:
    """A run before anything is loaded: what it trains, where it writes, and who it is."""

    base: Base
    train_set: TrainSet
    config: TrainConfig
    plan: Plan
    precision: Precision
    run_id: str
    words: str
    folder: RunFolder


@dataclass
class Run:
    """Everything that a step needs, and what it changes; runs side by side share base, parts and engine.

    ``is_settled`` is False while an update is under way: then the tensors are no finished step's.
    """

    base: Base
    parts: Parts
    train_set: TrainSet
    config: TrainConfig
    plan: Plan
    precision: Precision
    inputs: Inputs
    validation: Inputs | None
    adapter: lora.Adapter
    optimizer: torch.optim.Optimizer
    group_parts: list[str]  # which part each of the optimizer's groups belongs to
    scaler: torch.amp.GradScaler
    engine: Engine
    attention: str
    how: list[str]
    folder: RunFolder
    run_id: str
    step: int = 0
    micro_losses: list[float] = field(default_factory=list)
    is_settled: bool = True
    _epoch: tuple[int, list[Batch]] = (-1, [])
    _ahead: tuple[int, list[Fed]] = (-1, [])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained tensors."""
        return parameters_of(self.optimizer)

    @property
    def setting(self) -> Key:
        """What runs must have in common to go through the base together, beside the tensors' shapes."""
        return (self.config.clip_skip, self.inputs.keeps_text)

    def batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of ``step`` (from 0)."""
        epoch, k = divmod(step, self.plan.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (
                epoch,
                plan_epoch(self.train_set, self.config.train_batch_size, self.config.seed, epoch),
            )
        return self._epoch[1][k * self.plan.accumulation : (k + 1) * self.plan.accumulation]

    def feed(self, step: int) -> list[Fed]:
        """Draw what ``step`` is fed, one entry a micro-batch."""
        if self._ahead[0] == step:
            return self._ahead[1]
        fed, sample = [], 0
        for batch in self.batches(step):
            fed.append(self.inputs.draw(step, sample, batch))
            sample += len(batch.indices)
        return fed

    def draw_ahead(self, step: int) -> None:
        """Draw ``step`` now, while the device is still at work on the one before.

        A picture that cannot be read is no fault of the step that is being taken: `feed` will say so.
        """
        if step >= self.plan.total_steps:
            return
        with suppress(LoraGraftError, OSError):
            fed = self.feed(step)
            if self.precision.device.type == "cuda":  # from pinned memory, copies do not wait
                fed = [Fed(*(None if x is None else x.pin_memory() for x in one)) for one in fed]  # type: ignore[arg-type]
            self._ahead = (step, fed)


# Settings of the base and the engine that runs side by side share, so these must be equal.
SHARED = (
    "engine",
    "deterministic",
    "attention",
    "base_storage",
    "memory",
    "blocks_to_swap",
    "gradient_checkpointing",
)


def open_runs(jobs: Sequence[Job], cache: Path, before: Mapping[str, Any]) -> list[Run]:
    """Load the base once, put all runs' adapters on it and build the optimizers; nothing is trained yet.

    The jobs have one base. ``before`` is what the checkpoint to continue from says of itself, empty at a
    start: what was chosen then stays. Raises LG-RUN-010 where the jobs need different ones of what they
    share.
    """
    _check_shared(jobs)
    base, precision, config = jobs[0].base, jobs[0].precision, jobs[0].config
    settings = [_lora_settings(job.config) for job in jobs]
    parts, lines = _load(jobs, settings)
    rates = [{"text_encoder": encoder_lr(j.config), "denoiser": denoiser_lr(j.config)} for j in jobs]
    attention, said = _attention(parts, jobs, before)
    targets = [base.family.targets(parts, convolutions=job.config.conv_dim is not None) for job in jobs]
    adapters = lora.inject_side_by_side(parts, list(zip(settings, targets, strict=True)))
    optimizers = [
        build_optimizer(
            job.config, [(adapter.parameters(part), rate) for part, rate in own.items() if rate > 0]
        )
        for job, adapter, own in zip(jobs, adapters, rates, strict=True)
    ]
    runs: list[Run] = []
    scalers = [precision.scaler() for _ in jobs]
    losses_of = partial(_losses, runs)
    engine, why = _engine(parts, config, precision, losses_of, optimizers, scalers, adapters)
    store = TensorCache(cache)
    for job, own, adapter, optimizer, scaler, lrs in zip(
        jobs, settings, adapters, optimizers, scalers, rates, strict=True
    ):
        common = (job.config, precision, store, own.text_encoder)
        inputs = Inputs(base, parts, job.train_set, *common, job.plan.total_steps)
        kept_out = job.train_set.validation
        validation = Inputs(base, parts, kept_out, *common) if kept_out else None
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
                adapter,
                optimizer,
                [part for part, lr in lrs.items() if lr > 0],
                scaler,
                engine,
                attention.name,
                [*lines, why, *said],
                job.folder,
                job.run_id,
            )
        )
    return runs


def _load(jobs: Sequence[Job], settings: Sequence[lora.Settings]) -> tuple[Parts, list[str]]:
    """Load the base and bring it to the device in the run's storage; return it and lines for the log."""
    base, precision, config = jobs[0].base, jobs[0].precision, jobs[0].config
    encoded_once = all(
        keeps_text(data, own.text_encoder)
        for job, own in zip(jobs, settings, strict=True)
        for data in (job.train_set, job.train_set.validation)
        if data is not None
    )
    parts = base.load()
    lines = place(
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


def _lora_settings(config: TrainConfig) -> lora.Settings:
    return lora.Settings(
        config.network_dim,
        config.network_alpha,
        config.conv_dim,
        config.conv_alpha or 1.0,
        config.seed,
        denoiser=denoiser_lr(config) > 0,
        text_encoder=encoder_lr(config) > 0,
    )


def _engine(
    parts: Parts,
    config: TrainConfig,
    precision: Precision,
    losses_of: Loss,
    optimizers: Sequence[torch.optim.Optimizer],
    scalers: Sequence[torch.amp.GradScaler],
    adapters: Sequence[lora.Adapter],
) -> tuple[Engine, str]:
    """Return the engine that the settings and the machine allow, and a line on why it is this one."""
    name, why = choose(config.engine, precision, optimizers[0])
    line = f"{name} steps ({why})"
    device, deterministic = precision.device, config.deterministic
    if name == "eager":
        return Eager(losses_of, optimizers, scalers, device, deterministic), line
    flat, banks = fuse(parts, adapters, precision.dtype)
    fused = Fused(losses_of, optimizers, flat, banks, device, deterministic)
    return (Captured(fused) if name == "captured" else fused), line


def _attention(parts: Parts, jobs: Sequence[Job], before: Mapping[str, Any]) -> tuple[Choice, list[str]]:
    """Choose how the denoiser's attention is computed, put it in, and say so."""
    config, precision, multiple = jobs[0].config, jobs[0].precision, jobs[0].base.family.latent_multiple
    width, height = max((b for job in jobs for b in job.train_set.buckets), key=lambda b: b[0] * b[1])
    images = sum(job.config.train_batch_size for job in jobs)
    text = max(int(job.config.max_token_length) for job in jobs) + 2
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
    return micro_losses(active[0].parts, active[0].inputs, [run.config for run in active], tensors)


def training_state(run: Run) -> dict[str, torch.Tensor]:
    """Return all that a continued run needs: adapter and optimizer state in full precision, losses."""
    tensors = {f"adapter.{k}": v for k, v in run.adapter.state_dict().items()}
    for i, parameter in enumerate(run.parameters):
        for key, value in run.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{i}.{key}"] = torch.as_tensor(value).detach().cpu()
    tensors["micro_losses"] = torch.tensor(run.micro_losses, dtype=torch.float32)
    return tensors


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put the run back to where ``checkpoint`` was written; raises LG-RUN-007 if it does not fit."""
    try:
        tensors, info = checkpoint.tensors(), checkpoint.info()
        run.adapter.load_state_dict(
            {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")}
        )
        for i, parameter in enumerate(run.parameters):
            prefix = f"optimizer.{i}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if state:  # a parameter that no gradient reached has none
                run.optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}
        if run.scaler.is_enabled():
            run.scaler.load_state_dict(info["scaler"])
        run.engine.reload(run.adapter.row)
        run.micro_losses = tensors["micro_losses"].tolist()
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise unfit(checkpoint, one_line(str(error), 200)) from error
    run.step = checkpoint.step


def unfit(checkpoint: Checkpoint, why: str) -> LoraGraftError:
    """Return the refusal of a checkpoint that is whole, but not this run's."""
    return LoraGraftError(
        "LG-RUN-007",
        f"The checkpoint of step {checkpoint.step} cannot be continued.",
        where=str(checkpoint.folder),
        why=f"it does not fit this run: {why}.",
        fix="start the run afresh (existing_run on the node, --fresh on the command line)",
    )


def planned_lines(run: Run, resumed: Checkpoint | None, runs: int = 1) -> list[str]:
    """Say in words what is known before step 1."""
    config, plan = run.config, run.plan
    records, modules = run.train_set.records, run.adapter.modules
    in_denoiser = sum(m.target.part == "denoiser" for m in modules)
    text = "kept once encoded" if run.inputs.keeps_text else "encoded at every step"
    return [
        *run.train_set.lines,
        f"{len(records)} images, {sum(r.repeats for r in records)} with repeats; "
        f"{plan.batches_per_epoch} batches per epoch of up to {config.train_batch_size}, "
        f"{plan.accumulation} per step: {plan.steps_per_epoch} steps per epoch, "
        f"{plan.total_steps} steps in {plan.num_epochs} epochs",
        f"LoRA on {in_denoiser} denoiser and {len(modules) - in_denoiser} text encoder modules, "
        f"rank {config.network_dim}, alpha {config.network_alpha:g}, "
        f"{sum(p.numel() for p in run.parameters):,} parameters",
        f"base {run.base.family.name} {run.base.weights_hash}",
        f"{run.precision.name} on {run.precision.device}, captions {text}",
        *run.how,
        *([f"one of {runs} runs side by side"] if runs > 1 else []),
        f"continues at step {resumed.step} with its optimizer state" if resumed else "starts at step 0",
    ]
