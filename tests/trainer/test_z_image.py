"""Z-Image: its names, what its parts compute as diffusers' do, LoRA files, and short runs."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer.config import TrainConfig
from loragraft.trainer.contradictions.family import check
from loragraft.trainer.families import FAMILIES
from loragraft.trainer.families.base import Reading
from loragraft.trainer.families.modules.z_image_model import ZImageTransformer, z_image_config
from loragraft.trainer.families.sources.versions import newer
from loragraft.trainer.families.text import qwen_text
from loragraft.trainer.families.text.tokenizers import load_tokenizer
from loragraft.trainer.families.z_image import ZImage
from loragraft.trainer.parts import Parts
from loragraft_tests.trainer import tiny_qwen as tiny
from loragraft_tests.trainer.data_folders import Refusal

FAMILY = ZImage()
CAPTIONS = [
    "zibu, blue",
    "a caption of more than one row",
    "a caption of three rows, the last of which holds only some tokens",
    "",
]
READING = Reading(t5_length=96)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(tiny.write_qwen_tokenizer(tmp_path_factory.mktemp("qwen"))), "qwen")


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    return tiny.z_image_modules()


@pytest.fixture(scope="module")
def file(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return tiny.z_image_file(modules)


@pytest.fixture(scope="module")
def parts(file: dict[str, torch.Tensor], tokenizer: Any) -> Parts:
    return FAMILY.load(FAMILY.split(file), {"text_encoder": tokenizer})


def noisy(height: int = 12, width: int = 8, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents (B, 16, h, w) and timesteps (B,)."""
    drawn = torch.Generator().manual_seed(3)
    return torch.randn(batch, 16, height, width, generator=drawn), torch.tensor([30.0, 500.0, 998.5, 77.0])[
        :batch
    ]


def conditioning(parts: Parts, captions: list[str], reading: Reading = READING) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return FAMILY.encode_text(parts, FAMILY.tokenize(parts, captions, reading), reading)


# ---- names ----


def test_a_checkpoint_is_known_and_no_other_family_takes_it(file: dict[str, torch.Tensor]) -> None:
    assert [name for name, family in FAMILIES.items() if family.detect(file)] == ["z_image"]


def test_names_go_both_ways_and_nothing_is_copied(file: dict[str, torch.Tensor], parts: Parts) -> None:
    again = FAMILY.join(FAMILY.split(file))
    assert set(file) - set(again) == {"text_encoders.qwen3_4b.transformer.lm_head.weight"}
    assert all(again[name].data_ptr() == file[name].data_ptr() for name in again)
    held = {p.data_ptr() for module in (parts.denoiser, parts.text_encoder) for p in module.parameters()}
    assert held <= {weight.data_ptr() for weight in file.values()}


def test_a_checkpoint_with_ldms_prefix_is_read_too(file: dict[str, torch.Tensor]) -> None:
    renamed = {re.sub(r"^vae\.", "first_stage_model.", k): v for k, v in file.items()}
    a, b = FAMILY.split(renamed)["vae"], FAMILY.split(file)["vae"]
    assert set(a) == set(b) and len(a) > 50
    assert all(a[k].equal(b[k]) for k in a)


def test_a_diffusers_folder_gives_the_same_weights(
    modules: dict[str, nn.Module], file: dict[str, torch.Tensor]
) -> None:
    folder = {part: modules[name].state_dict() for part, name in FAMILY.folders.items()}
    there, here = FAMILY.from_folder(folder), FAMILY.split(file)
    for part in here:
        assert set(there[part]) == set(here[part])
        assert all(there[part][name].equal(here[part][name]) for name in here[part])


