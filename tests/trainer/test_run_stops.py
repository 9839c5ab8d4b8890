"""Stops and faults: a run ends cleanly at any event, and what goes wrong is named."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import random
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from loragraft.trainer import api, loop, samples
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.families.sd15 import SD15
from loragraft_tests.trainer import runs, tiny
from loragraft_tests.trainer.data_folders import Refusal

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
    straight = training.elsewhere("straight").finish(**options)
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
    straight = training.elsewhere("straight").finish(**options)
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

    def encode_text(self: SD15, *args: Any) -> tuple[torch.Tensor, ...]:
        factor = math.nan if place == "text" and now["step"] == 4 else 1
        return tuple(x * factor for x in real_text(self, *args))

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        patch.setattr(SD15, "predict", predict)
        patch.setattr(SD15, "encode_text", encode_text)
        with Refusal("LG-RUN-004", "step 4", "step 2", what) as caught:
            training.events(**options)
    used = {i for b in runs.epoch_parts(training.train_set, 1, 2)[1] for i in b.indices}
    first = {i for b in runs.epoch_parts(training.train_set, 1, 2)[1][:1] for i in b.indices}
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
        result = yield from real(run)
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
    assert len(runs.losses(events)) == 3
    finished = runs.only(events, api.Finished)
    assert all(bool(torch.isfinite(v).all()) for v in api.lora_tensors(finished.lora_file).values())

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    for line in (finished.run_folder / "log.jsonl").read_text("utf-8").splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_sample_that_fails_does_not_end_the_run(
    training: runs.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    plain = training.elsewhere("plain").finish(max_train_steps=2, sample_prompts=["a"], preview_image=True)
    monkeypatch.setattr(samples, "sample", broken)
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


def test_a_picture_that_vanishes_costs_no_finished_step(
    training: runs.Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step is drawn ahead; where that fails, the step before is finished and saved all the same."""
    tiny.write_images(tmp_path / "1_zibu", [(32, 32)])
    here = training.elsewhere("here", train_set=runs.train_set(tmp_path))
    taken = []
    with pytest.raises(LoraGraftError):
        for event in here.start(max_train_steps=6, cache_latents=False):
            if isinstance(event, api.Step):
                taken.append(event.step)
                if event.step == 3:
                    for file in (tmp_path / "1_zibu").glob("*.png"):
                        file.unlink()
    assert runs.newest(runs.run_folder(here.places)).name == f"step-{taken[-1]:06d}"
    assert taken[-1] in (3, 4)
