"""The loss on images kept out of training: equal weights give equal numbers, whatever else changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api, validation
from loragraft.trainer.families.base import Reading
from loragraft.trainer.objective import Flow, NoiseSchedule, generator
from loragraft_tests.trainer import runs, tiny
from loragraft_tests.trainer.data_folders import Refusal

FROZEN = {"learning_rate": 1e-12, "max_train_steps": 3, "save_every_n_steps": 1}
ONCE = {**FROZEN, "max_train_steps": 1}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> api.TrainSet:
    """Return five images to train on and three of several buckets kept out."""
    root = tmp_path_factory.mktemp("held")
    sizes = [(32, 32), (40, 24), (24, 40), (32, 32)] * 2
    tiny.write_images(root / "1_zibu", sizes)
    return runs.train_set(root, validation_split=0.38)


@pytest.fixture
def here(training: runs.Training, held: api.TrainSet) -> runs.Training:
    return dataclasses.replace(training, train_set=held)


def measured(training: runs.Training, **options: Any) -> list[api.Validated]:
    return runs.of(training.events(**options), api.Validated)


def test_each_image_is_the_mean_over_its_timesteps_by_the_plain_formula(here: runs.Training) -> None:
    """Recompute every number from the base's own modules."""
    (event,) = measured(here, learning_rate=1e-12, max_train_steps=1, validation_timesteps=4)
    kept = here.train_set.validation
    assert kept is not None
    assert [name for name, _ in event.images] == [r.name for r in kept.records]
    parts = here.base.load()
    for module in (parts.denoiser, parts.vae, parts.text_encoder):
        module.float()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = torch.cumprod(1 - betas, 0)
    for index, (name, loss) in enumerate(event.images):
        pixels = api_pixels(kept, index)
        with torch.no_grad():
            posterior = parts.vae.encode(pixels).latent_dist
            shape = posterior.mean.shape
            start = torch.randn(shape, generator=generator(42, "validation", name, "posterior"))
            latents = (posterior.mean + posterior.std * start) * 0.18215
            tokens = here.base.family.tokenize(parts, [kept.records[index].caption], Reading())
            (cond,) = here.base.family.encode_text(parts, tokens, Reading())
            total = 0.0
            for place, t in enumerate((125, 375, 625, 875)):
                noise = torch.randn(shape, generator=generator(42, "validation", name, "noise", place))
                noisy = signal[t].sqrt() * latents + (1 - signal[t]).sqrt() * noise
                pred = parts.denoiser(noisy, torch.tensor([t]), encoder_hidden_states=cond).sample
                total += (pred - noise).square().mean().item()
        assert loss == pytest.approx(total / 4, rel=1e-5)
    assert event.loss == pytest.approx(sum(v for _, v in event.images) / len(event.images), rel=1e-12)


def api_pixels(train_set: api.TrainSet, index: int) -> torch.Tensor:
    from loragraft.trainer.data.images import load_pixels

    return load_pixels(train_set.records[index], train_set.buckets[index], train_set.resized[index])[None]


def test_equal_weights_give_equal_numbers_at_every_step(here: runs.Training) -> None:
    found = measured(here, **FROZEN)
    assert [e.step for e in found] == [1, 2, 3]
    assert len({e.loss for e in found}) == 1
    assert len({e.images for e in found}) == 1
    assert len({loss for _, loss in found[0].images}) == 3, "and each image has its own"