def test_the_full_size_shape_is_read_from_the_weights() -> None:
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        theirs = ZImageTransformer2DModel()
        ours = ZImageTransformer(
            **{"width": 3840, "heads": 30, "inside": 10240, "channels": 64, "context": 2560, "time": 256},
            **{"time_inside": 1024, "layers": 30, "noise_refiners": 2, "context_refiners": 2},
        )
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    config = z_image_config(ours.state_dict())
    assert config["heads"] == 30 and config["inside"] == 10240 and ours.axes == (32, 48, 48)
    with torch.device("meta"):
        again = ZImageTransformer(**config).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in ours.state_dict().items()}


@pytest.mark.parametrize("name", ["siglip_embedder.0.weight", "dec_net.cond_embed.weight"])
def test_relatives_are_refused(file: dict[str, torch.Tensor], tokenizer: Any, name: str) -> None:
    weights = {**file, f"model.diffusion_model.{name}": torch.zeros(4)}
    with Refusal("LG-BASE-004", "Z-Image", name):
        FAMILY.load(FAMILY.split(weights), {"text_encoder": tokenizer})


def test_incomplete_weights_are_refused(file: dict[str, torch.Tensor], tokenizer: Any) -> None:
    weights = {k: v for k, v in file.items() if not k.endswith("cap_pad_token")}
    with Refusal("LG-BASE-003", "cap_pad_token"):
        FAMILY.load(FAMILY.split(weights), {"text_encoder": tokenizer})


# ---- what the parts compute ----


