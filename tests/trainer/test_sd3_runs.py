"""Training a tiny SD3.5: gradients where they belong, resuming, kept captions, engines, images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from loragraft.trainer import api
from loragraft_tests.trainer import runs, tiny, tiny_sd3
from loragraft_tests.trainer.data_folders import Refusal

SHORT = {"t5xxl_max_token_length": 32}
# 12 a block and 7 in the last, whose text ends with its attention.
NUM_LAYERS = {"unet": 19, "te1": 6 * tiny_sd3.LAYERS, "te2": 6 * tiny_sd3.LAYERS}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the tiny tokenizers' folders."""
    return tiny_sd3.write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def opened(tokenizers: Mapping[str, Path], *without: str, version: str = "sd35_medium") -> api.Base:
    """Open the tiny base, if wanted without some of its text encoders."""
    modules = tiny_sd3.random_modules(version)
    weights = tiny_sd3.single_file_weights({k: v for k, v in modules.items() if k not in without})
    return api.open_base_from_weights(weights, name="tiny", tokenizers=tokenizers)


@pytest.fixture(scope="module")
def sd3(tokenizers: dict[str, Path]) -> api.Base:
    """Return the opened tiny SD3.5 medium."""
    return opened(tokenizers)


@pytest.fixture(scope="module")
def sd3_set(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return four noise images in buckets of whole patches."""
    root = tmp_path_factory.mktemp("images")
    tiny.write_images(root / "1_zibu", [(48, 48), (64, 32), (32, 64), (48, 48)])
    return runs.train_set(root, resolution=48, bucket_reso_steps=16)


@pytest.fixture
def training(sd3: api.Base, sd3_set: Any, places: api.Places) -> runs.Training:
    """Return runs on the tiny base, in fresh folders."""
    return runs.Training(sd3, sd3_set, places)


def saved(finished: api.Finished) -> dict[str, torch.Tensor]:
    """Return the LoRA that a run wrote."""
    return load_file(finished.lora_file)


def trained(lora: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return how many layers of each part have moved."""
    moved = [k.split("_")[1] for k, v in lora.items() if k.endswith("lora_up.weight") and v.any()]
    return {part: moved.count(part) for part in dict.fromkeys(moved)}


def test_a_run_trains_both_clips_and_every_layer(training: runs.Training) -> None:
    events = training.events(**SHORT)
    losses = runs.losses(events)
    assert len(losses) == 4
    assert all(0 < loss < 100 for loss in losses)
    lora = saved(runs.only(events, api.Finished))
    ups = [k for k in lora if k.endswith("lora_up.weight")]
    moved = trained(lora)
    # the pooled state, behind all layers of a CLIP, reaches every one of them
    assert moved == NUM_LAYERS
    assert len(ups) == sum(NUM_LAYERS.values())
    assert ups[0].startswith("lora_te1_text_model_encoder_layers_0_")


def test_only_the_adapters_get_gradients(training: runs.Training, sd3: api.Base) -> None:
    before = {part: {k: v.clone() for k, v in sd.items()} for part, sd in sd3.state_dicts.items()}
    training.finish(**SHORT, text_encoder_3_lr=1e-3)
    for part, sd in sd3.state_dicts.items():
        assert all(torch.equal(sd[k], v) and not sd[k].requires_grad for k, v in before[part].items())


def test_t5_is_trained_where_its_rate_asks_for_it(training: runs.Training) -> None:
    lora = saved(training.finish(**SHORT, text_encoder_3_lr=1e-3))
    assert trained(lora) == {**NUM_LAYERS, "te3": 2 * 7}
    lora = saved(training.elsewhere("denoiser").finish(**SHORT, network_train_unet_only=True))
    assert trained(lora) == {"unet": NUM_LAYERS["unet"]}


def test_resuming_gives_the_same_bytes(training: runs.Training) -> None:
    options = {**SHORT, "timestep_sampling": "logit_normal", "weighting_scheme": "cosmap"}
    whole = saved(training.finish(**options))
    other = training.elsewhere("stopped")
    other.stop_after(2, **options)
    again = saved(other.finish(**options))
    assert sorted(whole) == sorted(again)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_kept_captions_and_latents_train_the_same(training: runs.Training) -> None:
    options = {**SHORT, "network_train_unet_only": True}
    kept = saved(training.finish(**options, cache_text_encoder_outputs=True))
    encoded = saved(
        training.elsewhere("each").finish(**options, cache_text_encoder_outputs=False, cache_latents=False)
    )
    assert sorted(kept) == sorted(encoded)
    assert all(torch.equal(v, encoded[k]) for k, v in kept.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": "fused"},
        {"gradient_checkpointing": True},
        {"model_prediction_type": "raw"},
        pytest.param({"attention": "plain"}, marks=pytest.mark.slow),
        pytest.param({"apply_t5_attn_mask": True}, marks=pytest.mark.slow),
    ],
    ids=lambda c: next(iter(c)),
)
def test_other_ways_to_compute_a_step(training: runs.Training, changes: dict[str, Any]) -> None:
    plain = runs.losses(training.events(**SHORT, engine="eager"))
    found = runs.losses(training.elsewhere("other").events(**{**SHORT, "engine": "eager", **changes}))
    if {"apply_t5_attn_mask", "model_prediction_type"} & set(changes):
        assert all(abs(a - b) > 1e-7 for a, b in zip(plain, found, strict=True))
    else:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_trains_too(
    precision: str, sd3_set: Any, tokenizers: dict[str, Path], tmp_path: Path, places: api.Places
) -> None:
    """On a file in fp16; its scales of queries and keys come into the arithmetic's dtype."""
    file = tiny_sd3.write_checkpoint(tmp_path / "tiny.safetensors", "sd35_medium")
    base = api.open_base(file, tokenizer=[tokenizers["clip"], tokenizers["t5"]])
    run = runs.Training(base, sd3_set, places)
    exact = runs.losses(run.events(**SHORT))
    found = runs.losses(run.elsewhere("half").events(**SHORT, mixed_precision=precision))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(exact), rtol=0.02, atol=0.0)


