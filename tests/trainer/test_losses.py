"""The loss of a micro-batch: the reference's numbers for every setting, and runs with others together."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer.families import drawing
from loragraft.trainer.families.base import Reading
from loragraft.trainer.inputs import Fed
from loragraft.trainer.losses import micro_losses
from loragraft.trainer.objective import NoiseSchedule, generator
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import golden

REFERENCE = golden("loss_noise")
GIVEN = REFERENCE["inputs"]
SHAPE = GIVEN["shape"]


def given(name: str, *shape: int) -> torch.Tensor:
    return torch.tensor(GIVEN[name]).view(*(shape or SHAPE))


class Family:
    """A family whose denoiser says what is stored, and remembers what it saw."""

    objective = NoiseSchedule()

    def __init__(self, pred: torch.Tensor) -> None:
        self.pred, self.seen = pred, torch.empty(0)

    def predict(self, parts: Any, noisy: torch.Tensor, *more: Any) -> torch.Tensor:
        self.seen = noisy
        return self.pred


def losses(configs: list[api.TrainConfig], fed: Fed, pred: torch.Tensor) -> tuple[torch.Tensor, Family]:
    family = Family(pred)
    inputs: Any = SimpleNamespace(base=SimpleNamespace(family=family), embed=lambda text: text)
    return micro_losses(None, inputs, configs, fed.tensors), family  # type: ignore[arg-type]


def fed(**changes: Any) -> Fed:
    text = torch.zeros(SHAPE[0], 1, 1)
    whole = Fed(given("latents"), given("noise"), torch.tensor(GIVEN["timesteps"]), (text,))
    return whole._replace(**changes)


def each(config: api.TrainConfig, whole: Fed) -> torch.Tensor:
    """Return the samples' losses one by one: the mean of a batch of one is its loss."""
    found = []
    for i in range(SHAPE[0]):
        one = Fed.of(tuple(None if x is None else x[i : i + 1] for x in whole.tensors))
        found.append(losses([config], one, given("pred")[i : i + 1])[0])
    return torch.cat(found)


def named(case: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in case["settings"].items()) or "defaults"


