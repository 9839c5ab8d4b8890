"""Noise, timesteps and perturbation: the reference's sums for given draws, and draws of each sample's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from loragraft.trainer import api
from loragraft.trainer.inputs.noise import draw_noise, draw_timestep
from loragraft.trainer.inputs.pictures import hcp_weights
from loragraft.trainer.objective import NoiseSchedule, coarse_sizes, generator, multires_noise, offset_noise
from loragraft_tests.trainer import runs, tiny
from loragraft_tests.trainer.data_folders import golden

REFERENCE = golden("loss_noise")
GIVEN = REFERENCE["inputs"]
SHAPE = (1, 4, 16, 24)
LATENTS = torch.randn(SHAPE, generator=generator("latents")) + 0.5


def drawn(step: int = 0, sample: int = 0, **settings: Any) -> torch.Tensor:
    return draw_noise(runs.settings(**settings), LATENTS, step, sample)[0]


PLAIN = drawn()


# ---- the reference's numbers ----


@pytest.mark.parametrize("case", REFERENCE["offset"], ids=lambda c: str(c["adaptive_noise_scale"]))
def test_noise_offset_equals_the_reference(case: dict[str, Any]) -> None:
    batch, channels, *_ = GIVEN["shape"]
    noise, latents = (torch.tensor(GIVEN[name]).view(GIVEN["shape"]) for name in ("noise", "latents"))
    shift = torch.tensor(case["shift"]).view(batch, channels, 1, 1)
    found = offset_noise(noise, latents, shift, case["noise_offset"], case["adaptive_noise_scale"])
    torch.testing.assert_close(found.flatten(), torch.tensor(case["noise"]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", REFERENCE["multires"], ids=lambda c: "x".join(map(str, c["size"])))
def test_multires_noise_equals_the_reference(case: dict[str, Any]) -> None:
    height, width = case["size"]
    ratios = [2 + 2 * value for value in case["random"]]
    sizes = coarse_sizes(height, width, ratios + [2.0] * (case["iterations"] - len(ratios)))
    assert [list(size) for size in sizes] == case["sizes"]
    if case["noise"] is None:
        return
    noise = torch.tensor(case["noise"]).view(1, 2, height, width)
    coarse = [torch.tensor(x).view(1, 2, *s) for x, s in zip(case["coarse"], sizes, strict=True)]
    found = multires_noise(noise, coarse, case["discount"])
    torch.testing.assert_close(found.flatten(), torch.tensor(case["result"]), rtol=1e-5, atol=1e-6)


def test_coarse_sizes_end_where_one_side_is_one() -> None:
    assert coarse_sizes(4, 16, [2.0] * 6) == [(4, 16), (2, 8), (1, 4)]
    assert coarse_sizes(9, 9, [3.9, 2.5, 2.0, 3.0]) == [(9, 9), (3, 3), (2, 2), (1, 1)]


# ---- draws ----


def test_settings_that_are_off_leave_the_draws_as_they_were() -> None:
    noise, perturbed = draw_noise(runs.settings(), LATENTS, 3, 2)
    assert torch.equal(noise, torch.randn(SHAPE, generator=generator(42, 3, 2, "noise")))
    assert perturbed is None
    for step in range(20):
        t = torch.randint(0, 1000, (1,), generator=generator(42, step, 1, "t"))
        assert torch.equal(draw_timestep(runs.settings(), NoiseSchedule(), (64, 64), step, 1), t)


@pytest.mark.parametrize(
    "settings",
    [
        {"noise_offset": 0.1},
        {"noise_offset": 0.1, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.2},
        {"multires_noise_iterations": 6, "multires_noise_discount": 0.4},
        {"noise_offset": 0.1, "multires_noise_iterations": 6},
    ],
    ids=["offset", "random", "multires", "both"],
)
def test_a_samples_noise_is_a_function_of_step_and_sample(settings: dict[str, Any]) -> None:
    first = drawn(1, 2, **settings)
    torch.manual_seed(0)
    assert torch.equal(drawn(1, 2, **settings), first)
    for other in (drawn(1, 3, **settings), drawn(2, 2, **settings), drawn(1, 2, seed=1, **settings)):
        assert not torch.equal(other, first)


def test_noise_offset_moves_whole_channels() -> None:
    moved = drawn(noise_offset=0.1) - PLAIN
    spread = (moved - moved.mean(dim=(2, 3), keepdim=True)).abs().max()
    assert spread < 1e-6 < moved.abs().max()
    shift = torch.randn(1, 4, 1, 1, generator=generator(42, 0, 0, "offset"))
    torch.testing.assert_close(moved.mean(dim=(2, 3), keepdim=True), 0.1 * shift, rtol=1e-4, atol=1e-6)
    assert torch.equal(drawn(noise_offset=0.1), PLAIN + 0.1 * shift)


def test_random_strengths_lie_between_nothing_and_the_setting() -> None:
    shares = []
    for sample in range(200):
        plain = drawn(0, sample)
        full = drawn(0, sample, noise_offset=0.1) - plain
        part = drawn(0, sample, noise_offset=0.1, noise_offset_random_strength=True) - plain
        shares.append((part.mean() / full.mean()).item())
        whole = draw_noise(runs.settings(ip_noise_gamma=0.1), LATENTS, 0, sample)[1]
        less = draw_noise(
            runs.settings(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True), LATENTS, 0, sample
        )[1]
        assert whole is not None
        assert less is not None
        assert 0 <= ((less - plain).norm() / (whole - plain).norm()).item() <= 1
    assert -0.01 <= min(shares) < 0.1
    assert 0.9 < max(shares) <= 1.01
    assert sum(shares) / 200 == pytest.approx(0.5, abs=0.06)


def test_multires_noise_has_std_one_and_more_of_the_coarse() -> None:
    found = drawn(multires_noise_iterations=6, multires_noise_discount=0.8)
    assert found.std().item() == pytest.approx(1, abs=1e-5)

    def coarse(x: torch.Tensor) -> float:
        return torch.nn.functional.avg_pool2d(x, 8).std().item()

    assert coarse(found) > 2 * coarse(PLAIN)


def test_perturbed_noise_is_the_noise_and_a_share_of_another() -> None:
    noise, perturbed = draw_noise(runs.settings(ip_noise_gamma=0.1), LATENTS, 0, 0)
    other = torch.randn(SHAPE, generator=generator(42, 0, 0, "perturbation"))
    assert torch.equal(noise, PLAIN)
    assert perturbed is not None
    assert torch.equal(perturbed, PLAIN + 0.1 * other)


def test_timesteps_lie_from_the_least_up_to_below_the_largest() -> None:
    config = runs.settings(min_timestep=200, max_timestep=203)
    found = {draw_timestep(config, NoiseSchedule(), (64, 64), step, 0).item() for step in range(60)}
    assert found == {200, 201, 202}
    assert draw_timestep(runs.settings(min_timestep=999), NoiseSchedule(), (64, 64), 0, 0).item() == 999


# ---- in a run ----


def test_runs_with_noise_settings_resume_bit_exactly(training: runs.Training) -> None:
    options = {
        "noise_offset": 0.1,
        "noise_offset_random_strength": True,
        "adaptive_noise_scale": 0.1,
        "multires_noise_iterations": 4,
        "ip_noise_gamma": 0.1,
        "max_train_steps": 4,
        "network_train_unet_only": True,
    }
    whole = training.finish(**options)
    stopped = training.elsewhere("stopped")
    stopped.stop_after(2, **options)
    assert stopped.finish(**options).losses == whole.losses
    assert stopped.finish(**options).lora_file.read_bytes() == whole.lora_file.read_bytes()


def test_side_by_side_a_run_draws_what_it_draws_alone(training: runs.Training) -> None:
    jobs = [
        runs.settings(output_name="a", max_train_steps=2, noise_offset=0.1, loss_type="l1"),
        runs.settings(output_name="b", max_train_steps=2, v_parameterization=True),
    ]
    alone = []
    for name, job in zip("ab", jobs, strict=True):
        places = training.elsewhere(name).places
        events = api.train(training.base, training.train_set, job, places=places, device="cpu")
        alone.append(runs.losses(list(events)))
    both: list[list[float]] = [[], []]
    for number, event in api.train_together(
        training.base, [(training.train_set, job) for job in jobs], places=training.places, device="cpu"
    ):
        if isinstance(event, api.Step):
            both[number].append(event.loss)
    for ours, own in zip(both, alone, strict=True):
        assert ours == pytest.approx(own, rel=1e-5)


def test_greys_of_hcp_weigh_up_to_five_times() -> None:
    greys = torch.tensor([0, 64, 127, 128, 191, 255]) / 255
    assert hcp_weights(greys).tolist() == pytest.approx([0, 64 / 127, 1, 1 + 4 / 128, 3, 5], rel=1e-5)


def test_a_masks_greys_mean_what_the_setting_says(training: runs.Training, tmp_path: Path) -> None:
    """White weighs five times in HCP-Diffusion's scale: so does the loss; and masks can be left out."""
    folder = tiny.write_images(tmp_path / "images", [(32, 32)] * 3)
    tiny.write_images(tmp_path / "masks", [(32, 32)] * 3)
    for file in (tmp_path / "masks").glob("*.png"):
        Image.new("L", (32, 32), 255).save(file)
    data = api.make(api.DatasetConfig, runs.SMALL_BUCKETS)
    scanned = api.scan_folder(folder, masks="folder", mask_folder=str(tmp_path / "masks"))
    masked = training.elsewhere("masked", train_set=api.build_train_set(scanned, data))
    assert all(record.mask for record in masked.train_set.records)
    options = {"max_train_steps": 1, "network_train_unet_only": True}
    (kohya,) = runs.losses(masked.events(**options))
    (hcp,) = runs.losses(masked.events(mask_range="hcp", **options))
    (off,) = runs.losses(masked.events(masked_loss=False, **options))
    assert hcp == pytest.approx(5 * kohya, rel=1e-5)
    assert off == pytest.approx(kohya, rel=1e-6)
