"""What a run says before step 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .adapters.configured import described
from .checkpoint import Checkpoint
from .config import TrainConfig
from .inputs import reading_of
from .inputs.lengths import cut_line
from .run import Run


def average_line(config: TrainConfig, tensors: Sequence[torch.Tensor]) -> str:
    """Say that an average is kept, and what it takes."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return (
        f"an average of the weights is saved, drawn and validated (ema_decay {config.ema_decay:g}); it takes "
        f"{size / 2**20:.1f} MiB more"
    )


def cut_caption_line(run: Run) -> str | None:
    """Say which captions, of training and of validation, the base model does not read to their ends."""
    sets = [run.train_set, *([run.validation.train_set] if run.validation is not None else [])]
    return cut_line(run.base.family, run.parts, sets, run.config, reading_of(run.config))


def planned_lines(run: Run, resumed: Checkpoint | None, runs: int = 1) -> list[str]:
    """Say in words what is known before step 1."""
    config, plan = run.config, run.plan
    records, modules = run.train_set.records, run.adapter.modules
    in_denoiser = sum(m.target.part == "denoiser" for m in modules)
    name, ranks = described(config)
    text = "kept once encoded" if run.inputs.keeps_text else "encoded at every step"
    places = run.inputs.texts.reading.t5_length
    if places != reading_of(config).t5_length:
        text += f" in {places} places each, which hold the longest: more would be padding that is hidden"
    return [
        *run.train_set.lines,
        f"{len(records)} images, {sum(r.repeats for r in records)} with repeats; "
        f"{plan.batches_per_epoch} batches per epoch of up to {config.train_batch_size}, "
        f"{plan.accumulation} per step: {plan.steps_per_epoch} steps per epoch, "
        f"{plan.total_steps} steps in {plan.num_epochs} {'epoch' if plan.num_epochs == 1 else 'epochs'}",
        f"{name} on {in_denoiser} denoiser and {len(modules) - in_denoiser} text encoder modules, {ranks}"
        f"{sum(p.numel() for p in run.parameters):,} parameters",
        f"base {run.base.family.name} {run.base.weights_hash}",
        f"{run.precision.name} on {run.precision.device}, captions {text}",
        *run.how,
        *([] if run.average is None else [average_line(run.config, run.parameters)]),
        *([f"one of {runs} runs side by side"] if runs > 1 else []),
        f"continues at step {resumed.step} with its optimizer state" if resumed else "starts at step 0",
    ]
