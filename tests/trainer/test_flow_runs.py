"""Runs on a base whose objective is a flow, and settings that a base model has no use for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer.adapters.configured import settings_of
from loragraft.trainer.config import TrainConfig
from loragraft.trainer.contradictions.family import OF_FLOW, OF_NOISE, check
from loragraft.trainer.families import FAMILIES
from loragraft.trainer.families.sd15 import SD15
from loragraft.trainer.inputs import Fed, reading_of
from loragraft.trainer.inputs.noise import draw_timestep, times_of
from loragraft.trainer.losses import micro_losses
from loragraft.trainer.objective import SAMPLINGS, Flow, Objective, Times, generator
from loragraft.trainer.optim.groups import group_tensors
from loragraft.trainer.parts import Target
from loragraft.trainer.usual import for_base
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal, golden

GOLDEN = golden("flow")


class Straight(SD15):
    """SD1.x's modules on the straight way of a flow, with a second text encoder that no base has."""

    name = "straight"
    objective: Objective = Flow()
    encoders: Mapping[str, str] = {"text_encoder": "clip", "text_encoder_2": "t5"}
    ignored: Mapping[str, str] = {"clip_skip": "it reads the last layer"}
    defaults: Mapping[str, Any] = {"timestep_sampling": "shift", "discrete_flow_shift": 3.0}

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def predict(self, *given: Any) -> torch.Tensor:
        self.seen.append(given)
        return super().predict(*given)


@pytest.fixture
def straight(training: runs.Training) -> runs.Training:
    return dataclasses.replace(training, base=dataclasses.replace(training.base, family=Straight()))


# ---- the loss ----


def loss_of(kind: str, scheme: str, **settings: Any) -> torch.Tensor:
    """Return each sample's loss of the golden tensors, as a step computes it."""
    table = GOLDEN["tensors"]
    x, noise, output = (
        torch.tensor(table[name]).view(table["shape"]) for name in ("latents", "noise", "output")
    )
    t = 1000 * torch.tensor(table["sigmas"])
    config = api.TrainConfig(model_prediction_type=kind, weighting_scheme=scheme, **settings)
    found = []
    for i in range(len(t)):
        family = SimpleNamespace(objective=Flow(), predict=lambda *given, i=i: output[i : i + 1])
        inputs: Any = SimpleNamespace(base=SimpleNamespace(family=family), embed=lambda text: text)
        fed = Fed(x[i : i + 1], noise[i : i + 1], t[i : i + 1], (torch.zeros(1, 1),))
        found.append(micro_losses(None, inputs, [config], fed.tensors))  # type: ignore[arg-type]
    return torch.cat(found)


@pytest.mark.parametrize("case", GOLDEN["losses"], ids=lambda c: "-".join(str(v) for v in c.values())[:60])
def test_a_steps_loss_is_the_reference_trainers(case: dict[str, Any]) -> None:
    of_error = {name: case[name] for name in ("loss_type", "huber_schedule") if name in case}
    got = loss_of(case["model_prediction_type"], case["weighting_scheme"], **of_error)
    torch.testing.assert_close(got, torch.tensor(case["losses"]), rtol=1e-5, atol=1e-6)


def test_runs_side_by_side_have_losses_of_their_own() -> None:
    table = GOLDEN["tensors"]
    shape = (2, *table["shape"][1:])
    x, noise, output = (
        torch.tensor(table[name]).view(table["shape"])[:1].expand(shape)
        for name in ("latents", "noise", "output")
    )
    configs = [
        api.TrainConfig(model_prediction_type=kind, weighting_scheme=scheme)
        for kind, scheme in (("raw", "none"), ("denoised", "cosmap"))
    ]
    family = SimpleNamespace(objective=Flow(), predict=lambda *given: output)
    inputs: Any = SimpleNamespace(base=SimpleNamespace(family=family), embed=lambda text: text)
    fed = Fed(x, noise, torch.full((2,), 1000 * table["sigmas"][0]), (torch.zeros(2, 1),))
    both = micro_losses(None, inputs, configs, fed.tensors)  # type: ignore[arg-type]
    wanted = [loss_of("raw", "none")[0], loss_of("denoised", "cosmap")[0]]
    torch.testing.assert_close(both, torch.stack(wanted))


def test_auto_compares_velocities() -> None:
    assert torch.equal(loss_of("auto", "none"), loss_of("raw", "none"))


# ---- what is drawn ----