@pytest.mark.parametrize("size", [(12, 8), (16, 16), (6, 22)])
def test_the_velocity_is_what_diffusers_predicts_of_each_caption_alone(
    parts: Parts, modules: dict[str, nn.Module], size: tuple[int, int]
) -> None:
    x, t = noisy(*size)
    cond = conditioning(parts, CAPTIONS)
    lengths = [int(n) for n in cond[1].sum(1)]
    assert len({-(-n // 32) for n in lengths}) == 3, "captions of different rows of padding"
    with torch.no_grad():
        ours = FAMILY.predict(parts, x, t, cond)
        for i, length in enumerate(lengths):
            theirs = modules["transformer"](
                [x[i][:, None]], (1000 - t[i : i + 1]) / 1000, [cond[0][i, :length]], return_dict=False
            )[0]
            torch.testing.assert_close(ours[i], -theirs[0][:, 0], rtol=1e-5, atol=2e-6)


def test_padding_changes_nothing(parts: Parts) -> None:
    x, t = noisy()
    with torch.no_grad():
        ours = [
            FAMILY.predict(parts, x, t, conditioning(parts, CAPTIONS, Reading(t5_length=n)))
            for n in (90, 96, 200)
        ]
    torch.testing.assert_close(ours[0], ours[1], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(ours[2], ours[1], rtol=1e-5, atol=2e-6)
    moved = conditioning(parts, CAPTIONS)
    hidden = torch.where(moved[1].bool()[..., None], moved[0], torch.full_like(moved[0], 7.0))
    with torch.no_grad():
        again = FAMILY.predict(parts, x, t, (hidden, moved[1]))
    torch.testing.assert_close(again, ours[1], rtol=1e-5, atol=2e-6)


def test_captions_are_encoded_as_diffusers_pipeline_does(
    parts: Parts, modules: dict[str, nn.Module], tokenizer: Any
) -> None:
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline(
        None, modules["vae"], modules["text_encoder"], tokenizer, modules["transformer"]
    )
    cond, mask = conditioning(parts, CAPTIONS)
    assert [tuple(s) for s in (cond.shape[1:], mask.shape[1:])] == FAMILY.cond_shapes(parts, READING)
    with torch.no_grad():
        theirs = pipeline._encode_prompt(list(CAPTIONS), "cpu", max_sequence_length=96)
    for ours, seen, embeds in zip(cond, mask, theirs, strict=True):
        torch.testing.assert_close(ours[seen.bool()], embeds, rtol=1e-5, atol=1e-5)
        assert not ours[~seen.bool()].any()


def test_images_go_to_latents_and_back_as_in_diffusers(parts: Parts, modules: dict[str, nn.Module]) -> None:
    vae: Any = modules["vae"]
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = FAMILY.latents(FAMILY.encode_images(parts, pixels), noise)
        posterior = vae.encode(pixels).latent_dist
        theirs = (
            posterior.mean + posterior.std * noise - vae.config.shift_factor
        ) * vae.config.scaling_factor
        torch.testing.assert_close(latents, theirs, rtol=1e-5, atol=1e-6)
        assert tuple(latents.shape[1:]) == FAMILY.latent_shape(parts, 32, 48)
        back = vae.decode(theirs / vae.config.scaling_factor + vae.config.shift_factor).sample
        torch.testing.assert_close(FAMILY.decode(parts, latents), back, rtol=1e-5, atol=1e-5)


# ---- what is trained ----


def test_the_lora_has_the_references_layers_with_query_key_and_value_as_one() -> None:
    """kohya's musubi-tuner trains attention and feed-forward of the main layers; its q, k and v are three."""
    shape = {"width": 3840, "heads": 30, "inside": 10240, "channels": 64, "context": 2560, "time": 256}
    depth = {"time_inside": 1024, "layers": 30, "noise_refiners": 2, "context_refiners": 2}
    with torch.device("meta"):
        parts = Parts(ZImageTransformer(**shape, **depth), nn.Module(), nn.ModuleDict(), {})
    found = FAMILY.targets(parts, convolutions=False)
    names = ("attention_qkv", "attention_out", "feed_forward_w1", "feed_forward_w2", "feed_forward_w3")
    assert [t.key for t in found] == [f"lora_unet_layers_{i}_{name}" for i in range(30) for name in names]
    assert tuple(parts.denoiser.get_submodule(found[0].path).weight.shape) == (11520, 3840)


@pytest.mark.parametrize(
    ("preset", "count"), [("", 10), ("attn-mlp", 10), ("attn-only", 4), ("full", 23), ("everything", 29)]
)
def test_presets_name_sets_of_layers(parts: Parts, preset: str, count: int) -> None:
    found = FAMILY.targets(parts, convolutions=False, preset=preset)
    assert len([t for t in found if t.kind == "linear"]) == count
    assert len({t.key for t in found}) == len(found)


def test_settings_without_a_meaning_here_are_refused() -> None:
    for name, value in (("clip_skip", 2), ("guidance_scale", 3.5), ("weighted_captions", True)):
        with Refusal("LG-CFG-004", name, "z_image"):
            check(dataclasses.replace(TrainConfig(), **{name: value}), FAMILY)
    check(TrainConfig(), FAMILY)


def test_sampling_follows_the_published_schedule() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / 8, 8).tolist())
    torch.testing.assert_close(FAMILY.objective.sigmas_for(8, (1024, 1024)), scheduler.sigmas)


def test_half_precision_is_near(file: dict[str, torch.Tensor], tokenizer: Any, parts: Parts) -> None:
    half = FAMILY.load(FAMILY.split({k: v.bfloat16() for k, v in file.items()}), {"text_encoder": tokenizer})
    half.dtype = torch.bfloat16
    x, t = noisy()
    cond = conditioning(parts, CAPTIONS)
    with torch.no_grad():
        exact, near = FAMILY.predict(parts, x, t, cond), FAMILY.predict(half, x, t, cond)
    assert near.dtype == torch.bfloat16
    assert (near.float() - exact).norm() / exact.norm() < 0.05


def test_an_older_transformers_is_refused_with_the_remedy(
    file: dict[str, torch.Tensor], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.50.3")
    monkeypatch.setattr(qwen_text, "newer", lambda module, name, **more: newer(module, f"{name}X", **more))
    with Refusal("LG-BASE-010", "Z-Image needs a newer transformers", "4.50.3", "transformers>=4.51"):
        FAMILY.load(FAMILY.split(file), {"text_encoder": tokenizer})
