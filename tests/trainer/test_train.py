"""Training: the same numbers as a plain loop, and refusals, names and stops that lose nothing."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import random
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from loragraft.trainer import api, loop
from loragraft.trainer.data.batches import plan_epoch
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.families.sd15 import SD15
from loragraft.trainer.inputs import Inputs
from loragraft.trainer.objective import generator
from loragraft_tests.trainer import runs, tiny
from loragraft_tests.trainer.data_folders import Refusal


@pytest.fixture
def training(base: api.Base, train_set: api.TrainSet, places: api.Places) -> runs.Training:
    """Return runs on the shared base and images, in fresh folders."""
    return runs.Training(base, train_set, places)


def elsewhere(training: runs.Training, name: str, **changes: Any) -> runs.Training:
    """Return the same runs in other folders."""
    root = training.places.runs.parent / name
    return dataclasses.replace(
        training, places=api.Places(root / "runs", root / "loras", root / "cache"), **changes
    )


def losses(events: list[api.Event]) -> list[float]:
    """Return the loss of every step."""
    return [event.loss for event in runs.of(events, api.Step)]


# ---- the same as a plain loop ----


def plain_losses(
    train_set: api.TrainSet, *, steps: int, accumulation: int, gamma: float | None, clip_skip: int
) -> tuple[list[float], list[float]]:
    """Train with diffusers' and torch's own parts alone; return losses and gradient norms."""
    unet, vae, text = (m.half().float().requires_grad_(False) for m in tiny.random_modules())
    layers: list[tuple[str, nn.Module, str]] = []
    for name, module in text.named_modules():
        if isinstance(module, nn.Linear):
            layers.append(("lora_te_text_model_" + name.removeprefix("text_model."), module, "text"))
    for name, module in unet.named_modules():
        inside = ".attentions." in name
        if inside and (isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d)):
            layers.append(("lora_unet_" + name, module, "unet"))
    groups: dict[str, list[nn.Parameter]] = {"text": [], "unet": []}
    for name, module, group in layers:
        fan_in, fan_out = module.weight.shape[1], module.weight.shape[0]
        start = torch.rand(
            (4, *module.weight.shape[1:]), generator=generator(42, "init", name.replace(".", "_"))
        )
        down = nn.Parameter((start * 2 - 1) / fan_in**0.5)
        up = nn.Parameter(torch.zeros(fan_out, 4, *module.weight.shape[2:]))
        groups[group] += [down, up]

        def hook(m: nn.Module, args: Any, out: torch.Tensor, down: Any = down, up: Any = up) -> torch.Tensor:
            f = nn.functional.conv2d if isinstance(m, nn.Conv2d) else nn.functional.linear
            return out + 0.5 * f(f(args[0], down), up)

        module.register_forward_hook(hook)
    optimizer = torch.optim.AdamW([{"params": groups["text"]}, {"params": groups["unet"]}], foreach=False)
    tokenize = tiny_tokenize()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = torch.cumprod(1 - betas, 0)
    found, norms = [], []
    for step in range(steps):
        batches = [b for e in range(steps) for b in epoch_parts(train_set, e, accumulation)][step]
        rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.1 * rate, rate
        total, sample = 0.0, 0
        for batch in batches:
            latents, noises, times, captions = [], [], [], []
            for index in batch.indices:
                record = train_set.records[index]
                pixels = np.asarray(Image.open(record.path).convert("RGB"), dtype=np.float32)
                posterior = vae.encode(torch.tensor(pixels / 127.5 - 1).permute(2, 0, 1)[None]).latent_dist
                shape = posterior.mean.shape
                draw = torch.randn(shape, generator=generator(42, step, sample, "posterior"))
                latents.append((posterior.mean + posterior.std * draw) * 0.18215)
                noises.append(torch.randn(shape, generator=generator(42, step, sample, "noise")))
                times.append(torch.randint(0, 1000, (1,), generator=generator(42, step, sample, "t")))
                captions.append(record.caption)
                sample += 1
            x, noise, t = torch.cat(latents), torch.cat(noises), torch.cat(times)
            a = signal[t].view(-1, 1, 1, 1)
            out = text(tokenize(captions), output_hidden_states=True)
            norm = getattr(text, "text_model", text).final_layer_norm
            cond = out.last_hidden_state if clip_skip == 1 else norm(out.hidden_states[-clip_skip])
            pred = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, encoder_hidden_states=cond).sample
            each = (pred - noise).square().flatten(1).mean(1)
            if gamma is not None:
                snr = signal[t] / (1 - signal[t])
                each = each * torch.minimum(snr, torch.tensor(gamma)) / snr
            loss = each.mean()
            total += loss.item() / len(batches)
            (loss / len(batches)).backward()
        norms.append(nn.utils.clip_grad_norm_(groups["text"] + groups["unet"], 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found, norms


def epoch_parts(train_set: api.TrainSet, epoch: int, accumulation: int) -> list[Any]:
    """Return the epoch's batches, as many to a step as are accumulated."""
    plan = plan_epoch(train_set, 3, 42, epoch)
    return [plan[i : i + accumulation] for i in range(0, len(plan), accumulation)]


