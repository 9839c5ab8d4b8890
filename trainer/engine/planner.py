"""Choose, before step 1, the cheapest measures with which a run fits into memory, and say so.

Only measures that leave the LoRA the same are taken: recomputing some blocks, recomputing all, streaming
frozen weights from the host. What does not fit then is refused, with every single change that would help.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle

from ..errors import LoraGraftError, one_line
from .predictor import BYTES_PER_VALUE, DRAWN, Case, Costs, Prediction

SMALLEST_SIDE_PX, SIDE_STEP_PX = 256, 64
RELIEF = 0.85  # after a real shortage: advise what is predicted to need at most this share
MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Plan:
    """The chosen case and its prediction; ``lines`` is for the user, ``room_bytes`` None where unknown.

    ``num_blocks`` and ``num_swappable`` are what the measures could at most use.
    """

    choice: Case
    prediction: Prediction
    room_bytes: int | None
    costs: Costs
    num_blocks: int
    num_swappable: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One setting with another value, and the case that follows."""

    text: str
    case: Case


def plan(
    costs: Costs, start: Case, room_bytes: int | None, *, num_swappable: int = 0, may_change: bool = True
) -> Plan:
    """Choose measures so that the prediction is within ``room_bytes``; raises LG-MEM-001, CannotMeasure.

    ``start`` is the run as set; measures set by the user are never taken back. ``num_swappable``: how many
    blocks' weights may leave the device (0 on a CPU). Without ``may_change``, or where the room is unknown,
    it only predicts.
    """
    num_blocks = len(costs.blocks)
    as_set = costs.predict(start)

    def chosen(case: Case) -> Plan:
        prediction = costs.predict(case)
        lines = [_line(prediction, room_bytes, case, num_blocks)]
        if case != start:
            lines.append(
                f"memory: as set it would be {_gib(as_set.total)} GiB. Steps take longer so, the LoRA is the "
                "same; memory: off leaves the settings as they are"
            )
            lines += _without_swapping(costs, case, start, room_bytes)
        elif room_bytes is not None and prediction.total > room_bytes:
            lines.append("memory: that is more than there is; memory: off changes nothing")
        return Plan(case, prediction, room_bytes, costs, num_blocks, num_swappable, tuple(lines))

    if room_bytes is None or not may_change or as_set.total <= room_bytes:
        return chosen(start)
    for case in _measures(start, num_blocks, num_swappable):
        if costs.predict(case).total <= room_bytes:
            return chosen(_least(costs, case, start, room_bytes))
    raise _refusal(costs, start, room_bytes, num_blocks, num_swappable)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out, on a GPU or on the host."""
    text = str(error).lower()  # torch.OutOfMemoryError is a RuntimeError that says so
    said = isinstance(error, RuntimeError) and any(part in text for part in MEMORY_TEXTS)
    return said or isinstance(error, MemoryError)


def advice(error: BaseException, made: Plan | None) -> LoraGraftError:
    """Return the refusal LG-MEM-002 for a real shortage, with the single change that makes the run fit.

    Without a plan (too early, or nothing could be predicted) it names what can be tried.
    """
    why = f"{one_line(str(error), 300)} Other programs may hold memory that was free before."
    if made is None:
        return LoraGraftError(
            "LG-MEM-002",
            "The memory ran out.",
            where="no prediction was made",
            why=why,
            fix="close other programs, or lower train_batch_size, resolution or network_dim, or set "
            "base_storage fp8",
        )
    limit = made.prediction.total
    if made.room_bytes is not None:
        limit = min(limit, made.room_bytes)
    helps = _changes(made.costs, made.choice, round(RELIEF * limit), made.num_blocks, made.num_swappable)
    best = next(helps, None)
    fix = (
        f"set {best.text} ({_gib(made.costs.predict(best.case).total)} GiB predicted)"
        if best
        else "lower resolution, train_batch_size and network_dim together, or use a device with more memory"
    )
    room = "" if made.room_bytes is None else f" of {_gib(made.room_bytes)}"
    return LoraGraftError(
        "LG-MEM-002",
        "The memory ran out.",
        where=f"{_gib(made.prediction.total)}{room} GiB were predicted ({_parts(made.prediction)})",
        why=why,
        fix=fix,
    )


def compare(made: Plan, needed_bytes: int) -> tuple[int, str]:
    """Return by how many bytes a dry run went beyond the prediction, 0 where it did not, and a line.

    Given to `Costs` as ``extra``, they make another plan right.
    """
    predicted = made.prediction.step
    line = f"memory: a dry run took {_gib(needed_bytes)} GiB, {_gib(predicted)} predicted"
    return max(0, needed_bytes - predicted - made.prediction.other), line


def beyond_room(made: Plan) -> int:
    """Return the least bytes beyond the prediction with which the plan no longer fits the known room.

    For a dry run that ended in a shortage: by how much it fell short, nobody knows.
    """
    assert made.room_bytes is not None
    held = made.prediction.weights + made.prediction.adapter
    return max(0, made.room_bytes - held - made.prediction.step) + 1


def _measures(start: Case, num_blocks: int, num_swappable: int) -> Iterator[Case]:
    """Yield each measure at its fullest, the cheapest first."""
    if start.checkpointed < num_blocks:
        yield replace(start, checkpointed=num_blocks)
    if start.swapped < num_swappable:
        yield replace(start, checkpointed=num_blocks, swapped=num_swappable)


def _least(costs: Costs, fits: Case, start: Case, room_bytes: int) -> Case:
    """Return the smallest use of the measure at its fullest that still fits: fewer blocks, less time."""
    if fits.swapped > start.swapped:
        field, low, high = "swapped", start.swapped, fits.swapped
    else:
        field, low, high = "checkpointed", start.checkpointed, fits.checkpointed

    def case_of(count: int) -> Case:
        return replace(fits, **{field: count})  # type: ignore[arg-type]

    return case_of(_crossing(low, high, lambda n: costs.predict(case_of(n)).total, room_bytes))


def _crossing(low: int, high: int, total_of: Callable[[int], int], room_bytes: int) -> int:
    """Return the smallest number in low..high whose total is within the room; ``high``'s is.

    Totals fall almost in a line, so that a guess on it and its neighbour mostly decide, where halving would
    predict seven cases; each takes seconds for a large model. Halving takes its turn where they do not.
    """
    above, below = total_of(low), total_of(high)
    if above <= room_bytes:
        return low
    ways, fits = cycle(("line", "neighbour", "half")), True
    while high - low > 1:
        way = next(ways)
        if way == "line":
            guess = low + math.ceil((above - room_bytes) / max(1, above - below) * (high - low))
        elif way == "neighbour":
            guess = high - 1 if fits else low + 1
        else:
            guess = (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        found = total_of(guess)
        fits = found <= room_bytes
        if fits:
            high, below = guess, found
        else:
            low, above = guess, found
    return high


def _without_swapping(costs: Costs, case: Case, start: Case, room_bytes: int | None) -> list[str]:
    """Return a line on the storage in which no block more would have to leave the device, if any."""
    if case.swapped == start.swapped or room_bytes is None:
        return []
    here = replace(case, swapped=start.swapped)
    for storage, size in BYTES_PER_VALUE.items():
        total = costs.predict(replace(here, storage=storage)).total
        if size < BYTES_PER_VALUE.get(case.storage, 2.0) and total <= room_bytes:
            return [f"memory: base_storage {storage} would leave all blocks in place ({_gib(total)} GiB)"]
    return []


def _smallest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Return the smallest number in low..high that fits; ``high`` does, and larger ones fit better."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def _changes(costs: Costs, case: Case, limit: int, num_blocks: int, num_swappable: int) -> Iterator[Change]:
    """Yield every single change with which the run fits ``limit``, best first.

    The first four leave the LoRA the same, a smaller batch does with gradient accumulation; then what it
    is trained on becomes coarser, and last what it learns becomes less.
    """

    def fits(other: Case) -> bool:
        return costs.predict(other).total <= limit

    if case.captured and not case.swapped and fits(fused := replace(case, captured=False)):
        yield Change("engine fused", fused)
    if case.checkpointed < num_blocks and fits(full := replace(case, checkpointed=num_blocks)):
        yield Change("gradient_checkpointing true", full)
    if case.swapped < num_swappable:
        full = replace(case, checkpointed=num_blocks, swapped=num_swappable)
        if fits(full):
            least = _least(costs, full, case, limit)
            yield Change(f"blocks_to_swap {least.swapped}", least)
    draws = case.draws and any(name in costs.others for name in DRAWN)
    if draws and fits(blind := replace(case, draws=False)):
        yield Change("preview_image false and sample_prompts to none", blind)
    batches = [replace(case, batch=n) for n in range(1, case.batch)]
    if smaller := _largest(batches, fits):
        yield Change(f"train_batch_size {smaller.batch}", smaller)
    for storage, size in BYTES_PER_VALUE.items():
        if size < BYTES_PER_VALUE.get(case.storage, 2.0) and fits(packed := replace(case, storage=storage)):
            yield Change(f"base_storage {storage}", packed)
    if lower := _largest(list(_smaller_sizes(case)), fits):
        yield Change(f"resolution {_resolution(lower)}", lower)
    ranks = [replace(case, rank=2**n) for n in range(case.rank.bit_length()) if 2**n < case.rank]
    if thinner := _largest(ranks, fits):
        yield Change(f"network_dim {thinner.rank}", thinner)


def _largest(rising: list[Case], fits: Callable[[Case], bool]) -> Case | None:
    """Return the last of ever larger cases that fits; None if not even the first does."""
    if not rising or not fits(rising[0]):
        return None
    index = _smallest(1, len(rising), lambda n: n == len(rising) or not fits(rising[n]))
    return rising[index - 1]


def _smaller_sizes(case: Case) -> Iterator[Case]:
    """Yield sizes of the same shape, in steps of the shorter side, the smallest first."""
    height, width = case.size
    shorter = min(case.size)
    for side in range(SMALLEST_SIDE_PX, shorter, SIDE_STEP_PX):
        size = tuple(round(x * side / shorter / SIDE_STEP_PX) * SIDE_STEP_PX for x in (height, width))
        yield replace(case, size=(size[0], size[1]))


def _resolution(case: Case) -> str:
    """Return the square of a bucket's area, which is what the setting names."""
    side = (case.size[0] * case.size[1]) ** 0.5
    return str(max(SMALLEST_SIDE_PX, int(side / SIDE_STEP_PX) * SIDE_STEP_PX))