@pytest.mark.parametrize("case", REFERENCE["losses"], ids=named)
def test_losses_equal_the_reference(case: dict[str, Any]) -> None:
    config = runs.settings(**case["settings"])
    torch.testing.assert_close(each(config, fed()), torch.tensor(case["plain"]), rtol=3e-5, atol=1e-7)
    mask = given("mask", SHAPE[0], 1, *SHAPE[2:])
    whole = fed(mask=mask, weight=torch.tensor(GIVEN["loss_weights"]))
    expected = torch.tensor(case["masked_and_weighted"])
    torch.testing.assert_close(each(config, whole), expected, rtol=3e-5, atol=1e-7)
    mean, family = losses([config], whole, given("pred"))
    torch.testing.assert_close(mean, expected.mean().view(1), rtol=3e-5, atol=1e-7)
    seen = family.seen.double().sum(dim=(1, 2, 3))
    torch.testing.assert_close(seen.tolist(), case["noisy_sum"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [c for c in REFERENCE["losses"] if c["threshold"]], ids=named)
def test_thresholds_equal_the_reference(case: dict[str, Any]) -> None:
    from loragraft.trainer.objective import huber_threshold

    config = runs.settings(**case["settings"])
    schedule = NoiseSchedule(zero_terminal_snr=config.zero_terminal_snr)
    t = torch.tensor(GIVEN["timesteps"])
    found = huber_threshold(config.huber_schedule, schedule, t, config.huber_c, config.huber_scale)
    torch.testing.assert_close(found, torch.tensor(case["threshold"]), rtol=2e-6, atol=0)


def test_runs_with_other_objectives_have_together_what_they_have_alone() -> None:
    settings = [case["settings"] for case in REFERENCE["losses"]]
    configs = [runs.settings(**each) for each in settings]
    whole = fed(mask=given("mask", SHAPE[0], 1, *SHAPE[2:]), weight=torch.tensor(GIVEN["loss_weights"]))
    joined = Fed.of(tuple(None if x is None else torch.cat([x] * len(configs)) for x in whole.tensors))
    together, _ = losses(configs, joined, torch.cat([given("pred")] * len(configs)))
    alone = torch.cat([losses([config], whole, given("pred"))[0] for config in configs])
    assert torch.equal(together, alone)
    assert len(set(together.tolist())) == len(configs), "every setting changes the loss"


def test_the_model_sees_perturbed_noise_and_is_asked_for_the_plain_one() -> None:
    other = torch.randn(SHAPE, generator=generator("perturbed"))
    config = runs.settings(ip_noise_gamma=0.1)
    found, family = losses([config], fed(perturbed=other), given("pred"))
    t = torch.tensor(GIVEN["timesteps"])
    assert torch.equal(family.seen, NoiseSchedule().add_noise(given("latents"), other, t))
    torch.testing.assert_close(found[0], torch.nn.functional.mse_loss(given("pred"), given("noise")))


def test_velocity_is_what_a_perfect_noise_prediction_says() -> None:
    """x_t and v determine the noise: sqrt(1 - a) x_t + sqrt(a) v."""
    latents, noise, t = given("latents"), given("noise"), torch.tensor(GIVEN["timesteps"])
    for schedule in (NoiseSchedule(), NoiseSchedule(zero_terminal_snr=True)):
        a = schedule.signal(t).view(-1, 1, 1, 1)
        noisy, v = schedule.add_noise(latents, noise, t), schedule.velocity(latents, noise, t)
        torch.testing.assert_close((1 - a).sqrt() * noisy + a.sqrt() * v, noise, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, latents, rtol=1e-4, atol=1e-5)


def test_weights_count_with_the_plain_schedules_ratio() -> None:
    """Else the last timestep, where there is no signal, would weigh nothing under min-SNR."""
    config = runs.settings(v_parameterization=True, zero_terminal_snr=True, min_snr_gamma=5.0)
    last = fed(t=torch.full((SHAPE[0],), 999))
    found, family = losses([config], last, given("pred"))
    assert torch.equal(family.seen, given("noise")), "the last timestep is noise alone"
    expected = (given("pred") + given("latents")).square().mean() * 0.0046600941
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"v_parameterization": True, "zero_terminal_snr": True, "scale_v_pred_loss_like_noise_pred": True},
        {"loss_type": "huber", "noise_offset": 0.1, "ip_noise_gamma": 0.1, "debiased_estimation_loss": True},
        {"loss_type": "smooth_l1", "multires_noise_iterations": 6, "v_pred_like_loss": 0.5},
    ],
    ids=["velocity", "huber", "multires"],
)
def test_engines_agree_whatever_the_loss(training: runs.Training, options: dict[str, Any]) -> None:
    once = {"max_train_steps": 3, "network_train_unet_only": True, **options}
    plain = runs.losses(training.elsewhere("plain").events(max_train_steps=3, network_train_unet_only=True))
    fused = runs.losses(training.events(engine="fused", **once))
    eager = runs.losses(training.elsewhere("eager").events(engine="eager", **once))
    assert fused == pytest.approx(eager, rel=1e-4)
    assert all(a != b for a, b in zip(fused, plain, strict=True))


def test_a_velocity_model_is_drawn_with(base: api.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A denoiser that knows one picture draws it, whichever of the two it predicts."""
    from PIL import ImageChops

    from loragraft.trainer.families.sd15 import SD15

    parts = base.load()
    parts.text_encoder.float(), parts.vae.float()
    picture = torch.randn(1, 4, 4, 4, generator=generator("picture"))

    def knowing(velocity: bool, schedule: NoiseSchedule) -> Any:
        def predict(self: SD15, parts: Any, noisy: torch.Tensor, t: torch.Tensor, *more: Any) -> torch.Tensor:
            a = schedule.signal(t).clamp(min=5e-8).view(-1, 1, 1, 1)
            noise = (noisy - a.sqrt() * picture) / (1 - a).sqrt()
            return a.sqrt() * noise - (1 - a).sqrt() * picture if velocity else noise

        return predict

    drawn = []
    for velocity, terminal in ((False, False), (True, False), (True, True)):
        schedule = dataclasses.replace(base.family.objective, zero_terminal_snr=terminal)
        monkeypatch.setattr(SD15, "predict", knowing(velocity, schedule))
        guided = drawing.Guided(cfg=3.0, velocity=velocity, zero_terminal_snr=terminal)
        options: dict[str, Any] = {"size": (32, 32), "steps": 8, "reading": Reading()}
        drawn += drawing.sample(base.family, parts, ["a"], seeds=[1], guided=guided, **options)
    for image in drawn[1:]:
        assert max(high for _, high in ImageChops.difference(image, drawn[0]).getextrema()) <= 2