def tiny_tokenize() -> Callable[[list[str]], torch.Tensor]:
    """Return the tiny tokenizer, written without a tokenizer: a token a letter, </w> at a word's end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    number = {chr(c): i for i, c in enumerate(printable)}

    def ids(caption: str) -> list[int]:
        body: list[int] = []
        for word in caption.replace(",", " , ").split():
            for piece in [word] if word.isalpha() else list(word):
                body += [number[c] for c in piece[:-1]] + [number[piece[-1]] + 256]
        return ([512, *body, 513] + [513] * 77)[:77]

    return lambda captions: torch.tensor([ids(c) for c in captions])


@pytest.mark.parametrize(
    ("accumulation", "gamma", "clip_skip"), [(1, None, 1), (3, 5.0, 2)], ids=["plain", "accumulated"]
)
def test_losses_equal_a_plain_loop(
    training: runs.Training, accumulation: int, gamma: float | None, clip_skip: int
) -> None:
    steps = 8
    events = training.events(
        max_train_steps=steps,
        gradient_accumulation_steps=accumulation,
        min_snr_gamma=gamma,
        clip_skip=clip_skip,
        text_encoder_lr=1e-4,
        mixed_precision="fp32",
    )
    expected, norms = plain_losses(
        training.train_set, steps=steps, accumulation=accumulation, gamma=gamma, clip_skip=clip_skip
    )
    assert losses(events) == pytest.approx(expected, rel=1e-6)
    assert [e.grad_norm for e in runs.of(events, api.Step)] == pytest.approx(norms, rel=1e-4)
    assert len({round(v, 4) for v in expected}) == steps


def test_average_loss_is_the_references(training: runs.Training) -> None:
    """Its recorder keeps a loss for each place of the epoch and replaces it one epoch later."""
    events = training.events(max_train_steps=11)
    kept: dict[int, float] = {}
    per_epoch = runs.only(events, api.Planned).batches_per_epoch
    assert per_epoch == 4
    for event in runs.of(events, api.Step):
        kept[(event.step - 1) % per_epoch] = event.loss
        assert event.avr_loss == pytest.approx(sum(kept.values()) / len(kept), rel=1e-12)


def test_average_loss_with_accumulation_counts_micro_batches(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    micro: list[float] = []
    real = loop.diffusion_loss

    def recording(*args: Any) -> torch.Tensor:
        loss = real(*args)
        micro.append(loss.item())
        return loss

    monkeypatch.setattr(loop, "diffusion_loss", recording)
    events = training.events(max_train_steps=5, gradient_accumulation_steps=3)
    taken = 0
    for event, size in zip(runs.of(events, api.Step), (3, 1, 3, 1, 3), strict=True):
        assert event.loss == pytest.approx(sum(micro[taken : taken + size]) / size)
        taken += size
        places = {i % 4: loss for i, loss in enumerate(micro[:taken])}
        assert event.avr_loss == pytest.approx(sum(places.values()) / len(places))
        assert event.epoch == (taken + 3) // 4
    assert taken == len(micro)


# ---- events ----


def test_events_come_in_order_and_say_what_happened(training: runs.Training) -> None:
    options = {
        "max_train_steps": 6,
        "save_every_n_steps": 4,
        "sample_prompts": ["zibu", "blue zibu"],
        "preview_image": True,
        "network_train_unet_only": True,
    }
    events = training.events(**options)
    kinds = [type(e).__name__ for e in events]
    assert kinds == (
        ["Planned"] + ["Cached"] * 8 + ["Step"] * 4 + ["Saved", "Sampled", "Sampled"]
        + ["Step"] * 2 + ["Saved", "Sampled", "Sampled"] + ["Sampled", "Finished"]
    )  # fmt: skip
    planned, finished = runs.only(events, api.Planned), runs.only(events, api.Finished)
    assert (planned.total_steps, planned.first_step, planned.num_epochs) == (6, 0, 2)
    assert planned.num_modules == 72
    assert any("4 images, 8 with repeats" in line and "6 steps in 2 epochs" in line for line in planned.lines)
    assert any("72 denoiser and 0 text encoder modules" in line for line in planned.lines)
    assert [(e.step, e.epoch, e.total_steps) for e in runs.of(events, api.Step)] == [
        (i, 1 + (i > 4), 6) for i in range(1, 7)
    ]
    saved = runs.of(events, api.Saved)
    assert [(s.step, s.num_tensors) for s in saved] == [(4, 216), (6, 216)]
    assert finished.checkpoints == tuple(s.lora_file for s in saved)
    assert finished.step == 6
    assert finished.losses == pytest.approx(tuple(losses(events)), rel=1e-7)
    assert finished.trigger_words == "zibu"
    assert not finished.reused
    for sample in runs.of(events, api.Sampled):
        assert np.array_equal(np.asarray(Image.open(sample.path)), np.asarray(sample.image))
    assert finished.lora_file == training.places.loras / "x.safetensors"
    beside = {p.name for p in training.places.loras.iterdir()}
    assert beside == {"x.safetensors", "x.txt", "x.preview.png"}
    assert (training.places.loras / "x.txt").read_text("utf-8") == "zibu\n"
    logged = [
        json.loads(line) for line in (finished.run_folder / "log.jsonl").read_text("utf-8").splitlines()
    ]
    assert [entry["loss"] for entry in logged] == losses(events)
    text = (finished.run_folder / "log.log").read_text("utf-8")
    assert "step 6/6 loss" in text and "0 of 216 tensors zero" in text


def test_learning_rates_are_reported_by_part(training: runs.Training) -> None:
    events = training.events(unet_lr=2e-3, text_encoder_lr=1e-4, lr_scheduler="linear", max_train_steps=2)
    assert [e.learning_rates for e in runs.of(events, api.Step)] == [
        {"denoiser": 2e-3, "text_encoder": 1e-4},
        {"denoiser": 1e-3, "text_encoder": 5e-5},
    ]


def test_epochs_decide_the_steps(training: runs.Training) -> None:
    events = training.events(
        max_train_epochs=2, gradient_accumulation_steps=3, max_train_steps=999, save_every_n_epochs=1
    )
    assert runs.only(events, api.Planned).total_steps == 4
    assert [s.step for s in runs.of(events, api.Saved)] == [2, 4]


def test_tensorboard_gets_the_figures_where_it_is_installed(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loragraft.trainer import runlog

    written: list[tuple[str, float, int]] = []

    class Board:
        def add_scalar(self, *args: Any) -> None:
            written.append(args)

        def close(self) -> None:
            written.append(("closed", 0, 0))

    monkeypatch.setattr(runlog, "_tensorboard", lambda folder, first_step: Board())
    events = training.events(max_train_steps=1)
    step = runs.of(events, api.Step)[0]
    assert ("loss/current", step.loss, 1) in written
    assert ("loss/average", step.avr_loss, 1) in written
    assert ("lr/denoiser", 1e-3, 1) in written
    assert written[-1][0] == "closed"


# ---- what is trained ----


@pytest.mark.parametrize(
    ("options", "denoiser", "text_encoder"),
    [
        ({}, 72, 12),
        ({"network_train_unet_only": True}, 72, 0),
        ({"text_encoder_lr": 0.0}, 72, 0),
        ({"unet_lr": 0.0}, 0, 12),
        ({"conv_dim": 2}, 117, 12),
    ],
)
def test_the_parts_that_are_trained(
    training: runs.Training, options: dict[str, Any], denoiser: int, text_encoder: int
) -> None:
    finished = training.finish(max_train_steps=1, **options)
    tensors = api.lora_tensors(finished.lora_file)
    names = {k.rsplit(".lora_", 1)[0] for k in tensors if k.endswith("lora_up.weight")}
    assert len([n for n in names if n.startswith("lora_unet_")]) == denoiser
    assert len([n for n in names if n.startswith("lora_te_")]) == text_encoder
    assert all(v.any() for v in tensors.values()), "after one step every tensor has moved"
    assert {v.dtype for v in tensors.values()} == {torch.float16}


@pytest.mark.parametrize("save", ["fp16", "bf16", "fp32"])
def test_the_file_has_the_wished_number_format(training: runs.Training, save: str) -> None:
    finished = training.finish(max_train_steps=1, save_precision=save)
    wished = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[save]
    assert {v.dtype for v in api.lora_tensors(finished.lora_file).values()} == {wished}


def test_half_precision_runs_are_finite_and_near_full_precision(training: runs.Training) -> None:
    full = losses(training.events(max_train_steps=3))
    for precision in ("bf16", "fp16"):
        events = elsewhere(training, precision).events(max_train_steps=3, mixed_precision=precision)
        assert losses(events) == pytest.approx(full, rel=0.02)
        tensors = api.lora_tensors(runs.only(events, api.Finished).lora_file)
        assert all(bool(torch.isfinite(v).all()) and bool(v.any()) for v in tensors.values())


def test_auto_is_full_precision_on_a_cpu(training: runs.Training) -> None:
    assert losses(training.events(mixed_precision="auto", max_train_steps=2)) == losses(
        elsewhere(training, "fp32").events(mixed_precision="fp32", max_train_steps=2)
    )


def test_gradient_checkpointing_changes_no_number(training: runs.Training) -> None:
    plain = training.finish(max_train_steps=3)
    saving = elsewhere(training, "saving").finish(max_train_steps=3, gradient_checkpointing=True)
    ours, theirs = (api.lora_tensors(f.lora_file) for f in (plain, saving))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


# ---- caches ----


def test_cached_latents_change_no_byte(training: runs.Training) -> None:
    cached = training.finish(max_train_steps=5)
    warm = elsewhere(training, "warm")
    shutil.copytree(training.places.cache, warm.places.cache)
    hits = runs.of(warm.events(max_train_steps=5), api.Cached)[-1]
    assert (hits.hits, hits.total) == (4, 4)
    fresh = elsewhere(training, "fresh").finish(max_train_steps=5, cache_latents=False)
    files = [f.lora_file for f in (cached, fresh)] + [warm.places.loras / "x.safetensors"]
    tensors = [api.lora_tensors(f) for f in files]
    for other in tensors[1:]:
        assert all(torch.equal(v, other[k]) for k, v in tensors[0].items())


def test_a_damaged_cache_is_made_anew_with_a_note(training: runs.Training) -> None:
    first = training.finish(max_train_steps=1)
    entry = next(training.places.cache.rglob("*.safetensors"))
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1
    entry.write_bytes(data)
    other = elsewhere(training, "other")
    shutil.copytree(training.places.cache, other.places.cache)
    events = other.events(max_train_steps=1)
    assert any("damaged" in note.text for note in runs.of(events, api.Note))
    assert runs.only(events, api.Finished).lora_file.read_bytes() == first.lora_file.read_bytes()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_kept_captions_equal_captions_encoded_at_each_step(
    training: runs.Training, images: Path, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = dataclasses.replace(training, train_set=runs.train_set(images, caption_dropout_rate=dropout))
    options = {"network_train_unet_only": True, "max_train_steps": 6}
    kept = once.events(**options)
    names = {e.what for e in runs.of(kept, api.Cached)}
    assert names == {"images", "captions"}
    assert any("captions kept once encoded" in line for line in runs.only(kept, api.Planned).lines)
    real = Inputs.__init__

    def forgetful(self: Inputs, *args: Any) -> None:
        real(self, *args)
        self.keeps_text = False

    monkeypatch.setattr(Inputs, "__init__", forgetful)
    each = elsewhere(once, "each").events(**options)
    assert losses(each) == pytest.approx(losses(kept), rel=1e-6)


def test_caption_dropout_draws_empty_captions(
    training: runs.Training, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = Inputs.cond

    def watching(self: Inputs, captions: tuple[str, ...]) -> torch.Tensor:
        seen.extend(captions)
        return real(self, captions)

    monkeypatch.setattr(Inputs, "cond", watching)
    varied = runs.train_set(images, caption_dropout_rate=0.4, shuffle_caption=True, keep_tokens=1)
    events = dataclasses.replace(training, train_set=varied).events(max_train_steps=8)
    assert {e.what for e in runs.of(events, api.Cached)} == {"images"}
    assert 0.2 < seen.count("") / len(seen) < 0.6
    assert all(c == "" or c.startswith("zibu, ") for c in seen)
    assert any(c.startswith("zibu, blue, ") for c in seen), "the tags after the kept one are shuffled"


def test_captions_of_several_lines_are_trained_by_their_first(
    training: runs.Training, tmp_path: Path
) -> None:
    folder = tiny.write_images(tmp_path / "lines", [(32, 32)])
    (folder / "image0.txt").write_text("zibu, first\nsecond line", encoding="utf-8")
    several = dataclasses.replace(training, train_set=runs.train_set(tmp_path / "lines"))
    several.finish(max_train_steps=1, network_train_unet_only=True)


def test_an_image_is_seen_as_its_bucket_was_planned(training: runs.Training, tmp_path: Path) -> None:
    """Without enlarging, an odd size is cut, not shrunk: latents come from exactly those pixels."""
    tiny.write_images(tmp_path / "odd", [(29, 21)])
    odd = runs.train_set(tmp_path / "odd", bucket_no_upscale=True)
    assert (odd.buckets, odd.resized) == (((24, 16),), ((29, 21),))
    finished = dataclasses.replace(training, train_set=odd).finish(max_train_steps=1)
    assert finished.lora_file.is_file()
    (entry,) = training.places.cache.rglob("*.safetensors")
    pixels = np.asarray(Image.open(odd.records[0].path), dtype=np.float32)[2:18, 2:26]
    with torch.no_grad():
        vae = training.base.load().vae.float()
        mean = vae.encode(torch.tensor(pixels / 127.5 - 1).permute(2, 0, 1)[None]).latent_dist.mean
    torch.testing.assert_close(api.lora_tensors(entry)["mean"], mean, rtol=1e-4, atol=1e-5)


# ---- the same run, another run ----


def test_a_finished_run_is_returned_at_once(training: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    first = training.finish()
    before = runs.tree(training.places.runs), runs.tree(training.places.loras)
    monkeypatch.setattr(api.Base, "load", lambda self: pytest.fail("modules were loaded"))
    (event,) = training.events()
    assert isinstance(event, api.Finished)
    assert event == dataclasses.replace(first, reused=True)
    assert (runs.tree(training.places.runs), runs.tree(training.places.loras)) == before


def test_a_finished_run_whose_file_is_gone_writes_it_again(training: runs.Training) -> None:
    first = training.finish(preview_image=True)
    files = runs.tree(training.places.loras)
    shutil.rmtree(training.places.loras)
    again = training.finish(preview_image=True)
    assert again == dataclasses.replace(first, reused=True)
    assert runs.tree(training.places.loras) == files


def test_what_is_only_said_of_a_finished_run_can_be_changed_without_training(training: runs.Training) -> None:
    first = training.finish()
    again = training.finish(metadata_title="Zibu", metadata_trigger_phrase="zi bu", training_comment="new")
    assert again.reused and again.lora_file == first.lora_file
    metadata = api.lora_metadata(again.lora_file)
    assert metadata["modelspec.title"] == "Zibu"
    assert metadata["modelspec.trigger_phrase"] == again.trigger_words == "zi bu"
    assert metadata["ss_training_comment"] == "new"
    assert (training.places.loras / "x.txt").read_text("utf-8") == "zi bu\n"
    other = elsewhere(training, "other").finish(
        metadata_title="Zibu", metadata_trigger_phrase="zi bu", training_comment="new"
    )
    assert other.lora_file.read_bytes() == again.lora_file.read_bytes()


@pytest.mark.parametrize("change", ["seed", "caption", "image", "repeats", "bucket", "new image", "concept"])
def test_whatever_enters_the_tensors_makes_another_run(
    training: runs.Training, images: Path, tmp_path: Path, change: str
) -> None:
    first = training.finish(max_train_steps=1)
    folder = shutil.copytree(images, tmp_path / "copy") / "2_zibu"
    settings: dict[str, Any] = {}
    if change == "caption":
        (folder / "image0.txt").write_text("zibu, another", encoding="utf-8")
    elif change == "image":
        tiny.write_images(folder, [(32, 32)], seed=5)
        (folder / "image0.txt").write_bytes((images / "2_zibu" / "image0.txt").read_bytes())
    elif change == "repeats":
        folder.rename(folder.with_name("3_zibu"))
    elif change == "concept":
        folder.rename(folder.with_name("2_zubi"))
    elif change == "bucket":
        settings = {"bucket_reso_steps": 16}
    elif change == "new image":
        Image.new("RGB", (32, 32)).save(folder / "new.png")
    seed = 1 if change == "seed" else 42
    other = dataclasses.replace(training, train_set=runs.train_set(tmp_path / "copy", **settings))
    second = other.finish(max_train_steps=1, seed=seed)
    assert not second.reused
    assert second.run_folder != first.run_folder
    assert second.lora_file.name == "x_2.safetensors"


def test_the_same_images_elsewhere_are_the_same_run(
    training: runs.Training, images: Path, tmp_path: Path
) -> None:
    training.finish(max_train_steps=1)
    moved = runs.train_set(shutil.copytree(images, tmp_path / "moved"))
    assert dataclasses.replace(training, train_set=moved).finish(max_train_steps=1).reused


def test_starting_afresh_trains_again_and_keeps_the_old_checkpoints(training: runs.Training) -> None:
    first = training.finish()
    checkpoints = runs.tree(first.run_folder / "ckpt")
    bytes_before = first.lora_file.read_bytes()
    events = list(training.start(fresh=True))
    again = runs.only(events, api.Finished)
    assert not again.reused and len(losses(events)) == 4
    assert again.lora_file == first.lora_file, "its own file is written anew, not numbered"
    assert again.lora_file.read_bytes() == bytes_before
    assert runs.tree(first.run_folder / "ckpt-old") == checkpoints
    log = (first.run_folder / "log.jsonl").read_text("utf-8").splitlines()
    assert len(log) == 4


# ---- more and fewer steps ----


def test_more_steps_continue_where_the_schedule_allows_it(training: runs.Training) -> None:
    straight = elsewhere(training, "straight").finish(lr_scheduler="constant", max_train_steps=7)
    training.finish(lr_scheduler="constant", max_train_steps=3)
    events = training.events(lr_scheduler="constant", max_train_steps=7)
    assert runs.only(events, api.Planned).first_step == 3
    longer = runs.only(events, api.Finished)
    assert longer.lora_file.name == "x.safetensors"
    assert longer.lora_file.read_bytes() == straight.lora_file.read_bytes()
    assert longer.losses == straight.losses


def test_fewer_steps_than_were_trained_give_the_lora_of_that_step(training: runs.Training) -> None:
    options = {"lr_scheduler": "constant", "save_every_n_steps": 2}
    shorter = elsewhere(training, "shorter").finish(max_train_steps=4, **options)
    training.finish(max_train_steps=8, **options)
    again = training.finish(max_train_steps=4, **options)
    assert again.step == 4
    assert again.lora_file.read_bytes() == shorter.lora_file.read_bytes()
    assert again.losses == shorter.losses
    assert [c.parent.name for c in again.checkpoints] == ["step-000002", "step-000004"]
    assert again.reused, "the LoRA of step 4 was there"
    odd = elsewhere(training, "odd").finish(max_train_steps=3, **options)
    trained = training.finish(max_train_steps=3, **options)
    assert trained.step == 3
    assert trained.lora_file.read_bytes() == odd.lora_file.read_bytes()
    longest = training.finish(max_train_steps=8, **options)
    assert longest.step == 8 and longest.reused
    assert api.lora_metadata(longest.lora_file)["ss_steps"] == "8"


def test_another_number_of_steps_is_another_run_where_the_schedule_depends_on_it(
    training: runs.Training,
) -> None:
    first = training.finish(lr_scheduler="cosine", max_train_steps=2)
    second = training.finish(lr_scheduler="cosine", max_train_steps=3)
    assert second.run_folder != first.run_folder
    assert second.lora_file.name == "x_2.safetensors"


# ---- names ----


def test_a_name_of_another_run_is_numbered_and_found_again(training: runs.Training) -> None:
    files = [training.finish(seed=seed, max_train_steps=1).lora_file for seed in (1, 2, 3)]
    assert [f.name for f in files] == ["x.safetensors", "x_2.safetensors", "x_3.safetensors"]
    contents = [f.read_bytes() for f in files]
    assert len(set(contents)) == 3
    for seed, file in zip((1, 2, 3), files, strict=True):
        again = training.finish(seed=seed, max_train_steps=1)
        assert again.reused and again.lora_file == file
    assert [f.read_bytes() for f in files] == contents


def test_a_name_of_another_run_can_be_refused(training: runs.Training) -> None:
    training.finish(seed=1, max_train_steps=1)
    before = runs.tree(training.places.runs.parent)
    with Refusal("LG-SAVE-005", "'x'", "output_name"):
        training.events(seed=2, max_train_steps=1, name_taken="refuse")
    assert runs.tree(training.places.runs.parent) == before
    assert training.finish(seed=1, max_train_steps=1, name_taken="refuse").reused


@pytest.mark.parametrize("content", [b"", b"no LoRA at all", None])
def test_a_strangers_file_is_never_overwritten(training: runs.Training, content: bytes | None) -> None:
    from safetensors.torch import save_file

    training.places.loras.mkdir(parents=True)
    strange = training.places.loras / "x.safetensors"
    if content is None:
        save_file({"a": torch.ones(1)}, strange)
    else:
        strange.write_bytes(content)
    before = strange.read_bytes()
    assert training.finish(max_train_steps=1).lora_file.name == "x_2.safetensors"
    assert strange.read_bytes() == before


def test_a_name_taken_while_the_run_was_going_is_not_overwritten(training: runs.Training) -> None:
    events = training.start(max_train_steps=1)
    assert isinstance(next(events), api.Planned)
    other = training.finish(seed=9, max_train_steps=1)
    theirs = other.lora_file.read_bytes()
    ours = runs.only(list(events), api.Finished)
    assert other.lora_file.name == "x.safetensors"
    assert ours.lora_file.name == "x_2.safetensors"
    assert other.lora_file.read_bytes() == theirs


def test_notes_of_the_users_beside_the_file_are_not_overwritten(training: runs.Training) -> None:
    training.places.loras.mkdir(parents=True)
    for name in ("x.txt", "x.preview.png"):
        (training.places.loras / name).write_text("mine", encoding="utf-8")
        finished = training.finish(max_train_steps=1, preview_image=True)
        assert finished.lora_file.name == "x_2.safetensors"
        assert (training.places.loras / name).read_text("utf-8") == "mine"
        shutil.rmtree(training.places.loras)
        training.places.loras.mkdir()


@pytest.mark.parametrize(
    "name", ["", "a/b", "a\\b", "..", "../x", "con", "a\nb", "x" * 121, ".x", "x ", "a:b"]
)
def test_a_name_that_is_no_file_name_writes_nothing(training: runs.Training, name: str) -> None:
    with Refusal("LG-PATH-001", "output_name"):
        training.events(output_name=name)
    assert not training.places.runs.exists() and not training.places.loras.exists()


# ---- stopping ----


def test_closing_saves_the_last_finished_step(training: runs.Training) -> None:
    training.stop_after(3, max_train_steps=9)
    folder = runs.run_folder(training.places)
    assert [p.name for p in (folder / "ckpt").iterdir()] == ["step-000003"]
    assert not training.places.loras.exists()
    assert "stopped and saved" in (folder / "log.log").read_text("utf-8")


def test_an_exception_at_an_event_saves_too(training: runs.Training) -> None:
    """A host's interrupt may be thrown into the run instead of closing it."""

    class Interrupt(BaseException):
        pass

    for kind, step in ((Interrupt, 2), (RuntimeError, 4), (KeyboardInterrupt, 5)):
        events = training.start(max_train_steps=9)
        for event in events:
            if isinstance(event, api.Step) and event.step == step:
                break
        with pytest.raises(kind):
            events.throw(kind())
        assert runs.newest(runs.run_folder(training.places)).name == f"step-{step:06d}"


