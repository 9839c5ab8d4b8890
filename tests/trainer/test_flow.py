"""Rectified flow's numbers are the reference trainer's and diffusers' for the same draws."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer.objective import (
    SAMPLINGS,
    Flow,
    LinearMu,
    Times,
    diffusion_losses,
    drawn_level,
    flow_weight,
    generator,
    huber_threshold,
    tokens_of,
)
from loragraft.trainer.objective.flow import LEAST_LEVEL, PREDICTIONS, shifted
from loragraft.trainer.settings.flow import PREDICTION_TYPES, TIMESTEP_SAMPLINGS, WEIGHTING_SCHEMES

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flow.json").read_text("utf-8"))
FLOW = Flow()
FLUX = Flow(dynamic=LinearMu())
QWEN = Flow(dynamic=LinearMu(0.5, 0.9, 256, 8192), terminal=0.02)
MODELS = {"flux-dev": FLUX, "sd3": Flow(shift=3.0), "schnell": FLOW, "qwen": QWEN}
NUMBERS = {"uniform": torch.tensor(GOLDEN["uniform"]), "normal": torch.tensor(GOLDEN["normal"])}


def level(times: Times, size: tuple[int, int] = (1024, 1024)) -> torch.Tensor:
    sampling = SAMPLINGS[times.sampling]
    return sampling.level(NUMBERS["normal" if sampling.normal else "uniform"], times, tokens_of(size))


def tensors() -> tuple[torch.Tensor, ...]:
    table = GOLDEN["tensors"]
    shaped = (torch.tensor(table[name]).view(table["shape"]) for name in ("latents", "noise", "output"))
    return (*shaped, 1000 * torch.tensor(table["sigmas"]))


# ---- timesteps ----


@pytest.mark.parametrize("case", [c for c in GOLDEN["flux"] if "weighting_scheme" not in c["args"]])
def test_flux_script(case: dict[str, Any]) -> None:
    args = dict(case["args"])
    times = Times(
        args["timestep_sampling"],
        sigmoid_scale=args.get("sigmoid_scale", 1.0),
        shift=args.get("discrete_flow_shift", 3.0),
    )
    got = level(times, tuple(case["size"]))
    torch.testing.assert_close(got, torch.tensor(case["sigmas"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(1000 * got, torch.tensor(case["timesteps"]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("case", [c for c in GOLDEN["flux"] if "weighting_scheme" in c["args"]])
def test_flux_script_counts_the_densities_from_noise(case: dict[str, Any]) -> None:
    """Its schedule falls, so a place drawn near 0 is noise: the same density from the other end."""
    args = case["args"]
    if args["weighting_scheme"] == "logit_normal":
        times = Times("logit_normal", logit_mean=-args["logit_mean"], logit_std=args["logit_std"], shift=3.0)
        got = SAMPLINGS["logit_normal"].level(-NUMBERS["normal"], times, 0)
    else:
        got = SAMPLINGS["mode"].level(1 - NUMBERS["uniform"], Times("mode", shift=3.0), 0)
    wanted = torch.tensor(case["sigmas"])
    assert (got - wanted).abs().max() < 3e-3, "its schedule has a thousand steps, shifted by 3"
    assert bool((got <= wanted + 1e-6).all())


@pytest.mark.parametrize("case", GOLDEN["sd3"])
def test_sd3_script_takes_the_whole_part(case: dict[str, Any]) -> None:
    args = case["args"]
    scheme = args.get("weighting_scheme", "uniform")
    own = {k: args[k] for k in ("logit_mean", "logit_std", "mode_scale") if k in args}
    s = level(Times(scheme, **own, shift=args.get("training_shift", 1.0)))
    if scheme == "uniform":
        s = shifted(s, args.get("training_shift", 1.0))
    low, high = args.get("min_timestep", 0), args.get("max_timestep", 1000)
    assert (low + (high - low) * s).floor().tolist() == case["timesteps"]


def test_a_discrete_schedule_never_leaves_its_steps() -> None:
    steps = SAMPLINGS["sigma"].level(torch.tensor([0.0, 0.9999999, 1.0]), Times("sigma"), 0)
    assert steps.tolist() == pytest.approx([1.0, 1e-3, 1e-3])


@pytest.mark.parametrize("name", SAMPLINGS)
def test_draws_are_levels_and_follow_the_numbers_given(name: str) -> None:
    times = Times(name, shift=3.1582)
    drawn = torch.cat([drawn_level(times, generator(1, step, 0, "t"), 4096) for step in range(400)])
    again = torch.cat([drawn_level(times, generator(1, step, 0, "t"), 4096) for step in range(400)])
    assert torch.equal(drawn, again) and drawn.dtype == torch.float32
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1 and len(set(drawn.tolist())) > 300
    expected = {"uniform": 0.5, "sigmoid": 0.5, "mode": 0.7, "sigma": 0.68}.get(name, 0.73)
    assert float(drawn.mean()) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_each_distribution_uses_the_settings_it_names_and_no_other(name: str) -> None:
    plain = Times(name, shift=2.0)
    for setting, value in {
        "sigmoid_scale": 0.5,
        "logit_mean": 0.3,
        "logit_std": 0.5,
        "mode_scale": 0.4,
        "shift": 5.0,
    }.items():
        changed = level(Times(**{**plain.__dict__, setting: value}))
        assert (setting in SAMPLINGS[name].settings) == (not torch.equal(changed, level(plain))), setting


def test_flux_shift_grows_with_the_image() -> None:
    small, large = (level(Times("flux_shift"), (side, side)).mean() for side in (512, 1024))
    assert small < large
    assert LinearMu()(4096) == pytest.approx(1.15) and LinearMu()(256) == pytest.approx(0.5)


# ---- targets, errors, weights ----


def test_noise_is_added_in_a_straight_line() -> None:
    x, noise, _, t = tensors()
    noisy = FLOW.add_noise(x, noise, t)
    torch.testing.assert_close(noisy.flatten(), torch.tensor(GOLDEN["tensors"]["noisy"]), rtol=0, atol=1e-6)
    step = 1e-2
    slope = (FLOW.add_noise(x, noise, t + 1000 * step) - noisy) / step
    torch.testing.assert_close(slope, FLOW.target(x, noise, t), rtol=0, atol=1e-4)


def test_latents_of_five_dimensions() -> None:
    x = torch.zeros(2, 1, 3, 2, 2)
    noisy = FLOW.add_noise(x, x + 1, torch.tensor([250.0, 500.0]))
    assert noisy[0].unique().tolist() == [0.25] and noisy[1].unique().tolist() == [0.5]


@pytest.mark.parametrize(
    "case",
    GOLDEN["losses"],
    ids=lambda c: "-".join(v for v in c.values() if isinstance(v, str)),
)
def test_losses(case: dict[str, Any]) -> None:
    x, noise, output, t = tensors()
    s = FLOW.level(t, x)
    predicted, wanted = PREDICTIONS[case["model_prediction_type"]]
    pred, target = predicted(output, FLOW.add_noise(x, noise, t), s), wanted(x, noise)
    kind, threshold = case.get("loss_type", "l2"), None
    if kind != "l2":
        threshold = huber_threshold(case["huber_schedule"], FLOW, t, 0.1)
    weight = flow_weight(case["weighting_scheme"], t / 1000)
    got = diffusion_losses(pred, target, weight, None, kind, threshold)
    torch.testing.assert_close(got, torch.tensor(case["losses"]), rtol=1e-5, atol=1e-6)


def test_the_reference_has_no_ratio_of_signal_to_noise_for_huber_either() -> None:
    assert GOLDEN["huber_snr"] == "refused"


def test_comparing_images_weighs_squares_by_the_level_squared() -> None:
    x, noise, output, t = tensors()
    noisy, s = FLOW.add_noise(x, noise, t), FLOW.level(t, x)

    def loss(kind: str, scheme: str) -> torch.Tensor:
        predicted, wanted = PREDICTIONS[kind]
        weight = flow_weight(scheme, t / 1000)
        return diffusion_losses(predicted(output, noisy, s), wanted(x, noise), weight)

    raw = loss("raw", "none")
    torch.testing.assert_close(loss("denoised", "none"), raw * (t / 1000) ** 2)
    torch.testing.assert_close(loss("denoised", "sigma_sqrt"), raw)


@pytest.mark.parametrize("kind", ["raw", "denoised"])
def test_a_perfect_velocity_has_no_loss(kind: str) -> None:
    x, noise, _, t = tensors()
    predicted, wanted = PREDICTIONS[kind]
    pred = predicted(FLOW.target(x, noise, t), FLOW.add_noise(x, noise, t), FLOW.level(t, x))
    assert float(diffusion_losses(pred, wanted(x, noise), None).max()) < 1e-10


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_weights(scheme: str) -> None:
    table = GOLDEN["weights"]
    got = flow_weight(scheme, torch.tensor(table["sigmas"]))
    if scheme == "none":
        assert got is None and set(table[scheme]) == {1.0}
    else:
        assert got is not None
        torch.testing.assert_close(got, torch.tensor(table[scheme]), rtol=1e-6, atol=0)


def test_a_level_of_nothing_has_a_finite_weight() -> None:
    weight = flow_weight("sigma_sqrt", torch.tensor([0.0]))
    assert weight is not None and float(weight) == pytest.approx(LEAST_LEVEL**-2)


# ---- sampling ----


@pytest.mark.parametrize("case", GOLDEN["diffusers"], ids=lambda c: f"{c['model']}-{c['size']}-{c['steps']}")
def test_sigmas_are_diffusers(case: dict[str, Any]) -> None:
    flow = MODELS[case["model"]]
    sigmas = flow.sigmas_for(case["steps"], tuple(case["size"]))
    torch.testing.assert_close(sigmas, torch.tensor(case["sigmas"]), rtol=0, atol=1e-6)
    for sigma, t in zip(sigmas, case["timesteps"], strict=False):
        assert float(flow.timestep(sigma)) == pytest.approx(t, abs=1e-3)


@pytest.mark.parametrize("case", GOLDEN["flux_schedule"], ids=str)
def test_sigmas_are_the_reference_trainers(case: dict[str, Any]) -> None:
    got = FLUX.sigmas_for(case["steps"], tuple(case["size"]))
    torch.testing.assert_close(got, torch.tensor(case["sigmas"]), rtol=0, atol=1e-6)


def test_sigmas_are_comfyuis_simple_schedule() -> None:
    """Its Flux has mu 1.15 whatever the size, which is that of a square of 1024 pixels."""
    table = math.exp(1.15) / (math.exp(1.15) + (10_000 / torch.arange(1, 10_001) - 1))
    simple = [float(table[-(1 + int(k * 10_000 / 20))]) for k in range(20)]
    assert FLUX.sigmas_for(20, (1024, 1024)).tolist() == pytest.approx([*simple, 0.0], abs=1e-6)


def test_eulers_way_with_the_true_velocity_ends_at_the_image() -> None:
    x0, noise, _, _ = tensors()
    sigmas = FLUX.sigmas_for(7, (640, 512))
    x = FLUX.start(noise, sigmas[0])
    assert torch.equal(x, noise)
    assert torch.equal(FLUX.start(noise, torch.tensor(0.5)), 0.5 * noise), (
        "the noise's share at a lower level"
    )
    for sigma, then in itertools.pairwise(sigmas):
        seen = FLUX.model_input(x, sigma)
        assert torch.equal(seen, x)
        estimate = FLUX.denoised(x, FLUX.target(x0, noise, sigma), sigma, velocity=True)
        torch.testing.assert_close(estimate, x0, rtol=0, atol=1e-5)
        x = x + (x - estimate) / sigma * (then - sigma)
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-5)


def test_settings_offer_what_the_objective_has() -> None:
    assert ("auto", *SAMPLINGS) == TIMESTEP_SAMPLINGS
    assert ("auto", *PREDICTIONS) == PREDICTION_TYPES
    assert set(WEIGHTING_SCHEMES) == {"none", "sigma_sqrt", "cosmap"}
