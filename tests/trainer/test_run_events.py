"""A run tells what happens, in order, to its caller and its logs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loragraft.trainer import api
from loragraft_tests.trainer import runs


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
    assert finished.losses == pytest.approx(tuple(runs.losses(events)), rel=1e-7)
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
    assert [entry["loss"] for entry in logged] == runs.losses(events)
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


def test_scaled_norms_are_told(training: runs.Training) -> None:
    """So that a limit which holds every module back is seen while it trains."""
    events = training.events(scale_weight_norms=0.001, learning_rate=0.01, max_train_steps=2)
    told = [event.key_norms for event in runs.of(events, api.Step)]
    assert all(set(t) == {"keys_scaled", "average_key_norm", "maximum_key_norm"} for t in told)
    assert told[-1]["keys_scaled"] > 0 and told[-1]["maximum_key_norm"] <= 0.001 * 1.001
    text = (runs.run_folder(training.places) / "log.log").read_text("utf-8")
    assert "keys_scaled" in text
    plain = training.elsewhere("plain").events(max_train_steps=1)
    assert runs.of(plain, api.Step)[0].key_norms == {}
