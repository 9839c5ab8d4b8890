"""Runs made to fit: what is switched on, what is said, what a shortage becomes, and that nothing stays."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api, costs, fit, together
from loragraft.trainer.costs import Largest, case_of
from loragraft.trainer.engine import planner, predictor
from loragraft.trainer.engine.captured import Captured
from loragraft.trainer.engine.planner import Plan
from loragraft.trainer.engine.steps import Eager, Fused
from loragraft.trainer.engine.swap import Swap
from loragraft.trainer.inputs.feed import Fed
from loragraft.trainer.run import Run
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal

pytestmark = pytest.mark.slow  # each opens and measures runs: two minutes in all

CPU = torch.device("cpu")
UNET_BLOCKS, TEXT_BLOCKS = 18, 2


def checkpointed(fitted: fit.Fitted) -> int:
    """Return how many blocks are recomputed; others are wrapped, too, such as those that keep less."""
    forwards = [vars(block).get("forward") for block in fitted.found]
    return sum(getattr(f, "__qualname__", "").startswith("_checkpointed.") for f in forwards)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Run], fit.Fitted]]:
    """Have even the tiny base predicted; returns what was opened and fitted."""
    monkeypatch.setattr(fit, "SMALL_BYTES", 0)
    monkeypatch.setattr(predictor, "WORKSPACE_BYTES", 0)  # the tiny base is smaller than that
    found: list[tuple[list[Run], fit.Fitted]] = []
    real = fit.fit

    def fitting(opened: list[Run], fitted: fit.Fitted) -> None:
        found.append((opened, fitted))
        real(opened, fitted)

    monkeypatch.setattr(together, "fit", fitting)
    return found


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, seen: Any) -> Callable[[Callable[[Plan], int]], None]:
    """Return a function that sets the room: a number of bytes from the plan of the run as set."""
    real = fit.plan

    def set_to(of: Callable[[Plan], int]) -> None:
        rooms: list[int] = []

        def planned(known: Any, case: Any, bytes_: int | None, **options: Any) -> Plan:
            if not rooms:
                rooms.append(of(real(known, case, None, **options)))
            return real(known, case, rooms[0], **options)

        monkeypatch.setattr(fit, "plan", planned)

    return set_to


def total(made: Plan, **changes: Any) -> int:
    return made.costs.predict(replace(made.choice, **changes)).total


def lines_of(events: list[api.Event]) -> list[str]:
    return [line for line in runs.only(events, api.Planned).lines if line.startswith("memory")]


@pytest.fixture
def opened(training: runs.Training, seen: Any) -> Iterator[Callable[..., list[Run]]]:
    """Return a function that opens runs as `train_together` does and leaves them fitted, unchecked."""
    generators = []

    def start(*jobs: dict[str, Any]) -> list[Run]:
        pairs = [
            (training.train_set, runs.settings(**{"output_name": f"run{n}", **job}))
            for n, job in enumerate(jobs or ({},))
        ]
        events = api.train_together(training.base, pairs, places=training.places, device="cpu")
        generators.append(events)
        next(events)
        return seen[-1][0]

    yield start
    for events in generators:
        events.close()


# ---- what is switched on ----


def test_a_small_base_is_not_predicted(training: runs.Training) -> None:
    assert lines_of(training.events(max_train_steps=1)) == []


def test_what_fits_is_left_as_set_after_as_few_measurements_as_can_be(
    training: runs.Training, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for module in (predictor, costs):
        real = module.measure  # type: ignore[attr-defined]

        def counted(*args: Any, real: Any = real, name: str = module.__name__, **options: Any) -> Any:
            calls.append(name.rpartition(".")[2])
            return real(*args, **options)

        monkeypatch.setattr(module, "measure", counted)
    room(lambda made: total(made))
    (line,) = lines_of(training.events(max_train_steps=1, sample_prompts=("zibu",)))
    assert line.endswith("nothing recomputed or moved")
    assert sorted(calls) == ["costs", "costs", "predictor"]  # encoding, sampling, one micro-batch


def test_some_blocks_are_checkpointed_and_no_bit_changes(
    training: runs.Training, room: Any, seen: Any
) -> None:
    settings = {"max_train_steps": 3, "network_train_unet_only": True}
    plain = training.elsewhere("plain").finish(**settings)
    room(lambda made: (total(made) + total(made, checkpointed=UNET_BLOCKS)) // 2)
    wrapped: list[int] = []
    events = training.start(**settings)
    for event in events:
        if isinstance(event, api.Step):
            wrapped.append(checkpointed(seen[-1][1]))
        last = event
    assert 0 < wrapped[0] < UNET_BLOCKS and len(set(wrapped)) == 1
    assert last.losses == plain.losses
    assert last.lora_file.read_bytes() == plain.lora_file.read_bytes()


def test_blocks_are_swapped_and_no_bit_changes(
    training: runs.Training, room: Any, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SWAPS_ON", ("cpu",))
    plain = training.elsewhere("plain").finish(max_train_steps=3, network_train_unet_only=True)
    made: list[Swap] = []
    monkeypatch.setattr(fit, "Swap", lambda *a: made.append(Swap(*a)) or made[-1])
    everything = {"checkpointed": UNET_BLOCKS}
    room(lambda as_set: total(as_set, **everything, swapped=UNET_BLOCKS) + 2**16)
    events = training.events(max_train_steps=3, network_train_unet_only=True)
    assert "blocks in host memory" in lines_of(events)[0]
    last = runs.only(events, api.Finished)
    assert last.losses == plain.losses and len(made) == 1
    assert made[0].host_bytes == 0  # it was undone
    assert last.lora_file.read_bytes() == plain.lora_file.read_bytes()


def test_what_cannot_fit_is_refused(training: runs.Training, room: Any) -> None:
    room(lambda made: made.prediction.weights // 2)
    with Refusal("LG-MEM-001", "batch 3"):
        training.events(max_train_steps=1)


def test_memory_off_only_says(training: runs.Training, room: Any, seen: Any) -> None:
    room(lambda made: made.prediction.weights // 2)
    said = lines_of(training.events(max_train_steps=1, memory="off"))
    assert "nothing recomputed or moved" in said[0] and "more than there is" in said[1]


def test_checkpointing_set_by_the_user_is_there_without_a_prediction(
    training: runs.Training, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SMALL_BYTES", 2**60)
    with closing(training.start(max_train_steps=1, gradient_checkpointing=True)) as events:
        next(events)
        (_, fitted) = seen[0]
        assert fitted.plan is None
        assert checkpointed(fitted) == len(fitted.found) == UNET_BLOCKS + TEXT_BLOCKS


# ---- the dry run ----


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let dry runs answer what the list holds: bytes, or an error to raise; returns the list."""
    answers: list[Any] = []

    def answer(loss_of: Any, inputs: Any, parameters: Any, device: Any) -> int | None:
        if not answers:
            return 0
        found = answers.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found(inputs) if callable(found) else found

    monkeypatch.setattr(fit, "dry_run", answer)
    return answers