def test_timesteps_lie_between_the_limits_and_are_a_function_of_seed_step_and_sample() -> None:
    config = api.TrainConfig(timestep_sampling="uniform", min_timestep=200, max_timestep=700)

    def drawn(step: int, sample: int, config: api.TrainConfig = config) -> torch.Tensor:
        return draw_timestep(config, Flow(), (512, 512), step, sample)

    every = torch.cat([drawn(step, sample) for step in range(50) for sample in range(2)])
    assert every.dtype == torch.float32 and len(set(every.tolist())) == 100
    assert 200 <= float(every.min()) < 220 and 670 < float(every.max()) < 700
    u = torch.rand(1, generator=generator(42, 7, 1, "t"))
    assert torch.equal(drawn(7, 1), 200 + 500 * u)
    full = dataclasses.replace(config, min_timestep=0, max_timestep=1000)
    assert torch.equal(drawn(7, 1, full), 1000 * u)


def test_the_images_size_moves_flux_shift_alone() -> None:
    for sampling, moves in {"flux_shift": True, "shift": False}.items():
        config = api.TrainConfig(timestep_sampling=sampling)
        small, large = (draw_timestep(config, Flow(), (side, side), 3, 0) for side in (512, 1024))
        assert (small < large) == moves, sampling


def test_settings_are_the_distributions_numbers() -> None:
    config = api.TrainConfig(
        timestep_sampling="mode", sigmoid_scale=2.0, logit_mean=0.1, logit_std=0.2, mode_scale=0.3
    )
    assert times_of(config) == Times("mode", 2.0, 0.1, 0.2, 0.3, 1.0)
    assert times_of(api.TrainConfig(discrete_flow_shift=3.0)).shift == 3.0
    assert times_of(api.TrainConfig()).sampling == "logit_normal"


def test_how_captions_are_read() -> None:
    reading = reading_of(api.TrainConfig(t5xxl_max_token_length=96, apply_t5_attn_mask=True))
    assert (reading.t5_length, reading.mask_padding) == (96, True)
    assert (reading_of(api.TrainConfig()).t5_length, reading_of(api.TrainConfig()).mask_padding) == (
        None,
        False,
    )


# ---- runs ----

RUN = {"guidance_scale": 2.5, "validation_timesteps": 2, "save_every_n_steps": 2}


def test_a_run_on_a_flow_continues_with_the_same_bytes(straight: runs.Training) -> None:
    whole = straight.finish(**RUN)
    family: Any = straight.base.family
    seen = [given for given in family.seen if given[2].dtype == torch.float32]
    assert len(seen) == len(family.seen), "timesteps of a flow are no whole numbers"
    assert {given[5] for given in seen if len(given) > 5} == {2.5}, "the guidance reaches the model"
    other = straight.elsewhere("stopped")
    other.stop_after(2, **RUN)
    continued = other.finish(**RUN)
    assert continued.lora_file.read_bytes() == whole.lora_file.read_bytes()


def test_the_base_models_defaults_are_what_is_drawn(straight: runs.Training) -> None:
    family: Any = straight.base.family
    straight.finish(max_train_steps=1, network_train_unet_only=True)
    (t,) = {tuple(given[2].tolist()) for given in family.seen if len(given) > 3}
    n = torch.cat([torch.randn(1, generator=generator(42, 0, sample, "t")) for sample in range(len(t))])
    s = torch.sigmoid(n)
    assert t == pytest.approx((1000 * 3 * s / (1 + 2 * s)).tolist())


def test_validation_compares_what_training_compares_and_weighs_nothing(
    straight: runs.Training, images: Path
) -> None:
    held = dataclasses.replace(straight, train_set=runs.train_set(images, validation_split=0.25))

    def measured(name: str, **settings: Any) -> float:
        events = held.elsewhere(name).events(
            learning_rate=1e-12, max_train_steps=1, validation_timesteps=2, **settings
        )
        return runs.only(events, api.Validated).loss

    plain = measured("plain")
    assert measured("weighed", weighting_scheme="sigma_sqrt") == plain
    assert measured("images", model_prediction_type="denoised") < 0.9 * plain


def test_a_shift_is_decided_only_where_it_moves_something(straight: runs.Training) -> None:
    for sampling, shift in {"auto": 3.0, "logit_normal": 3.0, "uniform": None, "flux_shift": None}.items():
        config, lines = for_base(api.TrainConfig(timestep_sampling=sampling), straight.base)
        assert config.discrete_flow_shift == shift, sampling
        assert ("discrete_flow_shift is 3, as is usual for straight" in lines) == (shift is not None)
    own, _ = for_base(api.TrainConfig(discrete_flow_shift=2.0), straight.base)
    assert (own.discrete_flow_shift, own.timestep_sampling) == (2.0, "shift")