def test_a_folder_is_the_same_base(tmp_path: Path, sd3: api.Base) -> None:
    folder = api.open_base(tiny_sd3.write_folder(tmp_path / "base", "sd35_medium"))
    assert folder.family is sd3.family
    assert folder.weights_hash == sd3.weights_hash
    kinds = {"clip": tmp_path / "base" / "tokenizer", "t5": tmp_path / "base" / "tokenizer_3"}
    assert folder.tokenizer_folders == {kind: str(path) for kind, path in kinds.items()}


@pytest.mark.parametrize(
    ("without", "parts"),
    [
        (("text_encoder_3",), {"unet", "te1", "te2"}),
        pytest.param(("text_encoder",), {"unet", "te2"}, marks=pytest.mark.slow),
        pytest.param(("text_encoder_2", "text_encoder_3"), {"unet", "te1"}, marks=pytest.mark.slow),
        (("text_encoder", "text_encoder_2"), {"unet"}),
    ],
)
def test_bases_that_lack_text_encoders(
    without: tuple[str, ...],
    parts: set[str],
    tokenizers: dict[str, Path],
    sd3_set: Any,
    places: api.Places,
) -> None:
    base, options = opened(tokenizers, *without, version="sd3"), {**SHORT, "max_train_steps": 2}
    training = runs.Training(base, sd3_set, places)
    if "text_encoder_3" in without:
        with Refusal("LG-CFG-004", "t5xxl_max_token_length"):  # there is no T5 that it could be about
            training.finish(**options)
        del options["t5xxl_max_token_length"]
    lora = saved(training.finish(**options))
    assert set(trained(lora)) == parts


def test_images_beyond_the_models_positions_are_refused(
    sd3: api.Base, tmp_path: Path, places: api.Places
) -> None:
    tiny.write_images(tmp_path / "1_zibu", [(320, 64)])
    train_set = runs.train_set(
        tmp_path, resolution=144, max_bucket_reso=512, bucket_reso_steps=16, bucket_no_upscale=False
    )
    with Refusal("LG-CFG-004", "256"):
        runs.Training(sd3, train_set, places).finish(**SHORT)
    assert not list(places.loras.glob("*.safetensors"))


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_skip": 2},
        {"weighted_captions": True},
        {"train_embeddings": ["zibu"]},
        {"conv_dim": 4},
        {"train_norm": True},
        {"v_parameterization": True},
    ],
    ids=lambda c: next(iter(c)),
)
def test_settings_without_a_meaning_here_are_refused(
    changes: dict[str, Any], training: runs.Training
) -> None:
    with Refusal("LG-CFG-004", next(iter(changes))):
        training.finish(**SHORT, **changes)


def test_samples_are_drawn(training: runs.Training) -> None:
    options = {"sample_prompts": ["zibu --w 96 --h 64"], "sample_every_n_steps": 1, "sample_steps": 2}
    events = training.events(**SHORT, max_train_steps=1, **options)
    (drawn,) = runs.of(events, api.Sampled)
    assert Image.open(drawn.path).size == (96, 64)