def test_what_a_dry_run_shows_is_done(training: runs.Training, room: Any, seen: Any, dry: Any) -> None:
    room(lambda made: total(made) + 2**16)

    def more_than_predicted(inputs: Any) -> int:
        (_, fitted) = seen[0]
        assert checkpointed(fitted) == 0
        return int(fitted.plan.prediction.step + fitted.plan.prediction.other + 2**18)

    dry.append(more_than_predicted)
    with closing(training.start(max_train_steps=1, network_train_unet_only=True)) as events:
        said = lines_of([next(events)])
        (_, fitted) = seen[0]
        count = checkpointed(fitted)
        assert 0 < count == fitted.plan.choice.checkpointed < UNET_BLOCKS
        assert "a dry run took" in said[1]
        assert f"gradient checkpointing on {count} of {UNET_BLOCKS} blocks" in said[2]
    assert dry == []


def test_a_new_plan_moves_what_was_swapped_before(
    training: runs.Training, room: Any, seen: Any, dry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SWAPS_ON", ("cpu",))
    settings = {"max_train_steps": 3, "network_train_unet_only": True}
    plain = training.elsewhere("plain").finish(**settings)
    made: list[Swap] = []
    monkeypatch.setattr(fit, "Swap", lambda *a: made.append(Swap(*a)) or made[-1])
    room(lambda as_set: total(as_set, checkpointed=UNET_BLOCKS, swapped=8) + 2**12)

    def more_than_predicted(inputs: Any) -> int:
        prediction = seen[-1][1].plan.prediction
        return int(prediction.step + prediction.other + 2**18)

    dry.append(more_than_predicted)
    last = training.finish(**settings)
    assert len(made) == 2 and all(swap.host_bytes == 0 for swap in made)
    assert last.lora_file.read_bytes() == plain.lora_file.read_bytes()


def test_a_shortage_in_the_dry_run_leads_to_a_new_plan(
    training: runs.Training, room: Any, seen: Any, dry: Any
) -> None:
    room(lambda made: total(made) + 2**10)
    short = torch.OutOfMemoryError("CUDA out of memory.")
    dry.append(short)
    with closing(training.start(max_train_steps=1, network_train_unet_only=True)) as events:
        next(events)
        (_, fitted) = seen[0]
        assert fitted.plan.choice.checkpointed > 0
        assert checkpointed(fitted) > 0
        assert short.__traceback__ is None  # its frames would hold the activations


@pytest.mark.parametrize("memory", ["off", "auto"])
def test_a_shortage_that_no_plan_helps_is_refused(
    training: runs.Training, dry: Any, seen: Any, memory: str
) -> None:
    dry.extend([torch.OutOfMemoryError("CUDA out of memory.")] * 30)
    with Refusal("LG-MEM-002", "CUDA out of memory"):
        training.events(max_train_steps=1, memory=memory)


def test_another_error_in_the_dry_run_stays_what_it_is(training: runs.Training, dry: Any, seen: Any) -> None:
    dry.append(RuntimeError("mat1 and mat2"))
    with pytest.raises(RuntimeError, match="mat1"):
        training.events(max_train_steps=1)


# ---- real shortages ----


def test_a_shortage_in_a_step_saves_what_is_finished(
    training: runs.Training, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Fused.backward, [0]

    def backward(self: Fused, micros: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, micros)

    monkeypatch.setattr(Fused, "backward", backward)
    with Refusal("LG-MEM-002", "Tried to allocate", "GiB predicted"):
        training.events()
    assert runs.newest(runs.run_folder(training.places)).name == "step-000002"
    monkeypatch.undo()
    assert training.finish().step == 4


def test_a_shortage_while_opening_says_so_too(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(together, "open_runs", full)
    with Refusal("LG-MEM-002", "CUDA out of memory", "no prediction"):
        training.events()


# ---- nothing of the measuring stays ----


def files(events: Any) -> dict[int, bytes]:
    return {n: e.lora_file.read_bytes() for n, e in events if isinstance(e, api.Finished)}


@pytest.mark.parametrize("jobs", [[2], [1, 2]], ids=["alone", "side by side"])
def test_parameters_that_no_gradient_reaches_stay_as_they_are(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch, jobs: list[int]
) -> None:
    def train(place: str) -> dict[int, bytes]:
        pairs = [
            (training.train_set, runs.settings(output_name=f"r{n}", clip_skip=n, engine="fused"))
            for n in jobs
        ]
        places = training.elsewhere(place).places
        return files(api.train_together(training.base, pairs, places=places, device="cpu"))

    plain = train("plain")
    monkeypatch.setattr(fit, "SMALL_BYTES", 0)
    assert train("measured") == plain


@pytest.mark.parametrize("ends", ["closed", "finished"])
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"blocks_to_swap": 4}])
def test_the_base_goes_with_the_generator(
    training: runs.Training, seen: Any, ends: str, settings: dict[str, Any]
) -> None:
    events = training.start(max_train_steps=2, **settings)
    next(events)
    denoiser = weakref.ref(seen[0][0][0].parts.denoiser)
    gc.collect()
    gc.disable()
    try:
        if ends == "closed":
            next(e for e in events if isinstance(e, api.Step))
        else:
            assert isinstance([*events][-1], api.Finished)
        assert seen[0][0] == [] or ends == "closed"
        events.close()
        assert denoiser() is None
    finally:
        gc.enable()