@pytest.fixture(scope="module")
def plain(
    base: api.Base, held: api.TrainSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[runs.Training, api.Validated]:
    """Return one measure with the usual settings, and the run that made it."""
    root = tmp_path_factory.mktemp("plain")
    training = runs.Training(base, held, api.Places(root / "runs", root / "loras", root / "cache"))
    (event,) = measured(training, **ONCE)
    return training, event


def other(plain: tuple[runs.Training, api.Validated], **change: Any) -> api.Validated:
    """Return the measure with something changed; what is encoded is taken from the same cache."""
    (event,) = measured(plain[0], **{**ONCE, **change}, output_name=f"other-{'-'.join(change)}")
    return event


@pytest.mark.parametrize(
    "change",
    [
        {"train_batch_size": 1},
        {"min_snr_gamma": 1.0, "noise_offset": 0.1, "multires_noise_iterations": 4, "ip_noise_gamma": 0.1},
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in (
                {"train_batch_size": 8},
                {"gradient_accumulation_steps": 2},
                {"debiased_estimation_loss": True},
                {"cache_latents": False},
                {"network_train_unet_only": True},
                {"engine": "eager"},
                {"lr_scheduler": "constant"},
                {"network_dropout": 0.5},
            )
        ),
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_teaches_does_not_change_what_is_measured(
    plain: tuple[runs.Training, api.Validated], change: dict[str, Any]
) -> None:
    values = [value for _, value in other(plain, **change).images]
    assert values == pytest.approx([value for _, value in plain[1].images], rel=2e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"loss_type": "l1"},
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in ({"seed": 1}, {"min_timestep": 500}, {"validation_timesteps": 3})
        ),
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_measured_follows_the_settings_that_say_so(
    plain: tuple[runs.Training, api.Validated], change: dict[str, Any]
) -> None:
    assert abs(other(plain, **change).loss - plain[1].loss) > 1e-4 * plain[1].loss


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 1000, 1, [500]),
        (0, 1000, 4, [125, 375, 625, 875]),
        (0, 1000, 8, [62, 187, 312, 437, 562, 687, 812, 937]),
        (100, 200, 2, [125, 175]),
        (999, 1000, 3, [999, 999, 999]),
    ],
)
def test_timesteps_are_the_middles_of_equal_parts(
    low: int, high: int, count: int, expected: list[int]
) -> None:
    config = runs.settings(min_timestep=low, max_timestep=high, validation_timesteps=count)
    assert validation.timesteps(config, NoiseSchedule()) == expected


def test_timesteps_of_a_flow_need_not_be_whole() -> None:
    config = runs.settings(min_timestep=100, max_timestep=200, validation_timesteps=8)
    assert validation.timesteps(config, Flow()) == [106.25 + 12.5 * k for k in range(8)]


@pytest.mark.slow
def test_measuring_teaches_nothing(here: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_train_steps": 5, "validate_every_n_steps": 1, "save_every_n_steps": 2}
    with_it = here.finish(**options)
    without = here.elsewhere("without")
    from loragraft.trainer import milestones

    monkeypatch.setattr(milestones, "validate", lambda run, saved: iter(()))
    plain = without.finish(**options)
    assert with_it.lora_file.read_bytes() == plain.lora_file.read_bytes()
    assert with_it.losses == plain.losses


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_train_steps": 5, "validate_every_n_steps": 2}, [2, 4, 5]),
        *(
            pytest.param(options, expected, marks=pytest.mark.slow)
            for options, expected in (
                ({"max_train_steps": 4}, [4]),
                ({"max_train_steps": 4, "save_every_n_steps": 2}, [2, 4]),
                ({"max_train_steps": 4, "validate_every_n_steps": 2, "save_every_n_steps": 2}, [2, 4]),
            )
        ),
    ],
)
def test_each_save_is_measured_and_what_is_asked_for(
    plain: tuple[runs.Training, api.Validated], options: dict[str, Any], expected: list[int]
) -> None:
    training = plain[0].elsewhere("-".join(map(str, options.values())))
    assert [e.step for e in measured(training, **options, validation_timesteps=1)] == expected


def test_each_epoch_is_measured_where_that_is_asked_for(plain: tuple[runs.Training, api.Validated]) -> None:
    training = plain[0].elsewhere("epochs")
    events = training.events(max_train_epochs=2, validate_every_n_epochs=1, validation_timesteps=1)
    total = runs.only(events, api.Planned).total_steps
    assert [e.step for e in runs.of(events, api.Validated)] == [total // 2, total]


@pytest.mark.slow
def test_a_share_of_the_images_is_always_the_same(here: runs.Training) -> None:
    found = measured(here, **FROZEN, max_validation_steps=2)
    names = {tuple(name for name, _ in e.images) for e in found}
    assert len(names) == 1 and len(next(iter(names))) == 2
    assert found[0].num_images == 2
    whole = measured(here.elsewhere("all"), **FROZEN, max_validation_steps=99)
    assert dict(found[0].images).items() <= dict(whole[0].images).items()


def test_progress_is_told_image_by_image(here: runs.Training) -> None:
    events = here.events(max_train_steps=1)
    told = [(e.done, e.total) for e in events if type(e).__name__ == "Validating"]
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    "name", ["validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"]
)
def test_settings_of_a_measure_without_images_are_refused(training: runs.Training, name: str) -> None:
    with Refusal("LG-CFG-004", name, "validation_split"):
        training.events(**{name: 1})
    assert not training.places.runs.exists()


# ---- the best, and too much of it ----


