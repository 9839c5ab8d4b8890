"""Masks, mirrored pictures, regularisation weights and held-out images, from records to the loss."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from loragraft.trainer import api, losses
from loragraft.trainer.data.batches import Batch
from loragraft.trainer.data.cache import TensorCache
from loragraft.trainer.data.train_set import build_train_set
from loragraft.trainer.engine.precision import resolve
from loragraft.trainer.inputs import Inputs
from loragraft_tests.trainer import runs, tiny

CPU = resolve("fp32", torch.device("cpu"))


def with_records(train_set: api.TrainSet, root: Path, **changes: Any) -> api.TrainSet:
    """Return the train set with every record changed."""
    records = tuple(dataclasses.replace(record, **changes) for record in train_set.records)
    return build_train_set(api.Dataset(root, records, ()), train_set.config)


def inputs(base: api.Base, train_set: api.TrainSet, cache: Path) -> Inputs:
    """Return prepared inputs whose text encoder is not trained."""
    parts = base.load()
    for part in (parts.denoiser, parts.text_encoder, parts.vae):
        part.float()
    made = Inputs(base, parts, train_set, runs.settings(), CPU, TensorCache(cache), train_text=False)
    list(made.prepare())
    return made


def mask_file(folder: Path, pixels: np.ndarray[Any, Any]) -> Path:
    path = folder / "mask.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def record_losses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Keep the arguments of every loss that is computed."""
    seen: list[tuple[Any, ...]] = []
    real = losses.diffusion_losses

    def recording(*args: Any) -> torch.Tensor:
        seen.append(args[:4])
        return real(*args)

    monkeypatch.setattr(losses, "diffusion_losses", recording)
    return seen


# ---- masks ----


