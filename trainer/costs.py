"""What opened runs will take of a device's memory: what they hold, and the largest pass through the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from .data.batches import plan_epoch
from .engine.captured import Captured
from .engine.flat import Flat
from .engine.meter import measure, tensor_bytes
from .engine.packed_conv import packed_bytes
from .engine.precision import strict
from .engine.predictor import ENCODING, PREVIEW, SAMPLING, Case, Costs, Footprints, Size, costs_of
from .engine.steps import Eager, Fused, Rows, Tensors
from .engine.swap import frozen
from .inputs import Fed
from .losses import micro_losses
from .objective import NoiseSchedule
from .optim.build import state_bytes
from .run import Run


class Largest:
    """The largest pass that runs make through their base: all together, in eager steps one after the other.

    Where they differ, each of a pass's properties is taken from the run that makes it largest. ``runs``
    is used as it is: once it is emptied, nothing of them is held.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        every = range(len(runs))
        # An input that is encoded at each step goes through the first run's own `Inputs`.
        self.lead = max(every, key=lambda n: (not runs[n].inputs.keeps_text, runs[n].config.network_dim))
        self.rows: Rows = (self.lead,) if isinstance(runs[0].engine, Eager) else tuple(every)

    def modules(self) -> list[nn.Module]:
        """Return the modules that a step computes with."""
        parts, lead = self.runs[0].parts, self.runs[self.lead]
        return [parts.denoiser] if lead.inputs.keeps_text else [parts.denoiser, parts.text_encoders]

    def loss(self, tensors: Tensors) -> torch.Tensor:
        """Return the sum of the losses of all rows."""
        return self._loss(self.rows, tensors)

    def loss_alone(self, tensors: Tensors) -> torch.Tensor:
        """Return the loss of one run, as validation computes it."""
        return self._loss((self.lead,), tensors)

    def inputs(self, batch: int, size: Size, rows: int | None = None) -> Tensors:
        """Return what a micro-batch looks like, without data."""
        runs, meta = self.runs, partial(torch.empty, device="meta")
        family, parts = runs[0].base.family, runs[0].parts
        count = batch * (len(self.rows) if rows is None else rows)
        latent = family.latent_shape(parts, *size)
        readings = [run.inputs.texts.reading for run in runs]
        longest = max(readings, key=lambda r: sum(map(math.prod, family.cond_shapes(parts, r))))
        if runs[self.lead].inputs.keeps_text:
            text = tuple(meta(count, *shape) for shape in family.cond_shapes(parts, longest))
        else:
            tokens = family.tokenize(parts, [""], longest)
            text = tuple(meta(count, *x.shape[1:], dtype=x.dtype) for x in tokens)
        return Fed(
            meta(count, *latent),
            meta(count, *latent),
            meta(count, dtype=torch.long if isinstance(family.objective, NoiseSchedule) else torch.float32),
            text,
            meta(count) if any(run.inputs.is_weighted for run in runs) else None,
            meta(count, 1, *latent[-2:]) if any(run.inputs.is_masked for run in runs) else None,
            meta(count, *latent) if any(run.config.ip_noise_gamma for run in runs) else None,
            meta(count, 6) if family.uses_sizes else None,
        ).tensors

    def _loss(self, rows: Rows, tensors: Tensors) -> torch.Tensor:
        active, lead = [self.runs[row] for row in rows], self.runs[self.lead]
        lead.adapter.rows.active = rows
        with strict(lead.config.deterministic):
            return micro_losses(lead.parts, lead.inputs, [run.config for run in active], tensors).sum()


def case_of(runs: Sequence[Run], num_blocks: int, num_swappable: int) -> Case:
    """Return the runs as they are set; ``num_swappable``: how many blocks the denoiser has."""
    config = runs[0].config
    width, height = max((b for run in runs for b in run.train_set.buckets), key=lambda b: b[0] * b[1])
    swapped = min(config.blocks_to_swap, num_swappable)
    return Case(
        max(run.world.largest(run.config.train_batch_size) for run in runs),
        (height, width),
        max(run.config.network_dim for run in runs),
        config.base_storage,
        num_blocks if config.gradient_checkpointing or swapped else 0,
        swapped,
        captured=isinstance(runs[0].engine, Captured) and not swapped,
    )


