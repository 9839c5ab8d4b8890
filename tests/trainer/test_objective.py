"""Noise, targets and weights: the reference's numbers, the papers' identities, undisturbed draws."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from loragraft.trainer.objective import (
    NoiseSchedule,
    debiased_weight,
    diffusion_losses,
    generator,
    like_noise_prediction,
    min_snr_weight,
)
from loragraft_tests.trainer.data_folders import golden

REFERENCE = golden("snr_weights")
T = torch.tensor(REFERENCE["timesteps"])
SCHEDULE = NoiseSchedule()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Make the tests' own random tensors the same each time."""
    torch.manual_seed(0)


def close(found: torch.Tensor, expected: list[float], rel: float = 1e-6) -> None:
    """Assert equality up to float32's rounding."""
    torch.testing.assert_close(found, torch.tensor(expected), rtol=rel, atol=0)


# ---- the reference's numbers ----


def test_the_signal_and_its_ratio_equal_the_reference() -> None:
    close(SCHEDULE.alphas_cumprod[T], REFERENCE["alphas_cumprod"])
    close(SCHEDULE.snr(T), REFERENCE["snr"], rel=1e-5)  # 1 - a loses digits where a is near 1


@pytest.mark.parametrize("gamma", [1, 5])
def test_min_snr_weights_equal_the_reference(gamma: int) -> None:
    close(min_snr_weight(SCHEDULE.snr(T), gamma), REFERENCE[f"min_snr_{gamma}_eps"], rel=1e-5)


def test_the_weights_of_velocities_equal_the_reference() -> None:
    snr = SCHEDULE.snr(T)
    close(min_snr_weight(snr, 5, velocity=True), REFERENCE["min_snr_5_v"], rel=1e-5)
    close(debiased_weight(snr), REFERENCE["debiased_eps"], rel=1e-5)
    close(debiased_weight(snr, velocity=True), REFERENCE["debiased_v"], rel=1e-5)
    close(like_noise_prediction(snr), REFERENCE["scale_v_like_noise"], rel=1e-5)


def test_the_schedule_that_ends_in_noise_alone_equals_the_reference() -> None:
    schedule = NoiseSchedule(zero_terminal_snr=True)
    close(schedule.alphas_cumprod[T], REFERENCE["zero_terminal_snr_alphas_cumprod"], rel=1e-6)
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.alphas_cumprod[0] == pytest.approx(SCHEDULE.alphas_cumprod[0].item(), rel=1e-6)
    assert bool(torch.isfinite(schedule.sigmas).all())


def test_the_schedule_equals_diffusers() -> None:
    from diffusers import DDPMScheduler

    peer = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.equal(SCHEDULE.alphas_cumprod, peer.alphas_cumprod)
    latents, noise, t = torch.randn(28, 4, 3, 5), torch.randn(28, 4, 3, 5), T
    torch.testing.assert_close(SCHEDULE.add_noise(latents, noise, t), peer.add_noise(latents, noise, t))


# ---- identities ----


def test_noise_is_added_to_each_sample_at_its_own_time() -> None:
    latents, noise, t = torch.randn(3, 4, 2, 6), torch.randn(3, 4, 2, 6), torch.tensor([0, 500, 999])
    noisy = SCHEDULE.add_noise(latents, noise, t)
    for i in range(3):
        alone = SCHEDULE.add_noise(latents[i : i + 1], noise[i : i + 1], t[i : i + 1])
        assert torch.equal(noisy[i : i + 1], alone)
    zero = torch.zeros_like(latents)
    a = SCHEDULE.alphas_cumprod[t]
    torch.testing.assert_close(SCHEDULE.add_noise(latents, zero, t), latents * a.sqrt().view(-1, 1, 1, 1))
    torch.testing.assert_close(SCHEDULE.add_noise(zero, noise, t), noise * (1 - a).sqrt().view(-1, 1, 1, 1))


def test_variance_is_preserved_and_the_signal_falls() -> None:
    a = SCHEDULE.alphas_cumprod
    assert bool((a[1:] < a[:-1]).all())
    assert a.shape == (1000,)
    torch.testing.assert_close(SCHEDULE.sigmas[T] ** 2, 1 / SCHEDULE.snr(T))
    assert SCHEDULE.sigmas[-1].item() == pytest.approx(14.6146, abs=1e-3)  # k-diffusion's sigma_max of SD1.x


def test_min_snr_leaves_noisy_steps_alone_and_damps_clean_ones() -> None:
    snr = torch.tensor([0.01, 1.0, 5.0, 10.0, 1000.0])
    assert min_snr_weight(snr, 5.0).tolist() == pytest.approx([1, 1, 1, 0.5, 0.005])


def test_the_loss_is_the_mean_of_the_samples_whatever_their_dtype() -> None:
    pred, target = torch.randn(4, 4, 2, 2), torch.randn(4, 4, 2, 2)
    plain = torch.nn.functional.mse_loss(pred, target)
    torch.testing.assert_close(diffusion_losses(pred, target, None).mean(), plain)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5])
    each = ((pred - target) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(diffusion_losses(pred, target, weight).mean(), (each * weight).sum() / 4)
    half = diffusion_losses(pred.half(), target.half(), None).mean()
    assert half.dtype == torch.float32
    big = torch.full((1, 4, 2, 2), 300.0).half()  # its square is beyond fp16
    assert diffusion_losses(big, torch.zeros_like(big), None).mean().item() == 90000.0


# ---- draws ----


def test_a_draw_is_a_function_of_its_key_alone() -> None:
    def draw(*key: object) -> list[float]:
        return torch.randn(8, generator=generator(*key)).tolist()

    first = draw(42, 0, 0, "noise")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.randn(1000)
    assert draw(42, 0, 0, "noise") == first
    others = [
        (43, 0, 0, "noise"),
        (42, 1, 0, "noise"),
        (42, 0, 1, "noise"),
        (42, 0, 0, "t"),
        (4, 20, 0, "noise"),
    ]
    assert all(draw(*key) != first for key in others)


def test_a_draw_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    torch.randn(100, generator=generator(1, 2, 3, "noise"))
    assert torch.equal(torch.randn(4), expected)


def test_draws_keep_their_values_from_release_to_release() -> None:
    """A run begun with one version must continue with the next: these numbers never change."""
    assert generator(42, 0, 0, "noise").initial_seed() == 5156401409125549328
    assert generator(42, "init", "lora_unet_x").initial_seed() == 7245204561544219706
    found = torch.randn(3, generator=generator(42, 0, 0, "noise")).tolist()
    assert found == pytest.approx([2.114448308944702, -1.3124277591705322, -0.018985550850629807])
