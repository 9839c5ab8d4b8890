"""Drawing without a host: samplers and schedules against diffusers', and what goes into an image."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from loragraft.trainer import api
from loragraft.trainer.__main__ import parser
from loragraft.trainer.commands.sample import file_and_strength
from loragraft.trainer.families import drawing
from loragraft.trainer.families.base import Reading
from loragraft.trainer.objective import NoiseSchedule
from loragraft.trainer.tools import sample as tool
from loragraft.trainer.tools import samplers, sigmas, wildcards
from loragraft_tests.trainer import tiny
from loragraft_tests.trainer.data_folders import Refusal
from loragraft_tests.trainer.lora_files import tiny_lora

TABLE = NoiseSchedule().sigmas
SMALL = api.SampleSettings(size=(32, 32), steps=4, cfg=4.0, sampler="euler", schedule="normal")


def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return a toy's estimate, which bends the way."""
    return 0.7 * torch.tanh(x / (1 + sigma)) + 0.1 * torch.sin(x)


def no_noise(step: int) -> torch.Tensor:
    raise AssertionError("this sampler adds no noise")


def peers(name: str, schedule: str) -> Any:
    import diffusers

    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    karras = {"use_karras_sigmas": schedule == "karras"}
    if name == "dpmpp_2m":
        return diffusers.DPMSolverMultistepScheduler(**beta, **karras, final_sigmas_type="zero")
    kind = {"euler": diffusers.EulerDiscreteScheduler, "heun": diffusers.HeunDiscreteScheduler}[name]
    return kind(**beta, **karras)


@pytest.mark.parametrize("name", ["dpmpp_2m", "euler", "heun"])
@pytest.mark.parametrize("steps", [5, 20])
def test_samplers_equal_diffusers(name: str, steps: int) -> None:
    """The peer counts in the variance-preserving form, so that x is scaled before and after."""
    row = sigmas.sigmas_of("karras", TABLE, steps)
    begun = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)) * row[0]
    ours = samplers.SAMPLERS[name](denoise, begun, row, no_noise)

    scheduler = peers(name, "karras")
    scheduler.set_timesteps(steps)
    vp = name == "dpmpp_2m"
    x = begun / (1 + row[0] ** 2) ** 0.5 if vp else begun
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].float()
        real = x * (1 + sigma**2) ** 0.5 if vp else x
        eps = (real - denoise(real, sigma)) / sigma
        if not vp:
            scheduler.scale_model_input(x, t)
        x = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