# ---- what is predicted ----


def test_a_packed_base_is_counted(opened: Any, seen: Any) -> None:
    (whole,) = opened({"network_train_unet_only": True})
    plain = fit.placed_bytes(Largest([whole]), CPU), seen[-1][1].plan.costs
    (packed,) = opened({"output_name": "packed", "network_train_unet_only": True, "base_storage": "fp8"})
    placed, known = fit.placed_bytes(Largest([packed]), CPU), seen[-1][1].plan.costs
    assert plain[0] / 4 < placed < plain[0] / 2
    held = sum(b.nbytes for b in packed.parts.denoiser.buffers())
    assert known.weights >= held > plain[1].weights / 8
    assert sum(count for count, _ in known.packable) == sum(count for count, _ in plain[1].packable)
    further = known.predict(replace(case_of([packed], UNET_BLOCKS, UNET_BLOCKS), storage="nf4"))
    assert further.weights < 0.8 * known.weights


def test_flat_buffers_are_placed_already(opened: Any) -> None:
    (run,) = opened({"engine": "fused"})
    flat = costs.flat_of(run)
    assert flat is not None
    largest = Largest([run])
    before = fit.placed_bytes(largest, CPU)
    flat.work_grads = torch.zeros_like(flat.grads)  # in fp32 it is the same tensor
    assert fit.placed_bytes(largest, CPU) - before == flat.grads.nbytes


def test_a_pass_is_as_large_as_the_worst_of_all_runs(opened: Any) -> None:
    jobs = [
        {"network_train_unet_only": True, "network_dim": 8},
        {"max_token_length": 150},
        {"train_batch_size": 1, "network_train_unet_only": True},
    ]
    many = Largest(opened(*[{**job, "engine": "fused"} for job in jobs]))
    assert many.rows == (0, 1, 2) and many.lead == 1
    (text,) = Fed.of(many.inputs(2, (32, 32))).text
    assert text.shape == (6, 2, 77) and len(many.modules()) == 2
    assert text.dtype == torch.long
    eager = Largest(
        opened(*[{**job, "engine": "eager", "output_name": f"e{n}"} for n, job in enumerate(jobs)])
    )
    assert isinstance(eager.runs[0].engine, Eager) and eager.rows == (1,)
    assert Fed.of(eager.inputs(2, (32, 32))).latents.shape == (2, 4, 4, 4)


