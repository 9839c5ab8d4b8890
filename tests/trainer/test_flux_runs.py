"""Training a tiny Flux.1: gradients where they belong, resuming, kept captions, engines, images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loragraft.trainer import api
from loragraft_tests.trainer import runs, tiny, tiny_flux
from loragraft_tests.trainer.tiny_flux import Folders

SHORT = {"t5xxl_max_token_length": 32}
SIZES = {"resolution": 48, "bucket_reso_steps": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return the tiny tokenizers."""
    return tiny_flux.write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def flux(folders: Folders) -> api.Base:
    """Return the opened tiny dev."""
    return api.open_base_from_weights(
        tiny_flux.single_file_weights(), name="tiny", tokenizers=folders.by_kind
    )


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of four noise images."""
    root = tmp_path_factory.mktemp("images")
    tiny.write_images(root / "1_zibu", [(48, 48), (64, 32), (32, 64), (48, 48)])
    return root


@pytest.fixture(scope="module")
def flux_set(flux_folder: Path) -> Any:
    """Return the images in buckets of whole patches."""
    return runs.train_set(flux_folder, **SIZES)


@pytest.fixture
def training(flux: api.Base, flux_set: Any, places: api.Places) -> runs.Training:
    """Return runs on the tiny dev, in fresh folders."""
    return runs.Training(flux, flux_set, places)


def saved(finished: api.Finished) -> dict[str, torch.Tensor]:
    """Return the LoRA that a run wrote."""
    return load_file(finished.lora_file)


def test_a_run_trains_every_module_and_stays_within_reason(training: runs.Training) -> None:
    events = training.events(**SHORT)
    losses = runs.losses(events)
    assert len(losses) == 4
    assert all(0 < loss < 100 for loss in losses)
    lora = saved(runs.only(events, api.Finished))
    ups = {k: v for k, v in lora.items() if k.endswith("lora_up.weight")}
    assert len(ups) == 26
    assert all(k.startswith(("lora_unet_double_blocks_", "lora_unet_single_blocks_")) for k in ups)
    idle = [k for k, v in ups.items() if not v.any()]
    assert idle == []


def test_resuming_gives_the_same_bytes(training: runs.Training) -> None:
    whole = saved(training.finish(**SHORT))
    other = training.elsewhere("stopped")
    other.stop_after(2, **SHORT)
    again = saved(other.finish(**SHORT))
    assert sorted(whole) == sorted(again)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_kept_captions_train_the_same(training: runs.Training, flux_folder: Path) -> None:
    """Captions that vary are encoded at each step, or all that will come before the first one."""
    shuffled = runs.train_set(flux_folder, **SIZES, shuffle_caption=True)
    rates = {**SHORT, "text_encoder_lr": 0.0}
    found = {}
    for kept in (False, True):
        run = training.elsewhere(f"kept {kept}", train_set=shuffled)
        events = run.events(**rates, cache_text_encoder_outputs=kept)
        encoded = [e for e in runs.of(events, api.Cached) if e.what == "captions"]
        assert bool(encoded) == kept
        found[kept] = saved(runs.only(events, api.Finished))
    assert all(torch.equal(v, found[False][k]) for k, v in found[True].items())


@pytest.mark.parametrize(
    "changes",
    [{"engine": "fused"}, {"gradient_checkpointing": True}, {"apply_t5_attn_mask": True}],
    ids=lambda c: next(iter(c)),
)
def test_other_ways_to_compute_a_step(training: runs.Training, changes: dict[str, Any]) -> None:
    plain = runs.losses(training.events(**SHORT, engine="eager"))
    found = runs.losses(training.elsewhere("other").events(**{**SHORT, "engine": "eager", **changes}))
    if "apply_t5_attn_mask" in changes:
        assert all(abs(a - b) > 1e-7 for a, b in zip(plain, found, strict=True))
    else:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-5, atol=1e-6)


def test_text_encoders_are_trained_where_a_rate_asks_for_it(training: runs.Training) -> None:
    lora = saved(training.finish(**SHORT, text_encoder_lr=1e-3))
    kinds = {k.split("_")[1] for k in lora}
    assert kinds == {"unet", "te1"}
    lora = saved(training.elsewhere("t5").finish(**SHORT, text_encoder_lr=1e-3, text_encoder_2_lr=1e-3))
    kinds = {k.split("_")[1] for k in lora}
    assert kinds == {"unet", "te1", "te3"}
    moved = {k.split("_")[1] for k, v in lora.items() if k.endswith("lora_up.weight") and v.any()}
    assert moved == kinds


def test_samples_are_drawn(training: runs.Training) -> None:
    prompts = ["zibu --w 80 --h 64"]
    events = training.events(
        **SHORT, max_train_steps=1, sample_prompts=prompts, sample_every_n_steps=1, sample_steps=2
    )
    (drawn,) = runs.of(events, api.Sampled)
    from PIL import Image

    assert Image.open(drawn.path).size == (80, 64)


def test_a_file_tells_what_it_was_trained_on_and_how(training: runs.Training) -> None:
    finished = training.finish(**SHORT, max_train_steps=1)
    with safe_open(finished.lora_file, framework="pt") as file:
        told = file.metadata()
    expected = {
        "modelspec.architecture": "flux-1-dev/lora",
        "ss_base_model_version": "flux1",
        "ss_timestep_sampling": "shift",
        "ss_discrete_flow_shift": "3.1582",
        "ss_guidance_scale": "1.0",
        "ss_model_prediction_type": "raw",
        "ss_apply_t5_attn_mask": "False",
    }
    assert {name: told.get(name) for name in expected} == expected
    assert "modelspec.prediction_type" not in told


def test_normalisation_and_outer_layers_are_trained_by_the_preset_everything(training: runs.Training) -> None:
    lora = saved(training.finish(**SHORT, preset="everything", text_encoder_lr=0.0))
    norms = {k: v for k, v in lora.items() if k.endswith(".w_norm")}
    assert len(norms) == 2 * 4 + 2 * 2
    assert all(v.any() for v in norms.values())
    assert "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight" in lora
