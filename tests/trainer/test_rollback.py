"""A run that diverges goes back once, says so, goes on at half the rate, and ends the second time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from loragraft.trainer import api, loop, rollback
from loragraft.trainer.families.sd15 import SD15
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal

OPTIONS = {"max_train_steps": 8, "save_every_n_steps": 3, "lr_scheduler": "cosine"}


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes the predictions of one step NaN, so many times it is taken."""

    def make(step: int, times: int = 1) -> None:
        real_step, real_predict = loop.train_step, SD15.predict
        now = {"bad": False, "left": times}

        def train_step(run: Any) -> Any:
            now["bad"] = run.step + 1 == step and now["left"] > 0
            now["left"] -= now["bad"]
            return real_step(run)

        def predict(self: SD15, *args: Any, **options: Any) -> torch.Tensor:
            pred = real_predict(self, *args, **options)
            return pred * math.nan if now["bad"] else pred

        monkeypatch.setattr(loop, "train_step", train_step)
        monkeypatch.setattr(SD15, "predict", predict)

    return make


def rates(events: list[api.Event]) -> list[tuple[int, float]]:
    return [(e.step, e.learning_rates["denoiser"]) for e in runs.of(events, api.Step)]


@pytest.mark.parametrize("engine", [pytest.param("eager", marks=pytest.mark.slow), "fused"])
def test_it_goes_back_to_the_newest_save_and_on_at_half_the_rate(
    training: runs.Training, poison: Callable[..., None], engine: str
) -> None:
    options = {**OPTIONS, "engine": engine}
    straight = training.elsewhere("straight").events(**options)
    poison(6)
    events = training.events(**options)
    plain, found = dict(rates(straight)), rates(events)
    assert [s for s, _ in found] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8], "step 6 was not one"
    assert [r for _, r in found[:5]] == [plain[s] for s in range(1, 6)]
    assert [r for _, r in found[5:]] == [plain[s] / 2 for s in range(4, 9)]
    losses = runs.losses(events)
    assert losses[5] == losses[3], "the same state and the same data give the same loss"
    assert losses[6] != losses[4], "then it learned less"
    (note,) = [n.text for n in runs.of(events, api.Note)]
    assert "step 6" in note and "Rolled back to step 3" in note and "half" in note
    finished = runs.only(events, api.Finished)
    assert finished.losses == pytest.approx(tuple(losses[:3] + losses[5:]), rel=1e-7)
    metadata = api.lora_metadata(finished.lora_file)
    assert metadata["loragraft_rolled_back"] == "from step 5 to step 3, from there half the learning rate"
    assert "Rolled back" in (finished.run_folder / "log.log").read_text("utf-8")
    lines = (finished.run_folder / "log.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
    reused = training.finish(**options)
    assert reused.reused and "loragraft_rolled_back" in api.lora_metadata(reused.lora_file)


@pytest.mark.parametrize("engine", ["eager", pytest.param("fused", marks=pytest.mark.slow)])
def test_without_a_save_it_goes_back_to_the_start(
    training: runs.Training, poison: Callable[..., None], engine: str
) -> None:
    """The result is that of a run at half the rate from the beginning."""
    options = {"max_train_steps": 5, "engine": engine, "lr_scheduler": "constant"}
    half = training.elsewhere("half").finish(**options, learning_rate=5e-4)
    poison(3)
    events = training.events(**options)
    assert [s for s, _ in rates(events)] == [1, 2, 1, 2, 3, 4, 5]
    finished = runs.only(events, api.Finished)
    ours, theirs = api.lora_tensors(finished.lora_file), api.lora_tensors(half.lora_file)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_the_second_time_it_ends(training: runs.Training, poison: Callable[..., None]) -> None:
    poison(6, times=2)
    with Refusal("LG-RUN-004", "step 6", "gone back to step 3", "half the learning rate"):
        training.events(**OPTIONS)
    folder = runs.run_folder(training.places)
    assert runs.newest(folder).name == "step-000003"
    assert not training.places.loras.exists()
    assert "LG-RUN-004" in (folder / "log.log").read_text("utf-8")


def test_it_can_be_told_to_end_the_first_time(training: runs.Training, poison: Callable[..., None]) -> None:
    poison(6)
    with Refusal("LG-RUN-004", "step 6", "step 3"):
        training.events(**OPTIONS, on_divergence="stop")


@pytest.mark.slow
def test_a_run_that_went_back_continues_bit_exact(
    training: runs.Training, poison: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and continued at every step after it, in runs that meet no more NaN."""
    poison(5)
    straight = training.elsewhere("straight").finish(**OPTIONS)
    poison(5)
    events = training.start(**OPTIONS)
    went_back = False
    for event in events:
        went_back |= isinstance(event, api.Note)
        if went_back and isinstance(event, api.Step) and event.step == 5:
            break
    events.close()
    for step in (6, 7):
        training.stop_after(step, **OPTIONS)
    finished = training.finish(**OPTIONS)
    assert finished.lora_file.read_bytes() == straight.lora_file.read_bytes()
    assert finished.losses == straight.losses


def test_a_stop_while_it_explodes_saves_nothing_of_it(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollback, "explodes", lambda losses: len(losses) == 5)
    training.stop_after(5, **OPTIONS)
    assert runs.newest(runs.run_folder(training.places)).name == "step-000003"


def test_an_explosion_goes_back_too(training: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that explodes is told, then taken back."""
    calls = iter(range(1000))
    monkeypatch.setattr(rollback, "explodes", lambda losses: next(calls) == 4)
    events = training.events(**OPTIONS)
    assert [e.step for e in runs.of(events, api.Step)] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    (note,) = runs.of(events, api.Note)
    assert note.text.startswith("The loss exploded at step 5. Rolled back to step 3")


@pytest.mark.slow
def test_a_real_explosion_is_noticed(training: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions a thousand times too large, step after step: the loss itself says so."""
    real_step, real_predict = loop.train_step, SD15.predict
    now = {"step": 0, "on": True}

    def train_step(run: Any) -> Any:
        now["step"] = run.step + 1
        return real_step(run)

    def predict(self: SD15, *args: Any, **options: Any) -> torch.Tensor:
        pred = real_predict(self, *args, **options)
        return pred + 100 if now["on"] and now["step"] > 25 else pred

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(SD15, "predict", predict)
    steps, notes = [], []
    for event in training.start(max_train_steps=40, save_every_n_steps=20):
        if isinstance(event, api.Note):
            notes.append(event.text)
            now["on"] = False
        if isinstance(event, api.Step):
            steps.append(event.step)
    assert notes[0].startswith("The loss exploded at step 28. Rolled back to step 20")
    assert steps == [*range(1, 29), *range(21, 41)]


@pytest.mark.slow
def test_samples_measures_and_saves_after_it_are_those_of_the_new_way(
    training: runs.Training, poison: Callable[..., None]
) -> None:
    options = {**OPTIONS, "sample_prompts": ["zibu"], "sample_every_n_steps": 1, "sample_steps": 1}
    poison(6)
    events = training.events(**options)
    drawn = [e.step for e in runs.of(events, api.Sampled)]
    assert drawn == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert [e.step for e in runs.of(events, api.Saved)] == [3, 6, 8]


@pytest.mark.slow
def test_one_of_several_runs_goes_back_alone(training: runs.Training, poison: Callable[..., None]) -> None:
    configs = [runs.settings(**OPTIONS, seed=seed, output_name=f"r{seed}") for seed in (1, 2)]
    real = loop.train_step
    places = training.elsewhere("together").places
    done = {"once": False}

    def train_step(run: Any) -> Iterator[Any]:
        if run.config.seed == 2 and run.step == 4 and not done["once"]:
            done["once"] = True
            result = yield from real(run)
            run.step -= 1
            run.is_settled = False
            del run.micro_losses[-1:]
            raise rollback.not_finite(run, "loss", run.batches(run.step))
            return result
        return (yield from real(run))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        jobs = [(training.train_set, config) for config in configs]
        events = list(api.train_together(training.base, jobs, places=places, device="cpu"))
    steps = {n: [e.step for m, e in events if m == n and isinstance(e, api.Step)] for n in (0, 1)}
    assert steps == {0: list(range(1, 9)), 1: [1, 2, 3, 4, 4, 5, 6, 7, 8]}
    alone = training.elsewhere("alone").finish(**OPTIONS, seed=1, output_name="r1")
    (first,) = [e for m, e in events if m == 0 and isinstance(e, api.Finished)]
    ours, theirs = api.lora_tensors(first.lora_file), api.lora_tensors(alone.lora_file)
    assert all(torch.allclose(value, theirs[key], atol=1e-3) for key, value in ours.items())