def test_a_vae_that_every_step_uses_is_held(opened: Any, seen: Any) -> None:
    (run,) = opened({"sample_prompts": ("zibu",)})
    kept, vae = seen[-1][1].plan.costs, sum(p.nbytes for p in run.parts.vae.parameters())
    opened({"output_name": "y", "sample_prompts": ("zibu",), "cache_latents": False})
    held = seen[-1][1].plan.costs
    assert held.weights == kept.weights + vae
    assert held.others["sampling"] == kept.others["sampling"] - vae
    assert held.others["encoding at each step"] == kept.others["encoding"] - vae


# ---- captured steps ----


def as_captured(run: Run) -> Captured:
    """Put a captured engine that captures nothing around a run's fused one."""
    engine = Captured.__new__(Captured)
    engine.fused = run.engine  # type: ignore[assignment]
    for group in run.optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]))
    run.engine = engine
    run.how = ["captured steps (whole steps as CUDA graphs)", "other"]
    return engine


def test_swapping_turns_captured_steps_into_fused_ones_and_says_so(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = opened({"engine": "fused"})
    engine = as_captured(run)
    run.config = replace(run.config, engine="auto", blocks_to_swap=3)
    monkeypatch.setattr(fit, "SMALL_BYTES", 2**60)
    fitted = fit.Fitted()
    fit.fit([run], fitted)
    assert run.engine is engine.fused
    assert run.how[0].startswith("fused steps") and "swapped" in run.how[0] and run.how[1] == "other"
    before = [p.clone() for p in run.parameters]
    for bank in engine.fused.banks:
        bank.reach((0,))
    engine.fused.flat.grads.fill_(1.0)
    run.engine.update(0, 1.0)  # rates that are tensors
    assert not all(torch.equal(a, b) for a, b in zip(run.parameters, before, strict=True))
    fitted.close()


def test_captured_steps_and_swapped_blocks_are_refused_together(opened: Any) -> None:
    (run,) = opened({"engine": "fused"})
    run.config = replace(run.config, engine="captured", blocks_to_swap=3)
    with Refusal("LG-RUN-008", "blocks_to_swap"):
        fit.fit([run], fit.Fitted())


def test_the_pool_of_graphs_is_counted(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = opened({"engine": "fused"})
    plain, captured = fit.Fitted(), fit.Fitted()
    fit.fit([run], plain)
    as_captured(run)
    fit.fit([run], captured)
    assert plain.plan is not None and captured.plan is not None
    assert captured.plan.choice.captured and captured.plan.costs.several  # buckets, and a partial batch
    step = plain.plan.prediction.step
    for phase, share in {"activations": 1, "update": 1, "encoding": 0}.items():
        more = captured.plan.prediction.phases[phase] - plain.plan.prediction.phases[phase]
        assert more == share * step
    error = planner.advice(MemoryError(), replace(captured.plan, room_bytes=10 * total(captured.plan)))
    assert error.fix.startswith("set engine fused") or total(plain.plan) > 0.85 * total(captured.plan)
    for fitted in (plain, captured):
        fitted.close()


# ---- whose weights may leave ----


def test_weights_that_a_host_shares_are_not_swapped(
    training: runs.Training, seen: Any, weights: Any, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SWAPS_ON", ("cpu",))
    shared = api.open_base_from_weights(
        {k: v.float() for k, v in weights.items()}, name="x", tokenizers={"clip": tokenizer}
    )
    with Refusal("LG-MEM-003", "blocks_to_swap"):
        training.elsewhere("a", base=shared).events(max_train_steps=1, blocks_to_swap=3)
    with closing(training.elsewhere("b", base=shared).start(max_train_steps=1)) as events:
        next(events)
        assert seen[-1][1].plan.num_swappable == 0
    with closing(training.start(max_train_steps=1)) as events:
        next(events)
        assert seen[-1][1].plan.num_swappable == UNET_BLOCKS


# ---- what is said of swapping ----


def test_swapping_on_a_cpu_is_said_to_gain_nothing(training: runs.Training, seen: Any) -> None:
    events = training.events(max_train_steps=1, blocks_to_swap=99, memory="off")
    said = [line for line in runs.only(events, api.Planned).lines if line.startswith("blocks_to_swap 99")]
    assert len(said) == 2, "neither is lost where the memory is predicted"
    assert said[0].endswith(f"the denoiser has {UNET_BLOCKS} blocks") and "nothing to gain on cpu" in said[1]
