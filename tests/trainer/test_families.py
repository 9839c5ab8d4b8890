"""What every family must do with every network, on tiny models of random weights: the contract."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer.adapters.attach import attach
from loragraft.trainer.adapters.network import remove, set_strength
from loragraft.trainer.families.base import Reading
from loragraft_tests.trainer import runs, tiny, tiny_families
from loragraft_tests.trainer.data_folders import Refusal

# Networks, by the settings that choose them.
NETWORKS: dict[str, dict[str, Any]] = {
    "lora": {},
    "locon": {"algo": "locon", "conv_dim": 2, "conv_alpha": 1},
    "dora": {"dora_wd": True},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": 2},
    "dylora": {"algo": "dylora", "unit": 2},
    "oft": {"algo": "oft"},
    "boft": {"algo": "boft", "network_dim": 256},  # wide blocks, for the odd widths of tiny models
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
    "full": {"algo": "full"},
    "norms": {"train_norm": True},
}
QUICK = ("lora", "lokr", "locon", "ia3")
QUICK_FAMILIES = ("sdxl", "sd35_medium", "flux", "z_image")  # the others' own files have quick tests too
UNETS = ("sd15", "sd2", "sdxl")
WITHOUT_NORMS = ("sd3", "sd35_large", "sd35_medium", "qwen_image")  # whose norms have no weights, or stay
SHORT = {"max_train_steps": 2, "train_batch_size": 2, "lr_scheduler": "constant", "learning_rate": 1e-3}


def quickly(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Return parameters of which all but the ``quick`` ones are left to the longer suite."""
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


@pytest.fixture(scope="module", params=quickly(tiny_families.WEIGHTS, QUICK_FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> api.Base:
    """Return one family's tiny base."""
    return tiny_families.open_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> api.TrainSet:
    """Return three noise images in two buckets, of sizes that every family can have."""
    folder = tmp_path_factory.mktemp("images")
    tiny.write_images(folder / "1_zibu", [(64, 64), (96, 48), (64, 64)])
    return runs.train_set(
        folder, resolution=64, bucket_reso_steps=32, min_bucket_reso=32, max_bucket_reso=128
    )


@pytest.fixture
def training(base: api.Base, data: api.TrainSet, places: api.Places) -> runs.Training:
    """Return runs on the family's base."""
    return runs.Training(base, data, places)


def test_every_family_is_here() -> None:
    assert list(tiny_families.WEIGHTS) == list(api.FAMILIES)


def test_a_file_is_told_from_all_others(base: api.Base) -> None:
    weights = base.family.join(base.state_dicts)
    assert [name for name, family in api.FAMILIES.items() if family.detect(weights)] == [base.family.name]


def test_what_is_joined_is_what_was_split(base: api.Base) -> None:
    weights = base.family.join(base.state_dicts)
    again = base.family.split(weights)
    assert again.keys() == base.state_dicts.keys()
    for part, sd in base.state_dicts.items():
        assert set(again[part]) == set(sd), part
        for name in sd:
            assert torch.equal(again[part][name], sd[name]), (part, name)


@pytest.mark.parametrize("network", quickly(NETWORKS, QUICK))
def test_every_network_learns_and_is_read_again(training: runs.Training, network: str) -> None:
    base, options = training.base, {**SHORT, **NETWORKS[network]}
    if base.family.name not in UNETS and (
        network in ("locon", "ia3") or (network == "norms" and base.family.name in WITHOUT_NORMS)
    ):
        with Refusal("LG-CFG-004"):  # there is nothing of the kind in it
            training.events(**options)
        return
    events = training.events(**options)
    planned, finished = runs.only(events, api.Planned), runs.only(events, api.Finished)
    assert planned.num_modules > 0
    assert all(math.isfinite(loss) for loss in runs.losses(events))
    tensors = api.lora_tensors(finished.lora_file)
    parts = base.load()
    for module in (parts.denoiser, parts.text_encoders):
        module.float()
    before = outputs(base, parts)
    targets = base.family.targets(parts, convolutions=True, preset="everything")
    adapter = attach(parts, tensors, targets)
    assert len(adapter.modules) == planned.num_modules
    after = outputs(base, parts)
    assert (after - before).abs().max() > 1e-7, "the LoRA changes nothing"
    set_strength(adapter, 0.0)
    torch.testing.assert_close(outputs(base, parts), before, rtol=1e-4, atol=1e-5)
    remove(parts, adapter)
    assert torch.equal(outputs(base, parts), before)


def outputs(base: api.Base, parts: api.Parts) -> torch.Tensor:
    """Return what the denoiser makes of fixed noise and a caption."""
    family = base.family
    noise = torch.randn((1, *family.latent_shape(parts, 64, 64)), generator=torch.Generator().manual_seed(7))
    t = torch.tensor([500] if not isinstance(family.objective, api.Flow) else [500.0])
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]) if family.uses_sizes else None
    with torch.no_grad():
        cond = family.encode_text(parts, family.tokenize(parts, ["zibu, blue"], Reading()), Reading())
        found: torch.Tensor = family.predict(parts, noise, t, cond, sizes)
    assert found.shape == noise.shape and bool(torch.isfinite(found).all())
    return found


