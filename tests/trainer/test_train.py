"""Training: the same numbers as a plain loop, whatever the precision and the caches."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from loragraft.trainer import api
from loragraft.trainer import losses as losses_module
from loragraft.trainer.inputs import Inputs
from loragraft.trainer.inputs.texts import Captions
from loragraft.trainer.objective import generator
from loragraft_tests.trainer import runs, tiny

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
        if inside and (isinstance(module, (nn.Linear, nn.Conv2d))):
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
        batches = [b for e in range(steps) for b in runs.epoch_parts(train_set, e, accumulation)][step]
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
        engine="eager",
    )
    expected, norms = plain_losses(
        training.train_set, steps=steps, accumulation=accumulation, gamma=gamma, clip_skip=clip_skip
    )
    assert runs.losses(events) == pytest.approx(expected, rel=1e-6)
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
    real = losses_module.diffusion_losses

    def recording(*args: Any) -> torch.Tensor:
        losses = real(*args)
        micro.append(losses.mean().item())
        return losses

    monkeypatch.setattr(losses_module, "diffusion_losses", recording)
    events = training.events(max_train_steps=5, gradient_accumulation_steps=3)
    taken = 0
    for event, size in zip(runs.of(events, api.Step), (3, 1, 3, 1, 3), strict=True):
        assert event.loss == pytest.approx(sum(micro[taken : taken + size]) / size)
        taken += size
        places = {i % 4: loss for i, loss in enumerate(micro[:taken])}
        assert event.avr_loss == pytest.approx(sum(places.values()) / len(places))
        assert event.epoch == (taken + 3) // 4
    assert taken == len(micro)


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
    full = runs.losses(training.events(max_train_steps=3))
    for precision in ("bf16", "fp16"):
        events = training.elsewhere(precision).events(max_train_steps=3, mixed_precision=precision)
        assert runs.losses(events) == pytest.approx(full, rel=0.02)
        tensors = api.lora_tensors(runs.only(events, api.Finished).lora_file)
        assert all(bool(torch.isfinite(v).all()) and bool(v.any()) for v in tensors.values())


def test_auto_is_full_precision_on_a_cpu(training: runs.Training) -> None:
    assert runs.losses(training.events(mixed_precision="auto", max_train_steps=2)) == runs.losses(
        training.elsewhere("fp32").events(mixed_precision="fp32", max_train_steps=2)
    )


def test_gradient_checkpointing_changes_no_number(training: runs.Training) -> None:
    plain = training.finish(max_train_steps=3)
    saving = training.elsewhere("saving").finish(max_train_steps=3, gradient_checkpointing=True)
    ours, theirs = (api.lora_tensors(f.lora_file) for f in (plain, saving))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


# ---- caches ----


def test_cached_latents_change_no_byte(training: runs.Training) -> None:
    cached = training.finish(max_train_steps=5)
    warm = training.elsewhere("warm")
    shutil.copytree(training.places.cache, warm.places.cache)
    hits = runs.of(warm.events(max_train_steps=5), api.Cached)[-1]
    assert (hits.hits, hits.total) == (4, 4)
    fresh = training.elsewhere("fresh").finish(max_train_steps=5, cache_latents=False)
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
    other = training.elsewhere("other")
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
    each = once.elsewhere("each").events(**options)
    assert runs.losses(each) == pytest.approx(runs.losses(kept), rel=1e-6)


def test_caption_dropout_draws_empty_captions(
    training: runs.Training, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = Captions.tokenize

    def watching(self: Captions, captions: list[str]) -> tuple[torch.Tensor, ...]:
        seen.extend(captions)
        return real(self, captions)

    monkeypatch.setattr(Captions, "tokenize", watching)
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