def test_ddim_equals_diffusers() -> None:
    from diffusers import DDIMScheduler

    row = sigmas.sigmas_of("ddim_uniform", TABLE, 10)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler.set_timesteps(10)
    assert [int(NoiseSchedule().timestep(s)) for s in row[:-1]] == scheduler.timesteps.tolist()
    begun = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)) * row[0]
    x = begun / (1 + row[0] ** 2) ** 0.5
    for i, t in enumerate(scheduler.timesteps[:-1]):
        real = x * (1 + row[i] ** 2) ** 0.5
        x = scheduler.step((real - denoise(real, row[i])) / row[i], t, x).prev_sample
    ours = samplers.ddim(denoise, begun, row[:-1], no_noise)
    torch.testing.assert_close(ours / (1 + row[-2] ** 2) ** 0.5, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_samplers_arrive_at_a_fixed_estimate(name: str) -> None:
    wanted = torch.linspace(-1, 1, 8)
    row = sigmas.sigmas_of("karras", TABLE, 12)
    found = samplers.SAMPLERS[name](
        lambda x, s: wanted, torch.ones(8) * row[0], row, lambda i: torch.full((8,), 0.5)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_an_ancestral_step_keeps_the_noise_level() -> None:
    for a, b in ((14.6, 9.0), (2.0, 1.9), (1.0, 0.05)):
        down, up = samplers.ancestral(torch.tensor(a), torch.tensor(b))
        assert float(down**2 + up**2) == pytest.approx(b * b, rel=1e-5) and 0 <= down <= b
    assert samplers.ancestral(torch.tensor(1.0), torch.tensor(0.0)) == (0, 0)


@pytest.mark.parametrize("name", sigmas.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 20, 50])
def test_schedules_fall_to_zero(name: str, steps: int) -> None:
    row = sigmas.sigmas_of(name, TABLE, steps)
    assert len(row) == steps + 1 and row[-1] == 0
    assert bool((row[:-1] > row[1:]).all())
    assert float(row[0]) <= float(TABLE[-1]) * (1 + 1e-6)
    if name in ("normal", "karras", "exponential") and steps > 1:
        assert float(row[0]) == pytest.approx(float(TABLE[-1]), rel=1e-5)
        assert float(row[-2]) == pytest.approx(float(TABLE[0]), rel=1e-4)


def test_karras_equals_the_paper() -> None:
    i = np.arange(10)
    low, high = float(TABLE[0]) ** (1 / 7), float(TABLE[-1]) ** (1 / 7)
    wanted = (high + i / 9 * (low - high)) ** 7
    np.testing.assert_allclose(sigmas.karras(TABLE, 10), wanted, rtol=1e-5)


# ---- images ----


def draw(base: api.Base, prompts: list[str], seeds: list[int], **more: Any) -> list[np.ndarray]:
    settings = more.pop("settings", SMALL)
    return [
        np.asarray(d.image).astype(int)
        for d in api.draw_images(base, prompts, seeds, settings, device="cpu", **more)
    ]


def test_euler_equals_the_familys_own(base: api.Base) -> None:
    from loragraft.trainer.engine.precision import place, resolve

    parts = base.load()
    place(parts, resolve("fp32", torch.device("cpu")), owned=True)
    guided, size = drawing.Guided(cfg=4.0), (32, 32)
    wanted = drawing.sample(
        *(base.family, parts, ["a zibu"] * 3),
        **{"seeds": [1, 2, 3], "size": size, "steps": 4, "guided": guided, "reading": Reading()},
    )
    for mine, theirs in zip(draw(base, ["a zibu"], [1, 2, 3]), wanted, strict=True):
        assert np.abs(mine - np.asarray(theirs).astype(int)).max() <= 1


def test_batches_and_seeds_do_not_change_an_image(base: api.Base) -> None:
    for sampler in ("euler_a", "dpmpp_2m"):
        settings = dataclasses.replace(SMALL, sampler=sampler, schedule="karras")
        one = draw(base, ["a"], [7], settings=settings)
        both = draw(base, ["a"], [3, 7], settings=settings)
        assert np.abs(one[0] - both[1]).max() <= 1 and np.abs(both[0] - both[1]).max() > 5


def test_v_prediction_finds_what_the_base_means(base: api.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    x0 = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(3))
    a = base.family.objective.alphas_cumprod

    def predict(velocity: bool) -> Any:
        def of(parts: Any, noisy: torch.Tensor, t: torch.Tensor, *more: Any) -> torch.Tensor:
            share = a[t].view(-1, 1, 1, 1)
            eps = (noisy - share.sqrt() * x0) / (1 - share).sqrt()
            return share.sqrt() * eps - (1 - share).sqrt() * x0 if velocity else eps

        return of

    found = []
    for velocity in (False, True):
        monkeypatch.setattr(type(base.family), "predict", staticmethod(predict(velocity)))
        settings = dataclasses.replace(SMALL, steps=1, velocity=velocity)
        found += draw(base, ["a"], [1], settings=settings)
    assert np.abs(found[0] - found[1]).max() <= 1
    monkeypatch.setattr(type(base.family), "predict", staticmethod(predict(True)))
    wrong = draw(base, ["a"], [1], settings=dataclasses.replace(SMALL, steps=1))
    assert np.abs(found[0] - wrong[0]).max() > 10


def test_loras_by_flag_and_by_tag_are_the_same(base: api.Base, tmp_path: Path) -> None:
    lora = tiny_lora(base, tmp_path)
    plain = draw(base, ["a b"], [1])[0]
    flag = draw(base, ["a b"], [1], loras=[(lora, 0.5)])[0]
    tag = draw(base, ["a <lora:tiny_lora:0.5> b", "a b"], [1], lora_folder=tmp_path)
    twice = draw(base, ["a b"], [1], loras=[(lora, 0.25), (lora, 0.25)])[0]
    assert np.abs(plain - flag).max() > 5
    assert (flag == tag[0]).all() and (plain == tag[1]).all()
    assert np.abs(flag - twice).max() <= 1
    nothing = draw(base, ["a b"], [1], loras=[(lora, 0.0)])[0]
    assert np.abs(plain - nothing).max() <= 1
    (drawing,) = api.draw_images(base, ["a"], [5], SMALL, loras=[(lora, 0.5)], device="cpu")
    assert drawing.parameters == (
        "a\nSteps: 4, Sampler: euler, Schedule type: normal, CFG scale: 4, Seed: 5, Size: 32x32, "
        f"Model: {base.name}, Lora: tiny_lora:0.5"
    )


def test_a_lora_of_another_model(base: api.Base, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    name = "lora_unet_up_blocks_9_attentions_0_proj_in"
    save_file({f"{name}.lora_{e}.weight": torch.ones(2, 2) for e in ("up", "down")}, path)
    with Refusal("LG-TOOL-010", "up_blocks_9"):
        draw(base, ["a"], [1], loras=[(path, 1.0)])


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        ({"modelspec.prediction_type": "v"}, "--v_parameterization"),
        ({"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}, "zero_terminal_snr"),
    ],
)
def test_a_lora_for_another_prediction_is_not_drawn(
    base: api.Base, tmp_path: Path, texts: dict[str, str], named: str
) -> None:
    file = tmp_path / "v.safetensors"
    save_file({f"lora_unet_x.lora_{e}.weight": torch.ones(2, 2) for e in ("up", "down")}, file, texts)
    with Refusal("LG-TOOL-005", named):
        next(api.draw_images(base, ["a"], [1], api.SampleSettings(), loras=[(file, 1.0)], device="cpu"))


def test_emphasis_weighs_words(base: api.Base) -> None:
    plain, same, more = draw(base, ["a cat", "a (cat:1.0)", "a (cat:1.8)"], [1])
    assert (plain == same).all()
    assert np.abs(plain - more).max() > 0


def test_an_embedding_stands_for_its_vectors(base: api.Base, tmp_path: Path) -> None:
    """Vectors copied from the vocabulary draw what their words draw."""
    parts = base.load()
    table = parts.text_encoder.get_input_embeddings().weight
    ids = parts.tokenizer("hi", verbose=False).input_ids[1:-1]
    for key in ("emb_params", "clip_l", "zibu"):
        save_file({key: table[ids].float().contiguous()}, tmp_path / "Zibu.safetensors")
        with_words, with_vectors = draw(
            base, ["a hi b", "a zibu b"], [1], embeddings=[tmp_path / "Zibu.safetensors"]
        )
        assert np.abs(with_words - with_vectors).max() <= 1
    for tensors, why in (
        ({"emb_params": torch.ones(2, 9)}, "vectors of"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, "none of"),
    ):
        save_file(tensors, tmp_path / "bad.safetensors")
        with Refusal("LG-TOOL-015", why):
            draw(base, ["a"], [1], embeddings=[tmp_path / "bad.safetensors"])
    with Refusal("LG-TOOL-015", "can run code"):
        draw(base, ["a"], [1], embeddings=[tmp_path / "x.pt"])


def test_another_vae_decodes(base: api.Base, checkpoint: Path, tmp_path: Path) -> None:
    other = tiny.write_checkpoint(tmp_path / "other.safetensors", seed=9)
    weights = load_file(other)
    prefix = "first_stage_model."
    vae = {k.removeprefix(prefix): v.contiguous() for k, v in weights.items() if k.startswith(prefix)}
    save_file(vae, tmp_path / "vae.safetensors")
    tokenizer = Path(base.tokenizer_folders["clip"])

    def drawn(vae: Path) -> np.ndarray:
        return draw(api.open_base(checkpoint, tokenizer=tokenizer, vae=vae), ["a"], [1])[0]

    own = draw(base, ["a"], [1])[0]
    assert (drawn(checkpoint) == own).all()
    from_checkpoint = drawn(other)
    assert np.abs(from_checkpoint - own).max() > 5
    assert (drawn(tmp_path / "vae.safetensors") == from_checkpoint).all()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sampler": "x"}, "sampler"),
        ({"schedule": "x"}, "schedule"),
        ({"steps": 0}, "steps"),
        ({"size": (31, 32)}, "multiples of 8"),
        ({"cfg": -1.0}, "cfg"),
    ],
)
def test_settings_that_draw_nothing(base: api.Base, changes: dict[str, Any], why: str) -> None:
    with Refusal("LG-TOOL-005", why):
        draw(base, ["a"], [1], settings=dataclasses.replace(SMALL, **changes))