def test_a_mask_weighs_the_places_of_the_loss(
    training: runs.Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = np.zeros((32, 32))
    left[:, :16] = 255
    mask = mask_file(tmp_path, left)
    masked = with_records(training.train_set, tmp_path, mask=mask, mask_hash=digest_of(mask))
    seen = record_losses(monkeypatch)
    events = dataclasses.replace(training, train_set=masked).events(max_train_steps=2)
    for event, (pred, target, weight, places) in zip(runs.of(events, api.Step), seen, strict=True):
        assert weight is None
        assert places.shape == (len(pred), 1, *pred.shape[2:])
        assert places[..., 0].eq(1).all() and places[..., -1].eq(0).all()
        plain = ((pred - target).square() * places).flatten(1).mean(1).mean()
        assert event.loss == pytest.approx(plain.item())


def test_a_white_mask_changes_nothing_and_a_black_one_teaches_nothing(
    training: runs.Training, tmp_path: Path
) -> None:
    plain = runs.losses(training.elsewhere("plain").events(max_train_steps=2))
    found = {}
    for value in (255, 0):
        folder = tmp_path / str(value)
        folder.mkdir()
        mask = mask_file(folder, np.full((32, 32), value))
        masked = with_records(training.train_set, tmp_path, mask=mask, mask_hash=digest_of(mask))
        found[value] = runs.losses(training.elsewhere(str(value), train_set=masked).events(max_train_steps=2))
    assert found[255] == plain
    assert found[0] == [0.0, 0.0]


# ---- mirrored pictures ----


def test_a_mirrored_use_is_encoded_from_mirrored_pixels(base: api.Base, tmp_path: Path) -> None:
    folder = tiny.write_images(tmp_path / "a" / "1_zibu", [(32, 32)])
    flipping = runs.train_set(tmp_path / "a", flip_aug=True)
    mirrored = tmp_path / "b" / "1_zibu"
    mirrored.mkdir(parents=True)
    Image.open(folder / "image0.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored / "image0.png")
    (mirrored / "image0.txt").write_text("zibu, tag 0, blue", encoding="utf-8")
    ours = inputs(base, flipping, tmp_path / "cache")
    theirs = inputs(base, runs.train_set(tmp_path / "b"), tmp_path / "other")
    batch = {flip: Batch(flipping.buckets[0], (0,), (flip,), (1.0,)) for flip in (False, True)}
    drawn = {flip: ours.draw(0, 0, batch[flip]) for flip in (False, True)}
    assert torch.equal(drawn[True].latents, theirs.draw(0, 0, batch[False]).latents)
    assert torch.equal(drawn[True].noise, drawn[False].noise), "the noise is not mirrored"
    assert not torch.equal(drawn[True].latents, drawn[False].latents)
    assert not torch.allclose(drawn[True].latents, drawn[False].latents.flip(-1)), "a VAE is no mirror"


def test_both_sides_are_encoded_once(training: runs.Training, images: Path) -> None:
    flipping = runs.train_set(images, flip_aug=True)
    events = dataclasses.replace(training, train_set=flipping).events(
        max_train_steps=8, network_train_unet_only=True
    )
    encoded = [e for e in runs.of(events, api.Cached) if e.what == "images"]
    assert (encoded[-1].done, encoded[-1].total) == (8, 8), "four images, and four mirrored"


def test_a_mask_is_mirrored_with_its_picture(base: api.Base, tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "a" / "1_zibu", [(32, 32)])
    rng = np.random.default_rng(0)
    mask = mask_file(tmp_path, rng.integers(0, 256, (32, 32)))
    plain = runs.train_set(tmp_path / "a", flip_aug=True)
    masked = with_records(plain, tmp_path / "a", mask=mask, mask_hash=digest_of(mask))
    made = inputs(base, masked, tmp_path / "cache")
    straight, flipped = (
        made.draw(0, 0, Batch(masked.buckets[0], (0,), (flip,), (1.0,))).mask for flip in (False, True)
    )
    assert straight is not None and flipped is not None
    assert torch.equal(flipped, straight.flip(-1))
    pixels = torch.from_numpy(np.asarray(Image.open(mask), dtype=np.float32) / 255)[None, None]
    assert torch.allclose(straight, F.interpolate(pixels, straight.shape[2:], mode="area"), atol=1e-6)


# ---- regularisation images ----


def test_regularisation_images_count_with_their_weight(
    training: runs.Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = runs.train_set(training.train_set.records[0].path.parents[1], prior_loss_weight=0.25)
    records = [dataclasses.replace(r, is_reg=i % 2 == 1) for i, r in enumerate(plain.records)]
    mixed = build_train_set(api.Dataset(tmp_path, tuple(records), ()), plain.config)
    seen = record_losses(monkeypatch)
    dataclasses.replace(training, train_set=mixed).events(max_train_steps=4)
    weights = torch.cat([weight for _, _, weight, _ in seen])
    assert set(weights.tolist()) == {0.25, 1.0}


def test_regularisation_weights_and_min_snr_multiply(
    training: runs.Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = runs.train_set(training.train_set.records[0].path.parents[1], prior_loss_weight=0.25)
    records = [dataclasses.replace(r, is_reg=i % 2 == 1) for i, r in enumerate(plain.records)]
    mixed = build_train_set(api.Dataset(tmp_path, tuple(records), ()), plain.config)
    here = dataclasses.replace(training, train_set=mixed)
    seen = record_losses(monkeypatch)
    here.elsewhere("reg").events(max_train_steps=3)
    both = here.elsewhere("both").events(max_train_steps=3, min_snr_gamma=0.5)
    half = len(seen) // 2
    for (*_, alone, _), (*_, together, _) in zip(seen[:half], seen[half:], strict=True):
        by_snr = together / alone  # the same seed: the same images, timesteps and noise
        assert (by_snr <= 1).all() and (by_snr > 0).all()
    assert any(
        (together < alone).any()
        for (*_, alone, _), (*_, together, _) in zip(seen[:half], seen[half:], strict=True)
    )
    for event, (pred, target, weight, _) in zip(runs.of(both, api.Step), seen[half:], strict=True):
        each = (pred - target).square().flatten(1).mean(1)
        assert event.loss == pytest.approx((each * weight).mean().item())
