"""Make opened runs fit into memory: predict what they take, switch on what is needed, and say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .costs import Largest, case_of, costs_of_runs, flat_of, placed_bytes
from .engine.captured import Captured
from .engine.checkpointing import Undo, blocks, checkpoint_blocks
from .engine.meter import CannotMeasure
from .engine.packed_tensor import held
from .engine.planner import Plan, advice, beyond_room, compare, is_out_of_memory, plan
from .engine.predictor import Case, Footprints, dry_run, room_bytes
from .engine.swap import Swap, frozen
from .errors import LoraGraftError
from .parts import DENOISER, Parts
from .run import Run

SMALL_BYTES = 256 * 2**20  # a base below this fits everywhere: nothing is predicted
SWAPS_ON = ("cuda",)  # devices with memory apart from the host's
CAPTURED = "captured steps"  # how the line in `Run.how` begins
NOT_CAPTURED = "fused steps (one function a layer; blocks that are swapped rule out CUDA graphs)"


@dataclass
class Fitted:
    """What was found and is switched on; ``plan`` is None where nothing was predicted.

    ``found`` are the blocks that can be checkpointed, in forward order, those of the denoiser last.
    """

    found: Sequence[nn.Module] = ()
    lines: list[str] = field(default_factory=list)
    plan: Plan | None = None
    footprints: Footprints | None = None
    _swap: Swap | None = None
    _checkpointing: Undo | None = None

    def put_on(self, choice: Case, device: torch.device) -> None:
        """Put swapping, then checkpointing on the blocks."""
        if choice.swapped:
            self._swap = Swap(self.found[len(self.found) - choice.swapped :], device)
        if choice.checkpointed and self.footprints is not None:
            chosen = self.footprints.chosen(choice.batch, choice.size, choice.checkpointed)
            self._checkpointing = checkpoint_blocks(chosen)

    def take_off(self, *, for_good: bool = False) -> None:
        """Undo both; swapped weights stay in the host's memory, or are let go ``for_good``."""
        if self._checkpointing is not None:
            self._checkpointing()
        if self._swap is not None:
            self._swap.undo(torch.device("cpu"), let_go=for_good)
        self._swap = self._checkpointing = None

    def close(self) -> None:
        """Take off what is on and hold nothing: the base's modules go with the runs."""
        self.take_off(for_good=True)
        self.found, self.plan, self.footprints = (), None, None


def fit(runs: Sequence[Run], fitted: Fitted) -> None:
    """Predict the peak of runs that share a base, and checkpoint or swap as set, or as it takes to fit.

    Raises LG-MEM-001 where `memory: auto` finds no measure that leaves the LoRA the same, LG-MEM-003 and
    LG-RUN-008 where blocks are to be swapped that cannot be.
    """
    first, device = runs[0], runs[0].precision.device
    of_denoiser = blocks(first.parts.denoiser)
    can_swap = _check_swapping(first, of_denoiser)
    trains_text = any(m.target.part != DENOISER for run in runs for m in run.adapter.modules)
    found = [*(_text_blocks(first.parts) if trains_text else []), *of_denoiser]
    largest = Largest(runs)
    footprints = Footprints(largest.loss, largest.inputs, largest.modules(), device, found)
    fitted.found, fitted.footprints = found, footprints
    choice = case_of(runs, len(found), len(of_denoiser))
    fitted.lines += _swap_lines(first, len(of_denoiser))
    placed = placed_bytes(largest, device)
    if placed >= SMALL_BYTES:
        try:
            costs = costs_of_runs(largest, found, footprints, choice)
            fitted.plan = plan(
                costs,
                choice,
                room_bytes(device, placed),
                num_swappable=len(of_denoiser) if can_swap else 0,
                may_change=first.config.memory == "auto",
            )
            fitted.lines += fitted.plan.lines
            choice = fitted.plan.choice
        except CannotMeasure as error:
            fitted.lines.append(f"memory cannot be predicted here: {error}")
    _apply(runs, fitted, choice)
    _forget_gradients(first)