@pytest.mark.parametrize(
    ("kind", "number"),
    [(api.Planned, 0), (api.Cached, 2), (api.Cached, 5), (api.Step, 0), (api.Saved, 0), (api.Sampled, 0),
     (api.Saved, 1), (api.Sampled, 2)],
    ids=["planned", "images", "captions", "step", "saved", "sampled", "last saved", "preview"],
)  # fmt: skip
def test_a_stop_at_any_event_loses_nothing(training: runs.Training, kind: type[Any], number: int) -> None:
    options = {
        "max_train_steps": 3,
        "save_every_n_steps": 2,
        "sample_prompts": ["zibu"],
        "network_train_unet_only": True,
        "preview_image": True,
        "sample_steps": 1,
    }
    straight = elsewhere(training, "straight").finish(**options)
    events = training.start(**options)
    seen = 0
    for event in events:
        if isinstance(event, kind):
            if seen == number:
                break
            seen += 1
    events.close()
    finished = training.finish(**options)
    assert finished.lora_file.read_bytes() == straight.lora_file.read_bytes()
    assert finished.losses == straight.losses


def test_a_stop_frees_the_models_and_the_lock(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[nn.Module]] = []
    real = api.Base.load

    def watched(self: api.Base) -> Any:
        parts = real(self)
        alive.extend(weakref.ref(m) for m in (parts.denoiser, parts.vae, parts.text_encoder))
        return parts

    monkeypatch.setattr(api.Base, "load", watched)
    training.stop_after(1)
    training.finish()
    with pytest.raises(RuntimeError):
        training.start(seed=3).throw(RuntimeError())
    gc.collect()
    assert len(alive) == 6
    assert [ref() for ref in alive] == [None] * 6
    assert not [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]


