"""Everything that a step needs, how it is opened, and how it is put back to where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import nn

from .adapters import lora
from .checkpoint import Checkpoint, RunFolder
from .config import TrainConfig, denoiser_lr, encoder_lr
from .data.batches import Batch, plan_epoch
from .data.cache import TensorCache
from .data.train_set import TrainSet
from .engine.captured import Captured
from .engine.precision import Precision, enable_gradient_checkpointing, place
from .engine.small_maps import use_matrix_products
from .engine.steps import Eager, Engine, Tensors, choose
from .errors import LoraGraftError, one_line
from .families.opening import Base
from .inputs import Fed, Inputs
from .objective import diffusion_loss, min_snr_weight
from .optim import build_optimizer
from .parts import Parts
from .plan import Plan


@dataclass
class Run:
    """Everything that a step needs, and what it changes."""

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
    scaler: torch.amp.GradScaler
    engine: Engine
    engine_why: str
    folder: RunFolder
    run_id: str
    step: int = 0
    micro_losses: list[float] = field(default_factory=list)
    _epoch: tuple[int, list[Batch]] = (-1, [])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained tensors."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of ``step`` (from 0)."""
        epoch, k = divmod(step, self.plan.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (
                epoch,
                plan_epoch(self.train_set, self.config.train_batch_size, self.config.seed, epoch),
            )
        return self._epoch[1][k * self.plan.accumulation : (k + 1) * self.plan.accumulation]


def open_run(
    base: Base,
    train_set: TrainSet,
    config: TrainConfig,
    folder: RunFolder,
    run_id: str,
    plan: Plan,
    precision: Precision,
    cache: Path,
) -> Run:
    """Load the base, put the adapter on it and build the optimizer; nothing is trained yet."""
    parts = base.load()
    place(parts, precision)
    if precision.device.type == "cpu" and precision.name == "fp32":
        use_matrix_products(parts.denoiser)
    rates = {"text_encoder": encoder_lr(config), "denoiser": denoiser_lr(config)}
    settings = lora.Settings(
        config.network_dim,
        config.network_alpha,
        config.conv_dim,
        config.conv_alpha or 1.0,
        config.seed,
        denoiser=rates["denoiser"] > 0,
        text_encoder=rates["text_encoder"] > 0,
    )
    targets = base.family.targets(parts, convolutions=config.conv_dim is not None)
    adapter = lora.inject(parts, settings, targets)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(parts, denoiser=settings.denoiser, text_encoder=settings.text_encoder)
    groups = [(adapter.parameters(part), rate) for part, rate in rates.items() if rate > 0]
    optimizer = build_optimizer(config, groups)
    store, trains_text = TensorCache(cache), settings.text_encoder
    inputs = Inputs(base, parts, train_set, config, precision, store, trains_text, plan.total_steps)
    validation = (
        Inputs(base, parts, train_set.validation, config, precision, store, trains_text)
        if train_set.validation
        else None
    )
    scaler = precision.scaler()
    loss_of = partial(micro_loss, base, parts, config, inputs, precision)
    name, why = choose(config.engine, precision, optimizer)
    engine: Engine = (
        Captured(loss_of, optimizer, precision.device)
        if name == "captured"
        else Eager(loss_of, optimizer, scaler, precision.device)
    )
    return Run(
        base,
        parts,
        train_set,
        config,
        plan,
        precision,
        inputs,
        validation,
        adapter,
        optimizer,
        scaler,
        engine,
        why,
        folder,
        run_id,
    )


def micro_loss(
    base: Base, parts: Parts, config: TrainConfig, inputs: Inputs, precision: Precision, tensors: Tensors
) -> torch.Tensor:
    """Return the loss of one micro-batch: noise, prediction, weight, mean; ``tensors`` are a `Fed`'s."""
    latents, noise, t, text, weight, mask = cast("Fed", tensors)
    schedule = base.family.schedule
    noisy = schedule.add_noise(latents, noise, t)
    cond = inputs.embed(text)
    with precision.autocast():
        pred = base.family.predict(parts, noisy, t, cond)
    if config.min_snr_gamma is not None:
        by_snr = min_snr_weight(schedule.snr(t), config.min_snr_gamma)
        weight = by_snr if weight is None else by_snr * weight
    return diffusion_loss(pred, noise, weight, mask)


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


def planned_lines(run: Run, resumed: Checkpoint | None) -> list[str]:
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
        f"{run.engine.name} steps ({run.engine_why})",
        f"continues at step {resumed.step} with its optimizer state" if resumed else "starts at step 0",
    ]