def given(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Have the images measure these values, one a validation."""
    values = iter(losses)
    current: dict[int, float] = {}

    def value(run: Any, inputs: Any, index: int) -> float:
        if run.step not in current:
            current[run.step] = next(values)
        return current[run.step]

    monkeypatch.setattr(validation, "image_loss", value)


def test_the_best_save_is_marked(here: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, [0.5, 0.3, 0.4, 0.2, 0.6])
    options = {"max_train_steps": 5, "save_every_n_steps": 2, "validate_every_n_steps": 1}
    events = here.events(**options)
    marks = [(e.step, e.is_best) for e in runs.of(events, api.Validated)]
    assert marks == [(1, False), (2, True), (3, False), (4, True), (5, False)], "only what is saved can be"
    finished = runs.only(events, api.Finished)
    assert finished.best_step == 4
    assert [step for step, _ in finished.validations] == [1, 2, 3, 4, 5]
    assert [v for _, v in finished.validations] == pytest.approx([0.5, 0.3, 0.4, 0.2, 0.6])
    best = json.loads((finished.run_folder / "best.json").read_text("utf-8"))
    assert best["step"] == 4 and best["loss"] == pytest.approx(0.2)
    assert (finished.run_folder / best["file"]).is_file()
    assert best["validations"] == [list(pair) for pair in finished.validations]
    notes = [n.text for n in runs.of(events, api.Note)]
    assert any("best save is step 4" in text and "step 5" in text for text in notes)
    log = (finished.run_folder / "log.log").read_text("utf-8")
    assert "step 4: validation loss 0.2000 on 3 images, the best save so far" in log
    lines = (finished.run_folder / "validation.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert set(json.loads(lines[0])["images"].values()) == {0.5}, "image by image"
    again = here.finish(**options)
    assert again.reused and (again.best_step, again.validations) == (4, finished.validations)


def test_no_note_where_the_last_is_the_best(here: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, [0.5, 0.3])
    events = here.events(max_train_steps=2, save_every_n_steps=1)
    assert not runs.of(events, api.Note)
    assert runs.only(events, api.Finished).best_step == 2


def test_overfitting_is_named_once(here: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, [0.5, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    averages = iter([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    monkeypatch.setattr(validation, "average_loss", lambda losses, plan: next(averages))
    events = here.events(max_train_steps=7, save_every_n_steps=1)
    named = [(i, n.text) for i, n in enumerate(events) if isinstance(n, api.Note) and "Overfitting" in n.text]
    assert len(named) == 1
    at, text = named[0]
    assert "0.3000, 0.4000, 0.5000, 0.6000" in text and "best save is step 2" in text
    assert runs.of(events[:at], api.Validated)[-1].step == 5
    assert "Overfitting" in (runs.only(events, api.Finished).run_folder / "log.log").read_text("utf-8")


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_measures(here: runs.Training, tmp_path: Path) -> None:
    options = {"max_train_steps": 6, "save_every_n_steps": 2, "validate_every_n_steps": 3}
    straight = here.elsewhere("straight").finish(**options)
    for stop in (1, 2, 3, 4):  # before, at and after saves and measures
        here.stop_after(stop, **options)
    finished = here.finish(**options)
    assert finished.validations == straight.validations
    assert finished.best_step == straight.best_step
    files = [f.run_folder / "validation.jsonl" for f in (straight, finished)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (straight.run_folder / "best.json").read_bytes() == (
        finished.run_folder / "best.json"
    ).read_bytes()


@pytest.mark.slow
def test_the_validation_of_a_run_beside_others_is_its_own(here: runs.Training) -> None:
    options = {"max_train_steps": 2, "save_every_n_steps": 1, "engine": "fused"}
    alone = [measured(here.elsewhere(f"a{s}"), **options, seed=s) for s in (1, 2)]
    configs = [runs.settings(**options, seed=s, output_name=f"r{s}") for s in (1, 2)]
    jobs = [(here.train_set, config) for config in configs]
    events = list(api.train_together(here.base, jobs, places=here.elsewhere("both").places, device="cpu"))
    for number, expected in enumerate(alone):
        own = [e for n, e in events if n == number and isinstance(e, api.Validated)]
        assert [e.loss for e in own] == pytest.approx([e.loss for e in expected], rel=1e-5)


def test_tensorboard_gets_the_validation_loss(here: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    from loragraft.trainer import runlog

    written: list[tuple[str, float, int]] = []

    class Board:
        def add_scalar(self, *args: Any) -> None:
            written.append(args)

        def close(self) -> None:
            pass

    monkeypatch.setattr(runlog, "_tensorboard", lambda folder, first_step: Board())
    (event,) = measured(here, max_train_steps=1)
    assert ("loss/validation", event.loss, 1) in written