def test_tags(tmp_path: Path) -> None:
    (tmp_path / "style.safetensors").touch()
    assert tool.read_tags("a <lora:style> b", tmp_path) == ("a b", ((tmp_path / "style.safetensors", 1.0),))
    for text, folder, fix in (
        ("<lora:stile:1>", tmp_path, "<lora:style:1>"),
        ("<lora:style:x>", tmp_path, "style"),
        ("<lora:style:1>", None, "--lora_dir"),
    ):
        with Refusal("LG-TOOL-016", fix):
            tool.read_tags(text, folder)
    assert file_and_strength("a/b.safetensors:0.8") == (Path("a/b.safetensors"), 0.8)
    assert file_and_strength("C:/b.safetensors") == (Path("C:/b.safetensors"), 1.0)
    with Refusal("LG-TOOL-016", "no number"):
        file_and_strength("b.safetensors:x")


# ---- wildcards ----


def test_wildcards() -> None:
    assert wildcards.expand_wildcards("a {red|blue} {cat|dog}") == [
        "a red cat",
        "a red dog",
        "a blue cat",
        "a blue dog",
    ]
    assert wildcards.expand_wildcards("a {cat}, (b:1.2)") == ["a {cat}, (b:1.2)"]
    assert wildcards.expand_wildcards("{a|}b") == ["ab", "b"]
    picks = [wildcards.pick_wildcards("{a|b|c} {d|e}", seed) for seed in range(60)]
    assert picks == [wildcards.pick_wildcards("{a|b|c} {d|e}", seed) for seed in range(60)]
    assert set(picks) == {f"{x} {y}" for x in "abc" for y in "de"}
    with Refusal("LG-TOOL-017", "choices"):
        wildcards.expand_wildcards("{a|b}" * 7)