def test_what_the_base_decides_is_checked_with_the_rest(training: runs.Training) -> None:
    velocity = dataclasses.replace(training.base, velocity=True, zero_terminal=True)
    config, _ = for_base(api.TrainConfig(), velocity)
    assert config.v_parameterization and config.zero_terminal_snr
    with Refusal("LG-CFG-004", "v_pred_like_loss", "predicts velocity already"):
        for_base(api.TrainConfig(v_pred_like_loss=0.5), velocity)
    noise = dataclasses.replace(training.base, zero_terminal=True)  # it says so, but predicts noise
    assert not for_base(api.TrainConfig(), noise)[0].zero_terminal_snr


@pytest.mark.parametrize(
    "setting", [{"loraplus_text_encoder_lr_ratio": 4.0}, {"network_train_text_encoder_only": True}]
)
def test_settings_of_text_that_stays_are_refused(straight: runs.Training, setting: dict[str, Any]) -> None:
    family: Any = straight.base.family
    family.defaults = {**family.defaults, "text_encoder_lr": 0.0}
    with Refusal("LG-CFG-004", "text_encoder_lr"):
        straight.events(**setting)
    straight.finish(text_encoder_lr=1e-3, max_train_steps=1, **setting)


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if "max_token_length" in f.ignored])
def test_both_ways_to_say_how_long_clips_captions_are_are_refused(family: Any) -> None:
    for setting in ({"max_token_length": 150}, {"tokenizer_repeats": 2}):
        with Refusal("LG-CFG-004", "t5xxl_max_token_length"):
            check(api.make(api.TrainConfig, setting), family)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if isinstance(f.objective, Flow)])
@pytest.mark.parametrize("preset", ["", "full", "everything"])
def test_transformers_have_no_convolutions_under_any_preset(name: str, preset: str) -> None:
    with Refusal("LG-CFG-004", "conv_dim", "convolutions"):
        check(api.make(api.TrainConfig, {"conv_dim": 2, "preset": preset}), FAMILIES[name])


def test_a_bucket_is_the_size_that_flux_shift_counts(straight: runs.Training) -> None:
    family: Any = straight.base.family
    straight.finish(max_train_steps=1, network_train_unet_only=True, timestep_sampling="flux_shift")
    (given,) = (given for given in family.seen if len(given) > 3 and given[1].device.type == "cpu")
    config = api.TrainConfig(timestep_sampling="flux_shift")
    size = tuple(8 * side for side in given[1].shape[2:])
    wanted = [draw_timestep(config, Flow(), size, 0, sample) for sample in range(len(given[2]))]
    assert given[2].tolist() == torch.cat(wanted).tolist()
    assert wanted != [draw_timestep(config, Flow(), (16, 16), 0, sample) for sample in range(len(wanted))]


@pytest.mark.parametrize("settings", [{"min_snr_gamma": 5.0}, {"clip_skip": 2}, {"discrete_flow_shift": -1}])
def test_nothing_is_begun_with_a_setting_that_cannot_count(
    straight: runs.Training, settings: dict[str, Any]
) -> None:
    if "discrete_flow_shift" in settings:
        settings = {"logit_mean": 1.0}
    with Refusal("LG-CFG-004", next(iter(settings))):
        straight.finish(**settings)
    assert not straight.places.runs.exists() or not any(straight.places.runs.iterdir())


def test_runs_with_another_guidance_do_not_share_a_step(straight: runs.Training) -> None:
    jobs = [
        (straight.train_set, runs.settings(output_name=f"run{k}", guidance_scale=float(k))) for k in (1, 2)
    ]
    list(api.train_together(straight.base, jobs, places=straight.places, device="cpu"))
    family: Any = straight.base.family
    passes = [(noisy.shape[0], guidance) for _, noisy, *_, guidance in family.seen]
    assert {guidance for _, guidance in passes} == {1.0, 2.0}
    assert max(size for size, _ in passes) <= jobs[0][1].train_batch_size  # each alone


# ---- what a base model has no use for ----

VALUES: dict[str, Any] = {
    "min_snr_gamma": 5.0,
    "timestep_sampling": "uniform",
    "sigmoid_scale": 2.0,
    "logit_mean": 0.5,
    "logit_std": 0.5,
    "mode_scale": 0.5,
    "discrete_flow_shift": 3.0,
    "weighting_scheme": "cosmap",
    "model_prediction_type": "raw",
    "guidance_scale": 1.0,
    "v_pred_like_loss": 0.5,
}
PLAIN = api.TrainConfig()