def _refusal(
    costs: Costs, start: Case, room_bytes: int, num_blocks: int, num_swappable: int
) -> LoraGraftError:
    fullest = replace(start, checkpointed=num_blocks, swapped=num_swappable)
    needed = costs.predict(fullest)
    helps = list(_changes(costs, fullest, room_bytes, num_blocks, num_swappable))
    named = "; or ".join(f"{c.text} ({_gib(costs.predict(c.case).total)} GiB)" for c in helps)
    return LoraGraftError(
        "LG-MEM-001",
        f"This run needs {_gib(needed.total)} GiB, and {_gib(room_bytes)} are there.",
        where=f"batch {start.batch}, {start.size[1]}x{start.size[0]} px, rank {start.rank}: {_parts(needed)}",
        why=f"that is with {_measures_text(fullest, num_blocks)}; as set it is "
        f"{_gib(costs.predict(start).total)} GiB. Training would stop with an error or crawl.",
        fix=f"set one of: {named}"
        if named
        else "change several settings at once (train_batch_size, resolution, base_storage, network_dim), "
        "or use a device with more memory",
    )


def _line(prediction: Prediction, room_bytes: int | None, case: Case, num_blocks: int) -> str:
    room = "" if room_bytes is None else f" of {_gib(room_bytes)}"
    return (
        f"memory: {_gib(prediction.total)}{room} GiB predicted ({_parts(prediction)}): "
        f"{_measures_text(case, num_blocks)}"
    )


def _parts(prediction: Prediction) -> str:
    phase = prediction.phase
    return (
        f"weights {_gib(prediction.weights)}, LoRA and optimizer {_gib(prediction.adapter)}, "
        f"{phase} {_gib(prediction.phases[phase])}, other {_gib(prediction.other)}"
    )


def _measures_text(case: Case, num_blocks: int) -> str:
    words = []
    if case.checkpointed:
        which = "all" if case.checkpointed == num_blocks else f"{case.checkpointed} of"
        words.append(f"gradient checkpointing on {which} {num_blocks} blocks")
    if case.swapped:
        words.append(f"weights of {case.swapped} blocks in host memory")
    return " and ".join(words) or "nothing recomputed or moved"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**30 / 20 else f"{size / 2**30:.3f}"