def test_trigger_words_are_taken_out() -> None:
    assert wildcards.without_words("zibu, a cat in zibus garden, Zibu", "zibu") == "a cat in zibus garden"
    assert wildcards.without_words("a photo of zibu cat, red", "zibu cat, red") == "a photo of"
    assert wildcards.without_words("a cat", "") == "a cat"


# ---- the command ----


def test_the_command(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    base = [
        "--pretrained_model_name_or_path",
        str(checkpoint),
        "--tokenizer",
        str(tokenizer),
        "--device",
        "cpu",
    ]
    size = ["--width", "32", "--height", "32", "--steps", "2", "--output", str(tmp_path / "out")]
    command = ["sample", *base, "--prompts", "a {x|y}", "--seeds", "1", "2", *size, "--negative", "bad"]
    arguments = parser().parse_args(command)
    for wanted in (["seed1_00001", "seed1_00002", "seed2_00001", "seed2_00002", "grid_00001"],):
        assert arguments.run(arguments) == 0
        assert sorted(p.stem for p in (tmp_path / "out").iterdir()) == sorted(wanted)
    with Image.open(tmp_path / "out" / "seed2_00002.png") as image:
        text = image.info["parameters"]
    assert text.startswith("a y\nNegative prompt: bad\nSteps: 2, Sampler: dpmpp_2m, Schedule type: karras")
    assert parser().parse_args([*command[:7], "--prompts", "a"]).steps is None