def check(runs: Sequence[Run], fitted: Fitted) -> None:
    """On a GPU, take the largest micro-batch once for real and compare; fit anew where it takes more.

    A shortage counts as more than there is. Raises LG-MEM-001, and LG-MEM-002 where nothing can be changed.
    """
    first = runs[0]
    while (made := fitted.plan) is not None:
        needed = _dry_run(runs, made)
        if needed is None:
            return
        short = needed if isinstance(needed, BaseException) else None
        if isinstance(needed, int):
            beyond, line = compare(made, needed)
            if not beyond:
                fitted.lines.append(line)
                return
        elif made.room_bytes is None or first.config.memory != "auto":
            raise advice(needed, made)
        else:
            beyond, line = beyond_room(made), "memory: a dry run took more than there is"
        fitted.take_off()  # what is really checkpointed would count twice
        costs = replace(made.costs, extra=made.costs.extra + beyond)
        try:
            fitted.plan = plan(
                costs,
                made.choice,
                made.room_bytes,
                num_swappable=made.num_swappable,
                may_change=first.config.memory == "auto",
            )
        except LoraGraftError:
            if short is None:
                raise
            raise advice(short, made) from short
        fitted.lines += [line, *fitted.plan.lines]
        _apply(runs, fitted, fitted.plan.choice)
        _forget_gradients(first)
        if fitted.plan.choice == made.choice:
            return


def _dry_run(runs: Sequence[Run], made: Plan) -> int | BaseException | None:
    """Return the bytes that a micro-batch took, or the shortage that it ended in; None where none is made."""
    first, largest, case = runs[0], Largest(runs), made.choice
    inputs = largest.inputs(case.batch, case.size)
    try:
        parameters = [p for run in runs for p in run.parameters]
        return dry_run(largest.loss, inputs, parameters, first.precision.device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return error.with_traceback(None)  # its frames hold the activations
    finally:
        _forget_gradients(first)


def _apply(runs: Sequence[Run], fitted: Fitted, choice: Case) -> None:
    """Switch on what was chosen; with swapped blocks, captured steps become fused ones."""
    engine = runs[0].engine
    if choice.swapped and isinstance(engine, Captured):  # which block is where is decided on the host
        for run in runs:
            run.engine = engine.fused
            run.how = [NOT_CAPTURED if line.startswith(CAPTURED) else line for line in run.how]
    fitted.put_on(choice, runs[0].precision.device)


def _forget_gradients(run: Run) -> None:
    """Let fused gradients be as before the first step: what was measured reached parameters too."""
    flat = flat_of(run)
    if flat is not None:
        flat.reached.clear()
        flat.grads.zero_()
        flat.work_grads.zero_()


def _swap_lines(run: Run, num_blocks: int) -> list[str]:
    """Say of blocks_to_swap what it cannot do here."""
    asked, device = run.config.blocks_to_swap, run.precision.device
    lines = [f"blocks_to_swap {asked}: the denoiser has {num_blocks} blocks"] if asked > num_blocks else []
    if asked and device.type not in SWAPS_ON:
        lines.append(
            f"blocks_to_swap {asked}: nothing to gain on {device.type}, where weights lie in the host's "
            "memory anyway; steps only take longer, and 0 is quicker"
        )
    return lines


def _check_swapping(run: Run, of_denoiser: Sequence[nn.Module]) -> bool:
    """Say whether blocks may be swapped; refuse LG-MEM-003, LG-RUN-008 where the user sets it and cannot."""
    config, device = run.config, run.precision.device
    if config.blocks_to_swap and config.engine == "captured":
        raise LoraGraftError(
            "LG-RUN-008",
            "Captured steps are not possible with swapped blocks.",
            where="engine and blocks_to_swap",
            why="a CUDA graph reads weights at fixed places, and swapped ones move.",
            fix="set engine to auto or fused, or blocks_to_swap to 0",
        )
    if device.type not in SWAPS_ON:
        return False
    is_shared = _is_shared(run, of_denoiser)
    if config.blocks_to_swap and is_shared:
        raise LoraGraftError(
            "LG-MEM-003",
            "The base model's blocks cannot be swapped: its weights are shared.",
            where=f"blocks_to_swap: {config.blocks_to_swap}",
            why="the program that loaded them keeps them on the device, so nothing would be freed.",
            fix="set blocks_to_swap to 0 (gradient_checkpointing saves memory too), or open the base's file",
        )
    return not is_shared and config.engine != "captured"


def _text_blocks(parts: Parts) -> list[nn.Module]:
    return [block for encoder in parts.text_encoders.values() for block in blocks(encoder)]


def _is_shared(run: Run, of_denoiser: Sequence[nn.Module]) -> bool:
    """Say whether blocks compute on weights that a host holds."""
    if run.base.owned:
        return False
    hosts = run.base.state_dicts["denoiser"]
    places = {t.untyped_storage().data_ptr() for name in hosts for t in held(hosts[name])}
    return any(t.untyped_storage().data_ptr() in places for b in of_denoiser for t in frozen(b) if t.numel())