def costs_of_runs(largest: Largest, found: Sequence[nn.Module], footprints: Footprints, case: Case) -> Costs:
    """Return what the runs hold and do; ``found`` are the blocks that can be checkpointed.

    Raises `meter.CannotMeasure`.
    """
    runs, parts = largest.runs, largest.runs[0].parts
    flat = flat_of(runs[0])
    values = sum(p.numel() for run in runs for p in run.parameters) if flat is None else flat.values.numel()
    held = 4 + max(math.ceil(state_bytes(run.config, run.precision.device)) for run in runs)
    if flat is not None:  # gradients stay, and so does a working copy of another dtype, with its own
        held += 4 + (0 if flat.work is flat.values else 2 * flat.work.element_size())
    elif len(runs) > 1:  # one run's gradients wait while the next one's are computed
        held += 4
    vae = [] if all(run.config.cache_latents for run in runs) else frozen(parts.vae)
    if any(run.average is not None for run in runs):
        held += 4
    return costs_of(
        largest.modules(),
        parts.denoiser,
        found,
        footprints,
        values=values,
        held=held,
        rank=case.rank,
        storage=case.storage,
        others=_others(largest, case, tensor_bytes(vae)),
        several=_num_shapes(runs) > 1,
        more=packed_bytes(parts.denoiser) + tensor_bytes(vae),
    )


def placed_bytes(largest: Largest, device: torch.device) -> int:
    """Return what of all that is on the device already."""
    modules, flat = largest.modules(), flat_of(largest.runs[0])
    trained = (
        [p for run in largest.runs for p in run.parameters]
        if flat is None
        else [flat.values, flat.grads, flat.work, flat.work_grads]
    )
    tensors = [*(t for module in modules for t in frozen(module)), *trained]
    return packed_bytes(modules[0]) + tensor_bytes(tensors, device)


def _others(largest: Largest, case: Case, vae_held: int) -> dict[str, int]:
    """Return what encoding, sampling and validation take above what is held, in bytes."""
    runs = largest.runs
    first, device = runs[0], runs[0].precision.device
    family, parts = first.base.family, first.parts
    vae = tensor_bytes(frozen(parts.vae)) - vae_held
    height, width = case.size
    latent = family.latent_shape(parts, height, width)
    meta = partial(torch.empty, device="meta")

    def phase(work: Any, inputs: Tensors, modules: list[nn.Module]) -> int:
        return measure(work, inputs, modules, device, backward=False).peak

    def encode(tensors: Tensors) -> torch.Tensor:
        return family.encode_images(parts, cast(torch.Tensor, tensors[0]))["mean"].sum()

    def decode(tensors: Tensors) -> torch.Tensor:
        return family.decode(parts, cast(torch.Tensor, tensors[0])).sum()

    encoding = "encoding at each step" if vae_held else ENCODING
    found = {encoding: vae + phase(encode, (meta(1, 3, height, width),), [parts.vae])}
    if any(run.config.preview_image or run.config.sample_prompts for run in runs):
        between = len(runs) > 1 or bool(first.config.sample_prompts)  # steps of this run, or of the others
        drawing = SAMPLING if between else PREVIEW
        found[drawing] = vae + phase(decode, (meta(1, *latent),), [parts.vae])
    if case.captured and any(run.validation for run in runs):  # else a step takes more
        found["validation"] = phase(
            largest.loss_alone, largest.inputs(case.batch, case.size, 1), largest.modules()
        )
    return found


def _num_shapes(runs: Sequence[Run]) -> int:
    """Return how many sets of shapes micro-batches come in, and so how many graphs are captured."""
    found = set()
    for run in runs:
        config, together = run.config, run.plan.accumulation
        batches = plan_epoch(run.train_set, config.train_batch_size, config.seed, 0)
        for start in range(0, len(batches), together):
            step = batches[start : start + together]
            found |= {(b.bucket, len(b.indices), len(step), run.plan.total_steps, run.setting) for b in step}
    return len(found)


def flat_of(run: Run) -> Flat | None:
    """Return the buffers of a fused engine, also where it is captured; None of an eager one."""
    engine = run.engine.fused if isinstance(run.engine, Captured) else run.engine
    return engine.flat if isinstance(engine, Fused) else None