def test_a_run_may_be_closed_by_another_thread(training: runs.Training) -> None:
    events, begun, done = training.start(), threading.Event(), threading.Event()

    def begin() -> None:
        next(events)
        begun.set()
        done.wait(60)  # what belongs to a thread goes when it ends

    first = threading.Thread(target=begin)
    first.start()
    begun.wait(60)
    events.close()
    assert training.finish().step == 4
    done.set()
    first.join()


def test_two_at_once_on_the_same_run_are_refused(training: runs.Training) -> None:
    events = training.start()
    next(events)
    with Refusal("LG-RUN-003", str(runs.run_folder(training.places))):
        training.events()
    events.close()
    assert training.finish().step == 4


def test_global_state_is_as_before(training: runs.Training) -> None:
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    flags = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
    training.finish(max_train_steps=2, preview_image=True, mixed_precision="bf16")
    training.stop_after(1, seed=4)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")) == flags


# ---- what goes wrong ----


def test_a_vae_that_makes_nan_names_the_image(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = SD15.encode_images, []

    def broken(self: SD15, parts: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        moments = real(self, parts, pixels)
        calls.append(1)
        if len(calls) == 3:
            moments["mean"][0, 0, 0, 0] = math.nan
        return moments

    monkeypatch.setattr(SD15, "encode_images", broken)
    with Refusal("LG-RUN-005", "2_zibu/image2.png"):
        training.events()
    assert len(list(training.places.cache.rglob("*.safetensors"))) == 2, "what was good is kept"


class Poisoned(torch.autograd.Function):
    """Pass values through, and make gradients NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.full_like(grad, math.nan)


@pytest.mark.parametrize(
    ("place", "what"), [("pred", "loss"), ("text", "loss"), ("gradient", "gradient"), ("weight", "loss")]
)
def test_nan_stops_the_run_at_its_step_with_files_and_checkpoint_named(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch, place: str, what: str
) -> None:
    options = {"max_train_steps": 6, "save_every_n_steps": 2, "gradient_accumulation_steps": 2}
    straight = elsewhere(training, "straight").finish(**options)
    real_step, real_predict, real_text = loop.train_step, SD15.predict, SD15.encode_text
    now = {"step": 0}

    def step(run: Any) -> Any:
        now["step"] = run.step + 1
        if place == "weight" and now["step"] == 4:
            with torch.no_grad():
                run.parameters[-1].view(-1)[0] = math.nan
        return real_step(run)

    def predict(self: SD15, *args: Any) -> torch.Tensor:
        pred = real_predict(self, *args)
        if now["step"] == 4 and place in ("pred", "gradient"):
            return pred * math.nan if place == "pred" else Poisoned.apply(pred)
        return pred

    def encode_text(self: SD15, *args: Any) -> torch.Tensor:
        return real_text(self, *args) * (math.nan if place == "text" and now["step"] == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        patch.setattr(SD15, "predict", predict)
        patch.setattr(SD15, "encode_text", encode_text)
        with Refusal("LG-RUN-004", "step 4", "step 2", what) as caught:
            training.events(**options)
    used = {i for b in epoch_parts(training.train_set, 1, 2)[1] for i in b.indices}
    first = {i for b in epoch_parts(training.train_set, 1, 2)[1][:1] for i in b.indices}
    named = {r.name for r in training.train_set.records if r.name in caught.value.where}
    expected = used if what == "gradient" else first
    assert named == {training.train_set.records[i].name for i in expected}
    folder = runs.run_folder(training.places)
    assert runs.newest(folder).name == "step-000002"
    assert "LG-RUN-004" in (folder / "log.log").read_text("utf-8")
    assert not training.places.loras.exists()
    finished = training.finish(**options)
    assert finished.lora_file.read_bytes() == straight.lora_file.read_bytes()


def test_nan_in_the_last_step_reaches_no_file(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.train_step

    def step(run: Any) -> Any:
        result = real(run)
        if run.step == 4:
            with torch.no_grad():
                run.parameters[-1].view(-1)[0] = math.nan
        return result

    monkeypatch.setattr(loop, "train_step", step)
    with Refusal("LG-SAVE-003", "lora_unet_"):
        training.events()
    assert not training.places.loras.exists()
    assert not list(runs.run_folder(training.places).glob("ckpt/*"))


def test_an_overflow_in_fp16_skips_the_step(training: runs.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss scaler lowers its scale and goes on; the log stays valid JSON."""
    real = SD15.predict
    calls: list[int] = []

    def predict(self: SD15, *args: Any) -> torch.Tensor:
        calls.append(1)
        pred = real(self, *args)
        return Poisoned.apply(pred) if len(calls) == 2 else pred

    monkeypatch.setattr(SD15, "predict", predict)
    events = training.events(max_train_steps=3, mixed_precision="fp16")
    assert len(losses(events)) == 3
    finished = runs.only(events, api.Finished)
    assert all(bool(torch.isfinite(v).all()) for v in api.lora_tensors(finished.lora_file).values())

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    for line in (finished.run_folder / "log.jsonl").read_text("utf-8").splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_sample_that_fails_does_not_end_the_run(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: SD15, *args: Any, **options: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    plain = elsewhere(training, "plain").finish(max_train_steps=2, sample_prompts=["a"], preview_image=True)
    monkeypatch.setattr(SD15, "sample", broken)
    events = training.events(max_train_steps=2, sample_prompts=["a"], preview_image=True)
    notes = [n.text for n in runs.of(events, api.Note)]
    assert len(notes) == 2
    assert all("CUDA out of memory" in n for n in notes)
    finished = runs.only(events, api.Finished)
    assert finished.lora_file.read_bytes() == plain.lora_file.read_bytes()
    assert not (training.places.loras / "x.preview.png").exists()


def test_an_image_that_changes_during_the_run_is_named(training: runs.Training, tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "here", [(32, 32)])
    here = dataclasses.replace(training, train_set=runs.train_set(tmp_path / "here"))
    events = here.start(cache_latents=False)
    for event in events:
        if isinstance(event, api.Step):
            (tmp_path / "here" / "image0.png").unlink()
            break
    with Refusal("LG-DATA-009", "image0.png"):
        list(events)


@pytest.mark.parametrize("device", ["no such device", "cuda:99", "xpu"])
def test_a_device_that_is_not_there(training: runs.Training, device: str) -> None:
    with Refusal("LG-RUN-006", device):
        list(
            api.train(
                training.base, training.train_set, runs.settings(), places=training.places, device=device
            )
        )
    assert not training.places.runs.exists()


def test_a_workflow_that_is_no_json_is_refused_before_training(training: runs.Training) -> None:
    with pytest.raises(ValueError):
        next(training.start(workflow="{not json"))
    assert not training.places.runs.exists()


def test_zero_steps_cannot_be_asked_for() -> None:
    for name in ("max_train_steps", "max_train_epochs", "train_batch_size", "gradient_accumulation_steps"):
        with Refusal("LG-CFG-003", name):
            runs.settings(**{name: 0})


def test_errors_of_a_run_are_all_of_the_one_class(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file-system error anywhere in a run arrives as a refusal that names the file."""
    from loragraft.trainer import runlog

    def full(self: Any, event: api.Step) -> None:
        raise OSError(28, "No space left on device", "log.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(runlog.RunLog, "step", full)
        with pytest.raises(LoraGraftError) as caught:
            training.events()
    assert caught.value.code == "LG-SAVE-001"
    assert training.finish().step == 4