def test_gradients_reach_every_adapter_and_nothing_else(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From tensors other than 0: where one factor is 0, the other has no gradient."""
    seen: dict[str, Any] = {}

    def look(run: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        own = [(m, name, p) for m in run.adapter.modules for name, p in m.tensors.items()]
        with torch.no_grad():
            for _, _, p in own:
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        (loss,) = run.engine.backward([runs_micro(run)])
        assert math.isfinite(float(loss))
        seen["still"] = [f"{m.target.key}.{name}" for m, name, p in own if p.grad is None or not p.grad.any()]
        mine = {id(p) for _, _, p in own}
        modules = (run.parts.denoiser, run.parts.text_encoders, run.parts.vae)
        others = [p for module in modules for p in module.parameters() if id(p) not in mine]
        seen["others"] = [p.shape for p in others if p.requires_grad or p.grad is not None]

    runs.look_inside(training, monkeypatch, look, engine="eager", **SHORT, **trained_text(training.base))
    assert seen["others"] == []
    # Of an encoder whose last layers are not looked at, these have no gradient; so has what leads nowhere.
    allowed = UNREACHED.get(training.base.family.name, ())
    assert [name for name in seen["still"] if not name.startswith(allowed)] == []


def trained_text(base: api.Base) -> dict[str, Any]:
    """Return the settings that train the text encoders too, where that can be."""
    return {"text_encoder_lr": 1e-3} if base.family.trains_text else {}


# How the names of modules begin that no loss depends on.
UNREACHED: dict[str, tuple[str, ...]] = {
    "sdxl": ("lora_te1_text_model_encoder_layers_2_",),  # captions are read from the layer before
}


def runs_micro(run: Any) -> Any:
    """Return a run's first micro-batch."""
    from loragraft.trainer.engine.steps import Micro

    return Micro(0, run.feed(0)[0].tensors, 1)


def test_a_stopped_run_goes_on_as_if_it_had_not(training: runs.Training) -> None:
    options = {**SHORT, "max_train_steps": 4, "save_every_n_steps": 1, **trained_text(training.base)}
    straight = training.elsewhere("straight").finish(**options)
    training.stop_after(2, **options)
    assert training.finish(**options).lora_file.read_bytes() == straight.lora_file.read_bytes()


def test_kept_captions_train_as_those_encoded_at_each_step(training: runs.Training, tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "1_zibu", [(64, 64), (64, 64)])
    options = {"resolution": 64, "bucket_reso_steps": 32, "min_bucket_reso": 32, "max_bucket_reso": 128}
    varied = runs.train_set(tmp_path, shuffle_caption=True, caption_dropout_rate=0.3, **options)
    here = dataclasses.replace(training, train_set=varied)
    steps = {**SHORT, "max_train_steps": 3, "network_train_unet_only": True, "train_batch_size": 1}
    kept = here.finish(cache_text_encoder_outputs=True, **steps)
    each = here.elsewhere("each").finish(cache_text_encoder_outputs=False, **steps)
    ours, theirs = api.lora_tensors(kept.lora_file), api.lora_tensors(each.lora_file)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def test_a_bucket_of_an_odd_size_is_refused(training: runs.Training, tmp_path: Path) -> None:
    multiple = training.base.family.latent_multiple
    tiny.write_images(tmp_path / "1_zibu", [(72, 72)])
    options = {"resolution": 72, "bucket_reso_steps": 8, "min_bucket_reso": 32, "max_bucket_reso": 128}
    odd = dataclasses.replace(training, train_set=runs.train_set(tmp_path, **options))
    if 72 % multiple == 0:
        assert runs.only(odd.events(**SHORT), api.Finished).step == 2
        return
    with Refusal("LG-CFG-004", "72x72", f"multiples of {multiple}", "bucket_reso_steps"):
        odd.events(**SHORT)


def test_a_sample_of_an_odd_size_is_refused(training: runs.Training) -> None:
    if training.base.family.latent_multiple == 8:
        pytest.skip("sample prompts have sides of whole eights anyway")
    with Refusal("LG-CFG-004", "72x64", "multiples of 16"):
        training.events(sample_prompts=["zibu --w 72 --h 64"], **SHORT)


def test_captions_are_kept_by_default_where_no_encoder_is_trained(training: runs.Training) -> None:
    """An open rate means what is usual for the family."""
    usual = training.base.family.defaults.get("text_encoder_lr")
    if training.base.family.trains_text and usual is None:
        with Refusal("LG-CFG-004", "cache_text_encoder_outputs", "network_train_unet_only"):
            training.events(cache_text_encoder_outputs=True, **SHORT)
    else:
        events = training.events(cache_text_encoder_outputs=True, **SHORT)
        assert any("text_encoder_lr is 0" in line for line in runs.only(events, api.Planned).lines)


def test_samples_are_drawn(training: runs.Training) -> None:
    options: dict[str, Any] = {**SHORT, "max_train_steps": 1}
    options |= {"sample_prompts": ["zibu --w 64 --h 96"], "sample_every_n_steps": 1}
    sampled = runs.of(training.events(sample_steps=2, **options), api.Sampled)
    assert [s.image.size for s in sampled] == [(64, 96)]
    assert len(set(sampled[0].image.getdata())) > 10, "noise in, no noise out"


def test_words_are_trained_where_one_clip_reads_or_refused(training: runs.Training) -> None:
    options = {**SHORT, "train_embeddings": ["zibu"]}
    if set(training.base.family.encoders.values()) == {"clip"} and len(training.base.family.encoders) == 1:
        assert runs.only(training.events(**options), api.Finished).step == 2
        return
    with Refusal("LG-CFG-004", "train_embeddings"):
        training.events(**options)


def test_ranks_of_blocks_are_as_many_as_there_are(training: runs.Training) -> None:
    count = {"sd15": 25, "sd2": 25, "sdxl": 23}.get(training.base.family.name, 0)
    for other in {23, 25} - {count}:
        with Refusal("LG-CFG-004", "block_dims"):
            training.events(block_dims=",".join(["2"] * other), **SHORT)
    if count:
        planned = runs.only(training.events(block_dims=",".join(["2"] * count), **SHORT), api.Planned)
        assert planned.num_modules > 0


def test_blocks_of_other_architectures_are_refused(training: runs.Training) -> None:
    if training.base.family.name in UNETS:
        pytest.skip("a U-Net has them")
    with Refusal("LG-CFG-004", "down_lr_weight"):
        training.events(down_lr_weight="sine", **SHORT)
