"""How long captions are: what is cut is said before step 1, and padding that is hidden takes no places."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer.families.base import Reading
from loragraft.trainer.inputs import reading_of
from loragraft.trainer.inputs.lengths import cut_line, fitted
from loragraft.trainer.metadata import run_hash
from loragraft.trainer.usual import for_base
from loragraft_tests.trainer import dit_checks, runs, tiny, tiny_families

# Families that do not see padding, or one place of it -> settings, and the places that their captions have.
HIDDEN: dict[str, tuple[dict[str, Any], int]] = {
    "chroma": ({}, 512),
    "qwen_image": ({}, 512),
    "z_image": ({}, 512),
    "lumina2": ({"t5xxl_max_token_length": 512}, 512),  # a letter is a token here, and it is told what it is
    "flux": ({"apply_t5_attn_mask": True}, 512),
}
NEEDED = {"lumina2": 256}  # else 64
SEEN = ("flux", "flux_schnell", "sd3", "sd35_large", "sd35_medium", "flux2")
QUICK = ("qwen_image", "z_image")
CAPTIONS = ("zibu, blue", "a zibu in the snow, blue and white", "")
TOLERANCE = 1e-5  # of float32, relative


def quickly(names: Any) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def opened(name: str, folder: Path) -> api.Base:
    return tiny_families.open_tiny(name, folder / name)


def reading(base: api.Base, **settings: Any) -> Reading:
    config, _ = for_base(api.make(api.TrainConfig, settings), base)
    return reading_of(config)


def data(folder: Path, *captions: str, **settings: Any) -> api.TrainSet:
    """Return noise images with these captions, of a size that every family can have."""
    tiny.write_images(folder / "1_zibu", [(64, 64)] * len(captions))
    for file, caption in zip(sorted((folder / "1_zibu").glob("*.png")), captions, strict=True):
        file.with_suffix(".txt").write_text(caption)
    sizes = {"resolution": 64, "bucket_reso_steps": 32, "min_bucket_reso": 32, "max_bucket_reso": 128}
    return runs.train_set(folder, **sizes, **settings)


def notes(events: list[Any]) -> list[str]:
    return [event.text for event in events if isinstance(event, api.Note)]


# ---- places that change nothing ----


@pytest.mark.parametrize("name", quickly(HIDDEN))
def test_fewer_places_are_the_same_velocity_and_gradients(name: str, tmp_path: Path) -> None:
    settings, usual = HIDDEN[name]
    base = opened(name, tmp_path)
    parts, whole = base.load(), reading(base, **settings)
    assert whole.t5_length == usual
    short = fitted(base.family, parts, data(tmp_path, *CAPTIONS[:2]), whole)
    needed = NEEDED.get(name, 64)
    assert short == dataclasses.replace(whole, t5_length=needed)
    adapter = dit_checks.with_lora(base, parts)
    generator = torch.Generator().manual_seed(3)
    shape = base.family.latent_shape(parts, 64, 48)
    noisy = torch.randn((len(CAPTIONS), *shape), generator=generator)
    t = torch.tensor([150.0, 500.0, 900.0])
    found = []
    for each in (whole, short):
        for parameter in adapter.parameters("denoiser"):
            parameter.grad = None
        cond = dit_checks.conditioning(base, parts, CAPTIONS, each)
        out = base.family.predict(parts, noisy, t, cond)
        out.square().mean().backward()
        found.append((cond[0].shape[1], out.detach(), [p.grad for p in adapter.parameters("denoiser")]))
    (longest, all_of_it, grads), (fewest, same, same_grads) = found
    assert (longest, fewest) == (usual, needed)
    scale = all_of_it.abs().max()
    assert (all_of_it - same).abs().max() <= TOLERANCE * scale
    for grad, other in zip(grads, same_grads, strict=True):
        assert (grad - other).abs().max() <= 1e-5 * grad.abs().max() + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEN)
def test_padding_that_a_model_sees_stays(name: str, tmp_path: Path) -> None:
    base = opened(name, tmp_path)
    parts, whole = base.load(), reading(base)
    for module in (parts.denoiser, parts.text_encoders):
        module.float()
    assert fitted(base.family, parts, data(tmp_path, *CAPTIONS[:2]), whole) == whole
    noisy = torch.randn(1, *base.family.latent_shape(parts, 64, 64))
    outs = []
    for each in (whole, dataclasses.replace(whole, t5_length=64)):
        cond = dit_checks.conditioning(base, parts, CAPTIONS[:1], each)
        with torch.no_grad():
            outs.append(base.family.predict(parts, noisy, torch.tensor([500.0]), cond))
    assert (outs[0] - outs[1]).abs().max() > 1e-4, "it would be another model's answer"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> api.Base:
    return opened("qwen_image", tmp_path_factory.mktemp("qwen"))


def test_the_longest_caption_decides_in_steps_of_64(qwen: api.Base, tmp_path: Path) -> None:
    parts, whole = qwen.load(), reading(qwen)

    def places(*captions: str, **settings: Any) -> int | None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return fitted(qwen.family, parts, data(folder, *captions, **settings), whole).t5_length

    room = qwen.family.room(parts, [""], whole)
    assert room is not None
    own = room.lengths[0]  # what stands around a caption
    assert places("x") == 64
    assert places("x" * (64 - own)) == 64
    assert places("x", "x" * (65 - own)) == 128
    assert places("x" * 2000) == 512, "no more than the setting says"
    # What varies is drawn anew at each step, so that a longer run would need more.
    assert places("x, y", shuffle_caption=True) == 512
    assert places("x, y", caption_dropout_rate=0.5) == 64


def test_a_run_takes_the_places_that_it_needs_and_says_so(
    qwen: api.Base, tmp_path: Path, places: api.Places
) -> None:
    training = runs.Training(qwen, data(tmp_path / "short", "zibu", "zibu, blue"), places)
    options = {"max_train_steps": 4, "train_batch_size": 1, "lr_scheduler": "constant"}
    events = training.events(**options)
    lines = runs.only(events, api.Planned).lines
    assert any("captions kept once encoded in 64 places each" in line for line in lines)
    assert "t5xxl_max_token_length is 512, as is usual for qwen_image" in lines
    whole = runs.only(events, api.Finished)
    other = training.elsewhere("stopped")
    other.stop_after(2, **options)
    continued = other.finish(**options)
    assert continued.lora_file.read_bytes() == whole.lora_file.read_bytes()

    # A run that goes on with longer captions has the places that these need.
    longer = dataclasses.replace(training, train_set=data(tmp_path / "long", "zibu", "x" * 90))
    folder = whole.run_folder.name
    events = longer.events(**{**options, "max_train_steps": 6}, resume=folder)
    planned = runs.only(events, api.Planned)
    assert planned.first_step == 4 or any("continues run" in line for line in planned.lines)
    assert any("in 128 places each" in line for line in planned.lines)
    assert runs.only(events, api.Finished).step == 6


# ---- what is cut ----


def test_a_caption_that_clip_cuts_is_told_before_step_1(training: runs.Training, tmp_path: Path) -> None:
    cut = data(tmp_path, "short", "word " * 80, "word " * 300)
    events = dataclasses.replace(training, train_set=cut).events(max_train_steps=1)
    first_step = next(i for i, event in enumerate(events) if isinstance(event, api.Step))
    (note,) = notes(events[:first_step])
    name = cut.records[1].name
    assert note.startswith("Warning: 2 of 3 captions are longer than the base model reads")
    assert "of which 75 are read" in note and f"the first is of {name};" in note
    told = notes(dataclasses.replace(training, train_set=data(tmp_path / "x", "short")).events())
    assert not any("longer than" in text for text in told)


def test_what_to_do_goes_as_far_as_the_setting(training: runs.Training, tmp_path: Path) -> None:
    base = training.base
    parts = base.load()

    def line(words: int, **settings: Any) -> str:
        config = api.make(api.TrainConfig, settings)
        folder = tmp_path / f"{words}-{len(settings)}-{config.max_token_length}"
        sets = [data(folder, "blue " * words)]
        return cut_line(base.family, parts, sets, config, reading_of(config)) or ""

    (one,) = base.family.room(parts, ["blue"], Reading()).lengths  # type: ignore[union-attr]
    assert line(75 // one) == ""
    assert "1 of 1 captions is longer" in line(100 // one)
    assert line(100 // one).endswith("set max_token_length to 150, or shorten them")
    assert line(200 // one).endswith("set max_token_length to 225, or shorten them")
    assert line(200 // one, tokenizer_repeats=2).endswith("set tokenizer_repeats to 3, or shorten them")
    assert line(400 // one).endswith("set max_token_length to 225 and shorten the longest")
    assert line(400 // one, max_token_length=225).endswith("; shorten them")


@pytest.mark.parametrize("name", [pytest.param("flux", marks=pytest.mark.slow), "sd35_medium", "qwen_image"])
def test_the_encoder_that_reads_the_most_decides(name: str, tmp_path: Path) -> None:
    """A caption that CLIP cuts beside T5 is as the model learnt it."""
    base = opened(name, tmp_path)
    parts = base.load()
    config, _ = for_base(api.TrainConfig(), base)
    most = config.t5xxl_max_token_length
    assert most is not None

    def line(words: int) -> str | None:
        sets = [data(tmp_path / str(words), "zibu " * words)]
        return cut_line(base.family, parts, sets, config, reading_of(config))

    room = base.family.room(parts, ["zibu " * 60], reading_of(config))
    assert room is not None and room.limit == most
    per_word = room.lengths[0] / 60
    assert line(int(100 / per_word)) is None
    told = line(int(1.2 * most / per_word))
    assert told is not None and f"of which {most} are read" in told and "t5xxl_max_token_length to " in told


@pytest.mark.slow
def test_without_t5_clip_decides(tmp_path: Path) -> None:
    base = opened("sd35_medium", tmp_path)
    alone = dataclasses.replace(
        base,
        state_dicts={part: sd for part, sd in base.state_dicts.items() if part != "text_encoder_3"},
        tokenizer_folders={"clip": base.tokenizer_folders["clip"]},
    )
    config, lines = for_base(api.TrainConfig(), alone)
    assert config.t5xxl_max_token_length is None and not any("t5xxl" in line for line in lines)
    sets = [data(tmp_path / "images", "zibu " * 100)]
    line = cut_line(alone.family, alone.load(), sets, config, reading_of(config))
    assert line is not None and "of which 75 are read" in line


def test_captions_of_validation_count_too(training: runs.Training, tmp_path: Path) -> None:
    whole = data(tmp_path, "short", "short", "word " * 90)
    kept_out = dataclasses.replace(data(tmp_path / "other", "word " * 90))
    sets = dataclasses.replace(whole, validation=kept_out)
    events = dataclasses.replace(training, train_set=sets).events(max_train_steps=1)
    (note,) = [text for text in notes(events) if "longer than" in text]
    assert "2 of 4 captions" in note


# ---- what an open length means ----

LENGTHS = {"flux": 512, "flux_schnell": 256, "chroma": 512, "flux2": 512, "qwen_image": 512}
LENGTHS |= {"z_image": 512, "lumina2": 256, "sd3": 256, "sd35_large": 256, "sd35_medium": 256}


@pytest.mark.parametrize("name", api.FAMILIES)
def test_every_family_says_how_long_captions_are_usually(name: str) -> None:
    family = api.FAMILIES[name]
    assert family.defaults.get("t5xxl_max_token_length") == LENGTHS.get(name)
    assert (name in LENGTHS) == any(kind != "clip" for kind in family.encoders.values())


def test_an_open_length_is_logged_kept_and_hashed(qwen: api.Base, tmp_path: Path, places: api.Places) -> None:
    train_set = data(tmp_path, "zibu")
    ended = runs.Training(qwen, train_set, places).finish(max_train_steps=1)
    assert "t5xxl_max_token_length = 512" in (ended.run_folder / "run.toml").read_text()
    assert '"t5xxl_max_token_length":512' in api.lora_metadata(ended.lora_file)["loragraft_settings"]
    own, _ = for_base(api.TrainConfig(), qwen)
    given, _ = for_base(api.TrainConfig(t5xxl_max_token_length=512), qwen)
    short, _ = for_base(api.TrainConfig(t5xxl_max_token_length=256), qwen)
    first, same, other = (run_hash(qwen, train_set, c, None, "fp32") for c in (own, given, short))
    assert first == same != other


def test_a_base_that_reads_clip_alone_has_no_such_length(training: runs.Training) -> None:
    config, lines = for_base(api.TrainConfig(), training.base)
    assert config == api.TrainConfig() and lines == []