@pytest.mark.parametrize("name", OF_NOISE)
def test_a_schedules_setting_is_refused_on_a_flow(name: str) -> None:
    config = dataclasses.replace(PLAIN, **{name: VALUES.get(name, True)})
    with Refusal("LG-CFG-004", name, "straight"):
        check(config, Straight())
    check(config, SD15())


@pytest.mark.parametrize("name", [*OF_FLOW, "t5xxl_max_token_length", "apply_t5_attn_mask"])
def test_a_flows_setting_is_refused_on_a_schedule(name: str) -> None:
    others = {"t5xxl_max_token_length": 128, "apply_t5_attn_mask": True}
    config = dataclasses.replace(PLAIN, **{name: VALUES.get(name, others.get(name))})
    with Refusal("LG-CFG-004", name, "sd15"):
        check(config, SD15())
    if name not in ("logit_mean", "logit_std", "mode_scale"):
        check(config, Straight())


@pytest.mark.parametrize("family", [Straight(), *FAMILIES.values()], ids=lambda family: family.name)
def test_a_familys_own_settings_are_settings_and_nothing_is_refused_at_the_defaults(family: Any) -> None:
    check(PLAIN, family)
    assert {*family.ignored, *family.defaults} <= set(TrainConfig.__dataclass_fields__)
    assert not set(family.ignored) & set(family.defaults), "nobody could set what the family decides"
    assert all(getattr(PLAIN, name) in (None, "auto") for name in family.defaults), "only what is open"
    is_flow = isinstance(family.objective, Flow)
    assert ("timestep_sampling" in family.defaults) == is_flow
    assert not is_flow or family.defaults["timestep_sampling"] in SAMPLINGS


def test_a_number_is_checked_against_what_auto_stands_for() -> None:
    with Refusal("LG-CFG-004", "logit_mean", "auto means shift"):
        check(dataclasses.replace(PLAIN, logit_mean=1.0), Straight())
    check(dataclasses.replace(PLAIN, sigmoid_scale=2.0), Straight())


def test_hubers_threshold_has_no_ratio_to_fall_with() -> None:
    config = dataclasses.replace(PLAIN, loss_type="huber")
    with Refusal("LG-CFG-004", "huber_schedule", "exponential"):
        check(config, Straight())
    check(dataclasses.replace(config, huber_schedule="exponential"), Straight())
    check(config, SD15())


class Silent(Straight):
    trains_text = False


@pytest.mark.parametrize(
    ("family", "settings", "parts", "says"),
    [
        (SD15(), {"text_encoder_2_lr": 1e-4}, None, "1 text encoder"),
        (Straight(), {"text_encoder_3_lr": 1e-4}, None, "2 text encoders"),
        (Straight(), {"text_encoder_2_lr": 1e-4}, ("denoiser", "text_encoder"), "no text_encoder_2"),
        (Silent(), {"text_encoder_lr": 1e-4}, None, "not trained"),
        (Silent(), {"network_train_text_encoder_only": True}, None, "not trained"),
    ],
)
def test_a_rate_for_an_encoder_that_is_not_trained_is_refused(
    family: Any, settings: dict[str, Any], parts: Any, says: str
) -> None:
    config = dataclasses.replace(PLAIN, **settings)
    with Refusal("LG-CFG-004", next(iter(settings)), says):
        check(config, family, parts)


def test_further_encoders_have_rates_of_their_own_and_t5_only_by_its_own() -> None:
    targets = [
        Target(part, "x", f"lora_{part}", "linear")
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "denoiser")
    ]
    kinds = {"text_encoder": "clip", "text_encoder_2": "clip", "text_encoder_3": "t5"}

    def trained(**settings: Any) -> dict[str, float]:
        config = dataclasses.replace(PLAIN, learning_rate=1e-4, **settings)
        chosen = settings_of(config, None, None, kinds)
        kept = [t for t in targets if chosen.rank_of(t) is not None]
        tensors = [(t, {"lora_up.weight": torch.nn.Parameter(torch.zeros(1))}) for t in kept]
        return {group.label: group.lr for group in group_tensors(config, tensors, None)}

    assert trained() == dict.fromkeys(("text_encoder", "text_encoder_2", "denoiser"), 1e-4)
    assert trained(text_encoder_lr=5e-5, text_encoder_2_lr=2e-5, text_encoder_3_lr=1e-5) == {
        "text_encoder": 5e-5,
        "text_encoder_2": 2e-5,
        "text_encoder_3": 1e-5,
        "denoiser": 1e-4,
    }
    assert trained(text_encoder_lr=0.0) == {"denoiser": 1e-4}
    assert trained(text_encoder_lr=0.0, text_encoder_2_lr=1e-5, unet_lr=0.0) == {"text_encoder_2": 1e-5}
