"""SDXL: what it is told of sizes, and runs: both encoders, kept text, resuming, a whole model, drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loragraft.trainer import api
from loragraft.trainer.data.batches import Batch
from loragraft.trainer.inputs.sizes import size_conditioning, sizes_of
from loragraft_tests.trainer import runs, tiny_sdxl
from loragraft_tests.trainer.data_folders import Refusal, golden


@pytest.fixture
def sdxl_runs(sdxl: api.Base, train_set: api.TrainSet, places: api.Places) -> runs.Training:
    """Return runs on the tiny base."""
    return runs.Training(sdxl, train_set, places)


# ---- sizes ----


@pytest.mark.parametrize("case", golden("sdxl_sizes"), ids=str)
def test_sizes_are_the_references(case: dict[str, Any]) -> None:
    (width, height), bucket = case["image"], tuple(case["bucket"])
    for mirrored, left in ((False, case["left"]), (True, case["left_mirrored"])):
        found = size_conditioning((width, height), bucket, mirrored=mirrored)
        assert found == (height, width, case["top"], left, bucket[1], bucket[0])


def test_a_batch_tells_the_sizes_of_its_pictures(train_set: api.TrainSet) -> None:
    wide = next(i for i, r in enumerate(train_set.records) if r.size == (24, 40))
    square = next(i for i, r in enumerate(train_set.records) if r.size == (32, 32))
    found = sizes_of(train_set, Batch((40, 24), (wide, square), (False, True)))
    assert found.tolist() == [[24, 40, 0, 0, 24, 40], [32, 32, 0, 0, 32, 32]]


def test_the_denoiser_is_told_the_sizes(sdxl: api.Base) -> None:
    parts = sdxl.load()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    cond = torch.randn(1, 77, tiny_sdxl.CONTEXT), torch.randn(1, tiny_sdxl.POOLED)
    plain = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    outputs = [sdxl.family.predict(parts, x, t, cond, plain)]
    for place in range(6):
        changed = plain.clone()
        changed[0, place] += 100
        outputs.append(sdxl.family.predict(parts, x, t, cond, changed))
    for i, one in enumerate(outputs):
        assert not any(torch.allclose(one, other, atol=1e-6) for other in outputs[:i])


def test_latents_have_sdxls_scale(sdxl: api.Base) -> None:
    parts, image = sdxl.load(), torch.randn(1, 3, 16, 24)
    moments = sdxl.family.encode_images(parts, image)
    noise = torch.randn_like(moments["mean"])
    latents = sdxl.family.latents(moments, noise)
    assert latents.shape[1:] == sdxl.family.latent_shape(parts, 16, 24)
    drawn = moments["mean"] + moments["std"] * noise
    torch.testing.assert_close(latents, 0.13025 * drawn)  # as published with SDXL's VAE
    vae: Any = parts.vae
    torch.testing.assert_close(sdxl.family.decode(parts, latents), vae.decode(drawn).sample)


# ---- runs ----


def test_a_run_trains_both_encoders_and_says_what_it_trained(sdxl_runs: runs.Training) -> None:
    finished = sdxl_runs.finish(max_train_steps=2)
    tensors = api.lora_tensors(finished.lora_file)
    modules = {k.split(".")[0] for k in tensors}
    beginnings = {name: sum(m.startswith(name) for m in modules) for name in ("lora_te1_", "lora_te2_")}
    layers = tiny_sdxl.LAYERS
    assert beginnings == {"lora_te1_": 6 * layers["text_encoder"], "lora_te2_": 6 * layers["text_encoder_2"]}
    zero = {k for k, v in tensors.items() if k.endswith("lora_up.weight") and not v.any()}
    assert {k.split("_layers_")[1][0] for k in zero} == {"2"}  # CLIP-L's last layer is never read
    assert all(k.startswith("lora_te1_") for k in zero) and len(zero) == 6
    metadata = api.lora_metadata(finished.lora_file)
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_kept_text_trains_as_text_encoded_at_every_step(sdxl_runs: runs.Training, images: Path) -> None:
    varied = runs.train_set(images, shuffle_caption=True)
    settings = {"network_train_unet_only": True, "max_train_steps": 2, "train_batch_size": 1}
    files, kept = [], []
    for keep in (True, False):
        training = sdxl_runs.elsewhere(f"kept {keep}", train_set=varied)
        events = training.events(cache_text_encoder_outputs=keep, **settings)
        files.append(api.lora_tensors(runs.only(events, api.Finished).lora_file))
        kept.append(any(event.what == "captions" for event in runs.of(events, api.Cached)))
    assert kept == [True, False]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


@pytest.mark.parametrize("settings", [{}, {"v_parameterization": True, "zero_terminal_snr": True}])
def test_a_stopped_run_goes_on_to_the_same_bytes(settings: dict[str, Any], sdxl_runs: runs.Training) -> None:
    settings = {**settings, "max_train_steps": 3}
    whole = sdxl_runs.elsewhere("whole").finish(**settings)
    sdxl_runs.stop_after(2, **settings)
    resumed = sdxl_runs.finish(**settings)
    assert resumed.lora_file.read_bytes() == whole.lora_file.read_bytes()


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"clip_skip": 2}, "clip_skip"), ({"train_embeddings": ["zibu"]}, "train_embeddings")],
)
def test_settings_without_a_meaning_are_refused(
    settings: dict[str, Any], named: str, sdxl_runs: runs.Training
) -> None:
    with Refusal("LG-CFG-004", named, "SDXL"):
        sdxl_runs.events(**settings)


def test_block_weights_leave_out_blocks(sdxl_runs: runs.Training) -> None:
    finished = sdxl_runs.finish(max_train_steps=1, up_lr_weight="0,1,0,0,0,0,0,0,0", mid_lr_weight="0,0,0")
    modules = {k.split(".")[0] for k in api.lora_tensors(finished.lora_file)}
    assert {m.split("_")[4] for m in modules if "_output_blocks_" in m} == {"1"}
    assert not any("middle_block" in m for m in modules)
    assert any("input_blocks" in m for m in modules)


def test_the_whole_model_is_a_file_with_the_training_in_it(
    sdxl_runs: runs.Training, tmp_path: Path, tokenizer: Path
) -> None:
    """Also what lies in OpenCLIP's joined matrices; and it says that it predicts velocity."""
    v = {"v_parameterization": True, "zero_terminal_snr": True, "learning_rate": 0.05}
    end = sdxl_runs.finish(save_as="checkpoint", save_precision="fp32", max_train_steps=2, **v)
    assert end.model_file is not None
    assert set(load_file(end.model_file)) >= {"v_pred", "ztsnr"}
    whole = api.open_base(end.model_file, tokenizer=tokenizer)
    assert (whole.velocity, whole.zero_terminal) == (True, True)
    settings = api.DrawSettings(steps=2, size=(32, 32), mixed_precision="fp32")
    pictures = [
        np.asarray(drawn.image, dtype=np.int32)
        for model, strength in ((sdxl_runs.base, 1.0), (whole, 0.0), (sdxl_runs.base, 0.0))
        for drawn in api.draw(
            model, [end.lora_file], prompts=["a"], seeds=[1], strengths=[strength], settings=settings,
            device="cpu",
        )
    ]  # fmt: skip
    with_file, in_model, without = pictures
    assert abs(with_file - in_model).max() <= 1
    assert abs(with_file - without).max() > 8
    found = whole.state_dicts["text_encoder_2"]
    own = sdxl_runs.base.state_dicts["text_encoder_2"]
    tensors = api.lora_tensors(end.lora_file)
    for head in "qkv":
        layer = f"encoder_layers_0_self_attn_{head}_proj"
        down, up = (tensors[f"lora_te2_text_model_{layer}.lora_{which}.weight"] for which in ("down", "up"))
        name = f"text_model.encoder.layers.0.self_attn.{head}_proj.weight"
        torch.testing.assert_close(found[name], own[name] + up @ down * 0.5)


def test_a_lora_is_merged_into_the_modules_that_it_was_trained_on(sdxl_runs: runs.Training) -> None:
    """What `loragraft sample` draws is what the run's own samples draw with."""
    end = sdxl_runs.finish(max_train_steps=2, learning_rate=0.1, save_precision="fp32")
    common: Any = {"steps": 2, "size": (32, 32), "cfg": 3.0, "mixed_precision": "fp32"}
    attached, without = (
        np.asarray(drawn.image, dtype=np.int32)
        for strength in (1.0, 0.0)
        for drawn in api.draw(
            sdxl_runs.base, [end.lora_file], prompts=["a"], seeds=[1], strengths=[strength],
            settings=api.DrawSettings(**common), device="cpu",
        )
    )  # fmt: skip
    (merged,) = api.draw_images(
        sdxl_runs.base, ["a"], [1], api.SampleSettings(**common), loras=[(end.lora_file, 1.0)], device="cpu"
    )
    assert abs(np.asarray(merged.image, dtype=np.int32) - attached).max() <= 1
    assert abs(attached - without).max() > 8
