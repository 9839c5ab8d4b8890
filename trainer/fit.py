"""Make opened runs fit into memory: predict what they take, switch on what is needed, and say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from .engine.captured import Captured
from .engine.checkpointing import blocks, checkpoint_blocks
from .engine.meter import CannotMeasure, measure, tensor_bytes
from .engine.packed_conv import packed_bytes
from .engine.planner import Plan, compare, plan
from .engine.predictor import SAMPLING, Case, Costs, Footprints, costs_of, dry_run, free_bytes
from .engine.steps import Eager, Fused, Tensors
from .engine.swap import Swap
from .inputs import Fed
from .run import Run

SMALL_BYTES = 256 * 2**20  # a base below this fits everywhere: nothing is predicted
ADAMW_BYTES = 8  # two moments of each trained number
LATENT_CHANNELS = 4


@dataclass
class Fitted:
    """What was found and done; ``plan`` is None where nothing was predicted."""

    lines: list[str] = field(default_factory=list)
    plan: Plan | None = None


def fit(runs: Sequence[Run]) -> Fitted:
    """Predict the peak of runs that share a base, and checkpoint or swap as set, or as it takes to fit.

    Raises LG-MEM-001 where `memory: auto` finds no measure that leaves the LoRA the same.
    """
    first = runs[0]
    config, device = first.config, first.precision.device
    trains_text = any(m.target.part == "text_encoder" for run in runs for m in run.adapter.modules)
    of_denoiser = blocks(first.parts.denoiser)
    found = [*(blocks(first.parts.text_encoder) if trains_text else []), *of_denoiser]
    in_step = [first.parts.denoiser] + ([] if first.inputs.keeps_text else [first.parts.text_encoder])
    footprints = Footprints(
        lambda tensors: _losses_of(first)(tuple(range(len(runs))), tensors).sum(),
        partial(_inputs, runs),
        in_step,
        device,
        found,
    )
    width, height = max((b for run in runs for b in run.train_set.buckets), key=lambda b: b[0] * b[1])
    swapped = min(config.blocks_to_swap, len(of_denoiser))
    start = Case(
        max(run.config.train_batch_size for run in runs),
        (height, width),
        max(run.config.network_dim for run in runs),
        config.base_storage,
        len(found) if config.gradient_checkpointing or swapped else 0,
        swapped,
    )
    fitted = Fitted()
    packed = packed_bytes(first.parts.denoiser)
    placed = packed + tensor_bytes((t for module in in_step for t in module.parameters()), device)
    if placed >= SMALL_BYTES:
        try:
            costs = _costs(runs, in_step, found, footprints, start)
            costs = replace(costs, weights=costs.weights + packed)
            fitted = _planned(costs, start, placed, num_swappable=len(of_denoiser), runs=runs)
        except CannotMeasure as error:
            fitted.lines.append(f"memory cannot be predicted here: {error}")
    choice = start if fitted.plan is None else fitted.plan.choice
    _apply(runs, choice, found, footprints)
    return fitted


def check(runs: Sequence[Run], fitted: Fitted) -> None:
    """On a GPU, take the largest micro-batch once for real and compare; plan anew where it takes more."""
    made, first = fitted.plan, runs[0]
    if made is None or first.precision.device.type != "cuda":
        return
    case = made.choice
    inputs = tuple(
        None if x is None else torch.zeros_like(x, device=first.precision.device)
        for x in _inputs(runs, case.batch, case.size)
    )
    needed = dry_run(
        lambda tensors: _losses_of(first)(tuple(range(len(runs))), tensors).sum(),
        inputs,
        [p for run in runs for p in run.parameters],
        first.precision.device,
    )
    flat = _flat(first)
    if flat is not None:  # fused gradients went there
        flat.grads.zero_()
        flat.work_grads.zero_()
    if needed is None:
        return
    beyond, line = compare(made, needed)
    fitted.lines.append(line)
    if beyond:
        costs = replace(made.costs, extra=beyond)
        may = first.config.memory == "auto"
        again = plan(costs, case, made.room_bytes, num_swappable=made.num_swappable, may_change=may)
        fitted.plan, fitted.lines = again, [*fitted.lines, *again.lines]


def _planned(costs: Costs, start: Case, placed: int, *, num_swappable: int, runs: Sequence[Run]) -> Fitted:
    device = runs[0].precision.device
    free = free_bytes(device)
    room = None if free is None else free + placed
    made = plan(
        costs,
        start,
        room,
        num_swappable=num_swappable if device.type == "cuda" else 0,
        may_change=runs[0].config.memory == "auto",
    )
    return Fitted(list(made.lines), made)


def _apply(runs: Sequence[Run], choice: Case, found: Sequence[nn.Module], footprints: Footprints) -> None:
    """Put swapping, then checkpointing on the blocks, for as long as the runs live."""
    first = runs[0]
    if choice.swapped:
        Swap(found[len(found) - choice.swapped :], first.precision.device)
        if isinstance(first.engine, Captured):  # which block is where is decided on the host, at each use
            fused = first.engine.fused
            for run in runs:
                run.engine = fused
    if choice.checkpointed:
        checkpoint_blocks(footprints.chosen(choice.batch, choice.size, choice.checkpointed))


def _costs(
    runs: Sequence[Run],
    in_step: Sequence[nn.Module],
    found: Sequence[nn.Module],
    footprints: Footprints,
    start: Case,
) -> Costs:
    first = runs[0]
    flat = _flat(first)
    values = sum(p.numel() for run in runs for p in run.parameters) if flat is None else flat.values.numel()
    held = 4 + ADAMW_BYTES
    if flat is not None:  # gradients stay, and so does a working copy of another dtype, with its own
        held += 4 + (0 if flat.work is flat.values else 2 * flat.work.element_size())
    return costs_of(
        in_step,
        first.parts.denoiser,
        found,
        footprints,
        values=values,
        held=held,
        rank=start.rank,
        storage=start.storage,
        others=_others(runs, start),
    )


def _others(runs: Sequence[Run], start: Case) -> dict[str, int]:
    """Return what encoding and sampling take above what is held, in bytes."""
    first, device = runs[0], runs[0].precision.device
    family, parts = first.base.family, first.parts
    vae = tensor_bytes(parts.vae.parameters(), None)
    height, width = start.size
    latent = (LATENT_CHANNELS, height // family.latent_multiple, width // family.latent_multiple)
    meta = partial(torch.empty, device="meta")

    def phase(work: Any, inputs: Tensors, module: nn.Module) -> int:
        return measure(work, inputs, [module], device, backward=False).peak

    def encode(tensors: Tensors) -> torch.Tensor:
        return family.encode_images(parts, cast(torch.Tensor, tensors[0]))["mean"].sum()

    def decode(tensors: Tensors) -> torch.Tensor:
        return cast(torch.Tensor, cast(Any, parts.vae).decode(tensors[0], return_dict=False)[0]).sum()

    found = {"encoding": vae + phase(encode, (meta(1, 3, height, width),), parts.vae)}
    if any(run.config.preview_image or run.config.sample_prompts for run in runs):
        found[SAMPLING] = vae + phase(decode, (meta(1, *latent),), parts.vae)
    return found


def _inputs(runs: Sequence[Run], batch: int, size: tuple[int, int]) -> Fed:
    """Return what a micro-batch of all runs looks like, without data."""
    first, meta = runs[0], partial(torch.empty, device="meta")
    family, parts, inputs = first.base.family, first.parts, first.inputs
    count, (height, width) = batch * len(runs), (x // family.latent_multiple for x in size)
    chunks = int(first.config.max_token_length) // 75
    text = (
        meta(count, chunks * 75 + 2, cast(Any, parts.text_encoder).config.hidden_size)
        if inputs.keeps_text
        else meta(count, chunks, 77, dtype=torch.long)
    )
    return Fed(
        meta(count, LATENT_CHANNELS, height, width),
        meta(count, LATENT_CHANNELS, height, width),
        meta(count, dtype=torch.long),
        text,
        meta(count) if inputs.is_weighted else None,
        meta(count, 1, height, width) if inputs.is_masked else None,
    )


def _fused(run: Run) -> Fused | None:
    engine = run.engine.fused if isinstance(run.engine, Captured) else run.engine
    return engine if isinstance(engine, Fused) else None


def _flat(run: Run) -> Any:
    fused = _fused(run)
    return None if fused is None else fused.flat


def _losses_of(run: Run) -> Any:
    fused = _fused(run)
    return cast(Eager, run.engine).loss_of if fused is None else fused.loss_of
