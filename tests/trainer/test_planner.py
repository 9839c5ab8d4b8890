"""The memory planner: the cheapest measure that fits, in words, and what would help where none does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loragraft.trainer.engine import predictor
from loragraft.trainer.engine.checkpointing import blocks
from loragraft.trainer.engine.meter import Footprint, tensor_bytes, track
from loragraft.trainer.engine.planner import Plan, advice, beyond_room, compare, is_out_of_memory, plan
from loragraft.trainer.engine.predictor import Case, Costs, Footprints, Prediction, costs_of
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.trainer import models

GIB = 2**30
BLOCKS = 16
START = Case(batch=4, size=(512, 512), rank=32)


def footprint(batch: int, size: tuple[int, int], checkpointed: int) -> Footprint:
    """Each image of 512 px needs 1 GiB; a checkpointed block gives 1/20 of that back."""
    images = batch * size[0] * size[1] / 512**2
    peak = round(GIB * images * (1 - 0.05 * checkpointed))
    return Footprint(peak, peak, GIB // 64, {"saved": peak - GIB // 64, "gradients": GIB // 64})


def costs(**changes: Any) -> Costs:
    made = Costs(
        weights=3 * GIB // 2,
        packable=[(GIB // 32, GIB // 16)] * 24,
        values=2**23,
        held=12,
        rank=32,
        storage="as_is",
        blocks=[GIB // 16] * BLOCKS,
        footprint=footprint,
    )
    return replace(made, **changes)


def planned(room: float | None, start: Case = START, swap: int = BLOCKS, **options: Any) -> Plan:
    bytes_ = None if room is None else round(room * GIB)
    return plan(costs(), start, bytes_, num_swappable=swap, **options)


def test_what_fits_is_left_as_set() -> None:
    made = planned(24)
    assert made.choice == START
    assert made.lines == (
        "memory: 6.0 of 24.0 GiB predicted (weights 1.5, LoRA and optimizer 0.1, activations 4.0, other 0.5)"
        ": nothing recomputed or moved",
    )


def test_a_few_blocks_first_and_as_few_as_will_do() -> None:
    made = planned(5)
    assert 0 < made.choice.checkpointed < BLOCKS and made.choice.swapped == 0
    assert made.prediction.total <= 5 * GIB
    one_less = replace(made.choice, checkpointed=made.choice.checkpointed - 1)
    assert costs().predict(one_less).total > 5 * GIB
    assert f"gradient checkpointing on {made.choice.checkpointed} of {BLOCKS} blocks" in made.lines[0]
    assert "6.0 GiB" in made.lines[1] and "memory: off" in made.lines[1]


def test_then_all_blocks_then_weights_in_host_memory() -> None:
    full = costs().predict(replace(START, checkpointed=BLOCKS)).total / GIB
    assert planned(full).choice == replace(START, checkpointed=BLOCKS)
    assert f"on all {BLOCKS} blocks" in planned(full).lines[0]
    made = planned(full - 0.3)
    assert made.choice.checkpointed == BLOCKS and 0 < made.choice.swapped < BLOCKS
    one_less = replace(made.choice, swapped=made.choice.swapped - 1)
    assert costs().predict(one_less).total > (full - 0.3) * GIB
    assert f"weights of {made.choice.swapped} blocks in host memory" in made.lines[0]


def test_a_cpu_swaps_nothing() -> None:
    full = costs().predict(replace(START, checkpointed=BLOCKS)).total / GIB
    with pytest.raises(LoraGraftError) as refused:
        planned(full - 0.3, swap=0)
    assert refused.value.code == "LG-MEM-001"


def test_off_and_an_unknown_room_only_predict() -> None:
    off = planned(2, may_change=False)
    assert off.choice == START and "more than there is" in off.lines[1]
    unknown = planned(None)
    assert unknown.choice == START and unknown.lines[0].startswith("memory: 6.0 GiB predicted (")
    assert len(planned(24, may_change=False).lines) == 1


def test_measures_of_the_user_are_never_taken_back() -> None:
    start = replace(START, checkpointed=BLOCKS, swapped=3)
    assert planned(24, start).choice == start
    assert planned(1.75 + 0.45, start).choice.swapped > 3


def refusal(room: float, start: Case = START) -> LoraGraftError:
    with pytest.raises(LoraGraftError) as refused:
        planned(room, start)
    return refused.value


def test_a_refusal_names_each_single_change_that_would_fit() -> None:
    error = refusal(1.5)
    assert error.code == "LG-MEM-001"
    assert "there" in error.what and "batch 4, 512x512 px, rank 32" in error.where
    named = re.findall(r"(\w+) (\w+) \(([\d.]+) GiB\)", error.fix)
    settings = [name for name, _, _ in named]
    assert settings == ["train_batch_size", "resolution"]  # 0.8 GiB of activations are too much
    changed = {"train_batch_size": "batch", "resolution": "size"}
    for name, value, size in named:
        assert float(size) <= 1.5
        new: Any = int(value) if name == "train_batch_size" else (int(value), int(value))
        case = replace(START, **{changed[name]: new})
        assert planned(1.5, case).prediction.total <= 1.5 * GIB  # it is true
    batch = int(named[0][1])
    with pytest.raises(LoraGraftError):  # and the next larger would not do
        planned(1.5, replace(START, batch=batch + 1))


def test_coarser_storage_and_a_lower_rank_are_named_too() -> None:
    heavy = costs(weights=6 * GIB, packable=costs().packable * 4, values=2**27, blocks=[2**20] * BLOCKS)
    with pytest.raises(LoraGraftError) as refused:
        plan(heavy, replace(START, batch=1), 5 * GIB, num_swappable=0)
    settings = re.findall(r"(\w+ \w+) \(", refused.value.fix)
    assert settings == ["base_storage nf4"]  # the milder ones leave too much
    with pytest.raises(LoraGraftError) as refused:
        plan(heavy, replace(START, batch=1), 8 * GIB, num_swappable=0)
    settings = re.findall(r"(\w+ \w+) \(", refused.value.fix)
    assert settings == ["base_storage fp8", "base_storage int8", "base_storage nf4", "network_dim 16"]


def test_a_run_that_only_drawing_makes_too_large_may_go_without() -> None:
    drawing = costs(others={"sampling": 3 * GIB})
    with pytest.raises(LoraGraftError) as refused:
        plan(drawing, START, 3 * GIB, num_swappable=BLOCKS)
    assert refused.value.fix.startswith("set one of: preview_image false and sample_prompts to none (")
    blind = plan(drawing, replace(START, draws=False), 3 * GIB, num_swappable=BLOCKS)
    assert "sampling" not in blind.prediction.phases


def test_where_no_single_change_helps_several_are_named() -> None:
    error = refusal(0.2)
    assert "several settings at once" in error.fix


@given(st.floats(0.3, 8), st.integers(1, 12), st.sampled_from([0, BLOCKS]))
def test_a_plan_fits_or_is_refused(room: float, batch: int, swap: int) -> None:
    start = replace(START, batch=batch)
    try:
        made = planned(room, start, swap)
    except LoraGraftError as error:
        fullest = replace(start, checkpointed=BLOCKS, swapped=swap)
        assert costs().predict(fullest).total > room * GIB
        assert len(error.what) < 120
        return
    assert made.prediction.total <= room * GIB
    assert made.prediction == costs().predict(made.choice)
    assert not made.choice.swapped or made.choice.checkpointed == BLOCKS


def test_the_prediction_counts_phases_not_their_sum() -> None:
    drawn = costs(others={"sampling": 9 * GIB}).predict(START)
    assert drawn.phase == "sampling" and drawn.total < 12 * GIB
    assert "sampling 9.0" in plan(costs(others={"sampling": 9 * GIB}), START, None).lines[0]
    assert costs(extra=GIB).predict(START).total >= costs().predict(START).total + GIB
    assert costs(held=20).predict(START).adapter == 20 * 2**23
    swapped = costs().predict(replace(START, checkpointed=BLOCKS, swapped=5))
    assert swapped.weights == costs().weights - 5 * GIB // 16 + 2 * GIB // 16  # two buffers stay
    half = costs().predict(replace(START, rank=16))
    assert half.adapter == costs().predict(START).adapter // 2


ERRORS: dict[str, BaseException] = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cublas": RuntimeError("CUDA error: out of memory"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
    "windows": RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_shortage_is_recognised_and_answered(name: str) -> None:
    made = planned(24)
    assert is_out_of_memory(ERRORS[name])
    error = advice(ERRORS[name], made)
    assert error.code == "LG-MEM-002"
    assert error.fix.startswith("set gradient_checkpointing true (")
    assert "6.0 of 24.0 GiB" in error.where


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError("out of memory")])
def test_other_errors_are_no_shortage(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_advice_goes_beyond_what_failed() -> None:
    error = ERRORS["cuda"]
    checkpointed = planned(24, replace(START, checkpointed=BLOCKS))
    assert advice(error, checkpointed).fix.startswith("set blocks_to_swap")
    everything = planned(24, replace(START, checkpointed=BLOCKS, swapped=BLOCKS))
    fix = advice(error, everything).fix
    found = re.search(r"set train_batch_size (\d) \(([\d.]+) GiB", fix)
    assert found and float(found[2]) <= 0.86 * everything.prediction.total / GIB
    smallest = plan(costs(weights=0, packable=[]), replace(START, batch=1, size=(256, 256), rank=1), None)
    assert "together" in advice(error, replace(smallest, num_blocks=0)).fix


def test_a_dry_run_corrects_the_prediction() -> None:
    made = planned(24)
    within, line = compare(made, 4 * GIB)
    assert within == 0 and "4.0 GiB" in line
    beyond, _ = compare(made, 6 * GIB)
    assert beyond > 0
    again = plan(replace(made.costs, extra=beyond), START, 24 * GIB)
    assert again.prediction.total >= made.prediction.weights + made.prediction.adapter + 6 * GIB


def test_a_shortage_in_a_dry_run_makes_the_plan_not_fit() -> None:
    made = planned(24)
    again = plan(replace(made.costs, extra=beyond_room(made)), START, None)
    assert again.prediction.total > 24 * GIB


def test_graphs_keep_a_set_of_activations() -> None:
    drawing = costs(others={"sampling": GIB, "encoding": GIB})
    plain, captured = drawing.predict(START), drawing.predict(replace(START, captured=True))
    more = {name: captured.phases[name] - size for name, size in plain.phases.items()}
    kept = {"update": 4 * GIB, "saving": 4 * GIB, "sampling": 4 * GIB}
    assert more == {"activations": 0, "encoding": 0, **kept}
    several = replace(drawing, several=True).predict(replace(START, captured=True))
    assert several.phases["activations"] == 8 * GIB and several.step == 4 * GIB
    assert replace(drawing, several=True).predict(START).phases["activations"] == 4 * GIB
    swapped = replace(START, checkpointed=BLOCKS, swapped=1)
    assert drawing.predict(replace(swapped, captured=True)) == drawing.predict(swapped)  # these are fused


def test_fused_steps_are_named_where_graphs_take_too_much() -> None:
    captured = replace(START, captured=True)
    made = plan(costs(several=True), captured, 24 * GIB)
    assert compare(made, 4 * GIB)[0] == 0 and compare(made, 6 * GIB)[0] > 0  # a dry run is one step
    assert advice(MemoryError(), made).fix.startswith("set engine fused (")
    drawing = costs(others={"sampling": 2 * GIB})
    with pytest.raises(LoraGraftError) as refused:
        plan(drawing, captured, round(4.1 * GIB), num_swappable=0)
    assert refused.value.fix.startswith("set one of: engine fused (")


def test_a_shortage_without_a_plan_is_answered_too() -> None:
    error = advice(MemoryError("full"), None)
    assert error.code == "LG-MEM-002" and "full" in error.why and "train_batch_size" in error.fix


# ---- with the real meter on the tiny model ----


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.model()


def measured(model: models.Model) -> tuple[Footprints, Callable[..., Costs]]:
    found = [b for root in model.roots for b in blocks(root)]

    def inputs_of(batch: int, size: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        height, width = size[0] // 8, size[1] // 8
        return (
            torch.empty(batch, 4, height, width, device="meta"),
            torch.empty(batch, dtype=torch.long, device="meta"),
            torch.empty(batch, 1, 77, dtype=torch.long, device="meta"),
        )

    footprints = Footprints(model.loss, inputs_of, model.roots, models.CPU, found)

    def build(**changes: Any) -> Costs:
        values = sum(p.numel() for p in model.parameters)
        made = costs_of(
            model.roots,
            model.parts.denoiser,
            found,
            footprints,
            values=values,
            held=12,
            rank=4,
            storage="as_is",
            others={},
        )
        return replace(made, **changes)

    return footprints, build


@pytest.mark.slow
def test_the_plan_for_a_real_model_is_true(model: models.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from loragraft.trainer.engine.checkpointing import checkpoint_blocks

    monkeypatch.setattr(predictor, "WORKSPACE_BYTES", 0)  # the tiny model is smaller than that
    footprints, build = measured(model)
    known = build()
    start = Case(batch=2, size=(64, 64), rank=4)
    frozen = [t for root in model.roots for t in root.parameters() if not t.requires_grad]
    assert known.weights >= tensor_bytes(frozen)
    as_set = known.predict(start)
    full = known.predict(replace(start, checkpointed=len(known.blocks)))
    assert full.total < as_set.total
    made = plan(known, start, (as_set.total + full.total) // 2)
    assert 0 < made.choice.checkpointed < len(known.blocks)
    chosen = footprints.chosen(2, (64, 64), made.choice.checkpointed)
    assert len(chosen) == made.choice.checkpointed
    undo = checkpoint_blocks(chosen)
    real = track(model.loss, models.inputs(2, 8), model.roots, models.CPU)
    undo()
    assert real.peak == made.prediction.phases["activations"]


def test_the_blocks_that_leave_most_behind_come_first(model: models.Model) -> None:
    footprints, _ = measured(model)
    left = footprints(1, (64, 64), 0).blocks
    chosen = footprints.chosen(1, (64, 64), 5)
    taken = [left[i] for i, b in enumerate(footprints.blocks) if b in chosen]
    others = [left[i] for i, b in enumerate(footprints.blocks) if b not in chosen]
    assert min(taken) >= max(others)
    assert chosen == [b for b in footprints.blocks if b in chosen]  # forward order
    assert footprints.chosen(1, (64, 64), len(left)) == list(footprints.blocks)


def test_each_footprint_is_measured_once(model: models.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    footprints, _ = measured(model)
    calls: list[int] = []
    real = predictor.measure

    def counted(*args: Any, **kwargs: Any) -> Footprint:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(predictor, "measure", counted)
    first = footprints(1, (64, 64), 0)
    assert footprints(1, (64, 64), 0) is first and len(calls) == 1
    assert footprints(2, (64, 64), 0).saved > first.saved


def test_free_memory_is_known_where_the_system_tells() -> None:
    free = predictor.free_bytes(models.CPU)
    assert free is None or 2**20 < free < 2**50
    assert predictor.free_bytes(torch.device("mps")) is None


def test_free_memory_of_a_gpu_counts_what_the_allocator_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert predictor.free_bytes(torch.device("cuda")) == 130


def test_mapped_weights_are_not_counted_as_free_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "free_bytes", lambda device: None if device.type == "mps" else 1000)
    monkeypatch.setattr(predictor, "_own_bytes", lambda: 30)
    assert predictor.room_bytes(models.CPU, 20) == 1020
    assert predictor.room_bytes(models.CPU, 500) == 1030, "470 of them lie in a file"
    assert predictor.room_bytes(torch.device("cuda"), 500) == 1500
    assert predictor.room_bytes(torch.device("mps"), 500) is None


def test_the_own_memory_is_known_where_the_system_tells() -> None:
    own = predictor._own_bytes()
    assert own == 0 or 2**20 < own < 2**40


def test_a_cpu_makes_no_dry_run(model: models.Model) -> None:
    def never(tensors: Any) -> torch.Tensor:
        raise AssertionError("it ran")

    assert predictor.dry_run(never, (), model.parameters, models.CPU) is None


def test_a_prediction_adds_up() -> None:
    made = Prediction(weights=10, adapter=5, phases={"activations": 100, "saving": 40})
    assert made.phase == "activations"
    assert made.total == 10 + 5 + 100 + predictor.WORKSPACE_BYTES + 5


def test_packed_weights_are_known() -> None:
    from loragraft.trainer.engine.frozen import freeze

    layer = torch.nn.Sequential(torch.nn.Linear(64, 32)).requires_grad_(False)
    assert predictor._packable(layer) == [(2048, 8192)]
    freeze(layer, torch.float32, None, storage="nf4")
    ((values, size),) = predictor._packable(layer)
    assert (values, size) == (2048, 1024 + 128 + 64)  # codes, a scale for 64 values, the levels
