"""Everything that a step needs, how it is opened, and how it is put back to where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from .adapters import network
from .adapters.configured import begin, described, preset_of, settings_of, weights_of
from .adapters.fused import fuse
from .adapters.settings import Settings as NetworkSettings
from .adapters.shares import Moment
from .checkpoint import Checkpoint, RunFolder, measures_of
from .config import TrainConfig, token_length
from .data.batches import Batch, plan_epoch
from .data.cache import TensorCache
from .data.train_set import TrainSet
from .engine.attention import use_attention
from .engine.attention_choice import Choice, largest_shapes
from .engine.attention_choice import choose as choose_attention
from .engine.captured import Captured
from .engine.distributed import ALONE, Alone
from .engine.packed_conv import pack_convolutions
from .engine.precision import Precision, place
from .engine.small_maps import use_matrix_products
from .engine.steps import Eager, Engine, Fused, Key, Loss, Rows, Tensors, choose, parameters_of
from .errors import LoraGraftError, listed, one_line
from .families.opening import Base
from .inputs import Fed, Inputs, keeps_text, reading_of
from .inputs.unused import check_used
from .inputs.words import Words
from .losses import micro_losses
from .optim.average import Average
from .optim.build import advice, build_optimizer
from .optim.groups import Group, as_pairs, group_tensors, lr_scale
from .optim.modes import averaged
from .optim.state import pack, unpack
from .origin import Origin
from .parts import Parts, Target
from .plan import Plan
from .trends import Measure


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
    kin: str = ""  # equal for runs that differ in the number of steps alone
    origin: Origin | None = None  # the run that this one continues
    hint: str = ""  # what the user should hear of earlier runs
    world: Alone = ALONE  # the processes that train it together
    usual: Sequence[str] = ()  # lines on settings that were left to the base model


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
    words: Words
    adapter: network.Adapter
    optimizer: torch.optim.Optimizer
    group_labels: list[str]  # which part, and of it what, each of the optimizer's groups is
    scaler: torch.amp.GradScaler
    engine: Engine
    attention: str
    how: list[str]
    folder: RunFolder
    run_id: str
    step: int = 0
    micro_losses: list[float] = field(default_factory=list)
    is_settled: bool = True
    micro: int = 0  # the micro-batch of the step that is under way
    measures: list[Measure] = field(default_factory=list)
    origin: Checkpoint | None = None  # of the run that this one continues
    rolled_back: tuple[int, int] | None = None  # the step at which it diverged, and the one it went back to
    world: Alone = ALONE  # the processes that take its steps together
    average: Average | None = None  # of the trained tensors, where that is what is used
    _epoch: tuple[int, list[Batch]] = (-1, [])
    _ahead: tuple[int, list[Fed | None]] = (-1, [])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained tensors."""
        return parameters_of(self.optimizer)

    @property
    def rate_scale(self) -> float:
        """A factor on all learning rates: half after the run went back to an earlier state."""
        return 1.0 if self.rolled_back is None else 0.5

    @property
    def setting(self) -> Key:
        """What runs must have in common to go through the base together, beside the tensors' shapes."""
        return (reading_of(self.config), self.inputs.keeps_text, self.config.guidance_scale)

    def batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of ``step`` (from 0)."""
        epoch, k = divmod(step, self.plan.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (
                epoch,
                plan_epoch(self.train_set, self.config.train_batch_size, self.config.seed, epoch),
            )
        return self._epoch[1][k * self.plan.accumulation : (k + 1) * self.plan.accumulation]

    def feed(self, step: int) -> list[Fed | None]:
        """Draw what ``step`` is fed, one entry a micro-batch: this process's share, None if it is empty."""
        if self._ahead[0] == step:
            return self._ahead[1]
        fed: list[Fed | None] = []
        sample = 0
        for batch in self.batches(step):
            first, last = self.world.share(len(batch.indices))
            part = batch.part(first, last)
            fed.append(self.inputs.draw(step, sample + first, part) if part.indices else None)
            sample += len(batch.indices)
        return fed

    def part(self) -> tuple[int, int, int] | None:
        """Return (first, behind the last, number) of this micro-batch's samples; None if all are here."""
        if self.world.size == 1:
            return None
        number = len(self.batches(self.step)[self.micro].indices)
        return (*self.world.share(number), number)

    def draw_ahead(self, step: int) -> None:
        """Draw ``step`` now, while the device is still at work on the one before.

        A picture that cannot be read is no fault of the step that is being taken: `feed` will say so.
        """
        if step >= self.plan.total_steps:
            return
        with suppress(LoraGraftError, OSError):
            fed = self.feed(step)
            if self.precision.device.type == "cuda":  # from pinned memory, copies do not wait
                fed = [None if one is None else _pinned(one) for one in fed]
            self._ahead = (step, fed)


def _pinned(fed: Fed) -> Fed:
    return Fed.of(tuple(None if x is None else x.pin_memory() for x in fed.tensors))


# Settings of the base and the engine that runs side by side share, so these must be equal.
SHARED = (
    "guidance_scale",
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


@contextmanager
def as_used(run: Run) -> Iterator[None]:
    """Have the adapter as it will be used while the block runs: its own run's alone, nothing of it varied."""
    run.adapter.select()
    if run.average is None:
        with averaged(run.optimizer):
            yield
        return
    try:
        with run.average.in_place():
            run.engine.refresh(run.adapter.row)  # its copy in the dtype of the arithmetic
            yield
    finally:
        run.engine.refresh(run.adapter.row)


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


def average_line(config: TrainConfig, tensors: Sequence[torch.Tensor]) -> str:
    """Say that an average is kept, and what it takes."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return (
        f"an average of the weights is saved, drawn and validated (ema_decay {config.ema_decay:g}); it takes "
        f"{size / 2**20:.1f} MiB more"
    )


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
    name, ranks = described(config)
    text = "kept once encoded" if run.inputs.keeps_text else "encoded at every step"
    return [
        *run.train_set.lines,
        f"{len(records)} images, {sum(r.repeats for r in records)} with repeats; "
        f"{plan.batches_per_epoch} batches per epoch of up to {config.train_batch_size}, "
        f"{plan.accumulation} per step: {plan.steps_per_epoch} steps per epoch, "
        f"{plan.total_steps} steps in {plan.num_epochs} epochs",
        f"{name} on {in_denoiser} denoiser and {len(modules) - in_denoiser} text encoder modules, {ranks}"
        f"{sum(p.numel() for p in run.parameters):,} parameters",
        f"base {run.base.family.name} {run.base.weights_hash}",
        f"{run.precision.name} on {run.precision.device}, captions {text}",
        *run.how,
        *([] if run.average is None else [average_line(run.config, run.parameters)]),
        *([f"one of {runs} runs side by side"] if runs > 1 else []),
        f"continues at step {resumed.step} with its optimizer state" if resumed else "starts at step 0",
    ]
