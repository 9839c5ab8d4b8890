"""Whole runs with every optimizer and schedule: continued bit by bit, and the same in every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, load_file

from loragraft.trainer import api
from loragraft.trainer.optim.find import missing
from loragraft.trainer.settings.optimizers import KNOWN
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.test_optim import settings as wanted_by

STEPS = 6
QUICK = ("Prodigy",)
SCHEDULES: dict[str, dict[str, Any]] = {
    "soft restarts": {
        "lr_scheduler": "cosine_with_warm_restarts",
        "lr_scheduler_args": ["T_0=3", "decay=0.5", "down_factor=0.2", "gamma_min_lr=0.9", "cycle_warmup=1"],
    },
    "rise, stay, fall": {
        "lr_scheduler": "warmup_stable_decay",
        "lr_warmup_steps": 2,
        "lr_decay_steps": 0.5,
        "lr_scheduler_min_lr_ratio": 0.1,
    },
    "one cycle": {"lr_scheduler_type": "OneCycleLR"},
    "pieces": {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules=1:2,0.5:4,0.1"]},
    "blocks": {
        "down_lr_weight": "sine-.5",
        "mid_lr_weight": "2",
        "loraplus_lr_ratio": 4.0,
        "network_reg_lrs": ["up_blocks.*to_q=1e-4"],
    },
}


def options(name: str) -> dict[str, Any]:
    """Return what a run with this optimizer needs to be set."""
    config = wanted_by(name)
    return {
        "optimizer_type": name,
        "learning_rate": config.learning_rate,
        "lr_scheduler": "constant_with_warmup" if config.lr_scheduler == "cosine" else config.lr_scheduler,
        "lr_warmup_steps": 2 if config.lr_scheduler == "cosine" else 0,
        "max_train_steps": STEPS,
        "save_every_n_steps": 1,
    }


def checkpoints(training: runs.Training) -> dict[str, bytes]:
    """Return all that was saved, by its place; the manifest only repeats it."""
    kept = ("lora.safetensors", "train_state.safetensors")
    files = sorted(training.places.runs.rglob("*.safetensors"))
    return {f"{f.parent.name}/{f.name}": f.read_bytes() for f in files if f.name in kept}


def tensors(training: runs.Training) -> dict[str, list[float]]:
    """Return the tensors of all that was saved: metadata names the settings."""
    return {
        f"{place}/{key}": tensor.tolist()
        for place, data in checkpoints(training).items()
        for key, tensor in load(data).items()
    }


def continued_equals_straight(training: runs.Training, values: dict[str, Any], splits: range) -> None:
    straight = training.elsewhere("straight")
    straight.finish(**values)
    whole = checkpoints(straight)
    assert whole
    for split in splits:
        again = training.elsewhere(f"split {split}")
        again.stop_after(split, **values)
        again.finish(**values)
        found = checkpoints(again)
        last = f"step-{STEPS:06d}/lora.safetensors"
        assert found[last] == whole[last], split
        assert {k: v for k, v in found.items() if k in whole} == {
            k: v for k, v in whole.items() if k in found
        }


@pytest.mark.parametrize("name", QUICK)
def test_a_run_continues_bit_by_bit(name: str, training: runs.Training) -> None:
    if (left_out := missing(name)) is not None:
        pytest.skip(left_out)
    continued_equals_straight(training, options(name), range(3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KNOWN if missing(name) is None])
def test_every_run_continues_bit_by_bit_from_every_step(name: str, training: runs.Training) -> None:
    continued_equals_straight(training, options(name), range(1, STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["AdamW", "Prodigy"])
def test_every_schedule_continues_bit_by_bit(name: str, optimizer: str, training: runs.Training) -> None:
    if missing(optimizer) is not None or (optimizer == "Prodigy" and name == "blocks"):
        pytest.skip("one rate for all, or not installed")
    values = {**options(optimizer), "lr_scheduler": "cosine", "lr_warmup_steps": 0, **SCHEDULES[name]}
    continued_equals_straight(training, values, range(1, STEPS, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Lion", "SGDNesterov"])
def test_fused_steps_are_eager_ones(name: str, training: runs.Training) -> None:
    values = {**options(name), "save_every_n_steps": None, "loraplus_lr_ratio": 4.0}
    losses = {}
    for engine in ("eager", "fused"):
        events = training.elsewhere(engine).events(**values, engine=engine)
        losses[engine] = runs.losses(events)
    assert losses["fused"] == pytest.approx(losses["eager"], rel=1e-4)
    assert losses["fused"][0] != losses["fused"][-1]


@pytest.mark.slow
def test_an_optimizer_that_looks_at_whole_tensors_says_why_it_is_eager(training: runs.Training) -> None:
    planned = runs.only(training.events(**options("Adafactor")), api.Planned)
    assert any("eager steps" in line and "each tensor as a whole" in line for line in planned.lines)


@pytest.mark.parametrize("name", ["AdamW", pytest.param("Adafactor", marks=pytest.mark.slow)])
def test_steps_within_the_backward_pass_give_the_same_files(name: str, training: runs.Training) -> None:
    values = {**options(name), "max_grad_norm": 0.0}
    usual, inside = training.elsewhere("usual"), training.elsewhere("inside")
    usual_events = usual.events(**values, engine="eager")
    inside_events = inside.events(**values, fused_backward_pass=True)
    assert tensors(usual) == tensors(inside)
    assert [e.grad_norm for e in runs.of(usual_events, api.Step)] == pytest.approx(
        [e.grad_norm for e in runs.of(inside_events, api.Step)], rel=1e-5
    )
    planned = runs.only(inside_events, api.Planned)
    reason = "within the backward pass" if name == "AdamW" else "each tensor as a whole"
    assert any(reason in line for line in planned.lines)


def test_the_log_names_every_group(training: runs.Training) -> None:
    values = {"loraplus_unet_lr_ratio": 4.0, "up_lr_weight": "0.5", "learning_rate": 1e-3}
    events = training.events(**values, lr_scheduler="constant")
    rates = runs.of(events, api.Step)[0].learning_rates
    assert rates["text_encoder"] == 1e-3 and rates["denoiser up 3 up"] == pytest.approx(2e-3)
    assert any("learning rates: text_encoder 0.001" in line for line in runs.only(events, api.Planned).lines)


def test_a_block_of_weight_0_is_not_in_the_file(training: runs.Training) -> None:
    done = training.finish(down_lr_weight="zeros", mid_lr_weight="1")
    keys = load_file(done.lora_file)
    assert not any("_down_blocks_" in key for key in keys)
    assert any("_mid_block_" in key for key in keys) and any("_up_blocks_" in key for key in keys)


def test_what_is_saved_of_a_schedule_free_run_is_the_average(training: runs.Training) -> None:
    name = "AdamWScheduleFree"
    if (left_out := missing(name)) is not None:
        pytest.skip(left_out)
    done = training.finish(**{**options(name), "learning_rate": 0.05, "save_precision": "fp32"})
    saved = load_file(done.lora_file)
    (state,) = Path(done.run_folder).rglob(f"step-{STEPS:06d}/train_state.safetensors")
    trained = {k.removeprefix("adapter."): v for k, v in load_file(state).items() if k.startswith("adapter.")}
    ups = [key for key in saved if key.endswith("lora_up.weight")]
    assert any(not saved[key].equal(trained[key]) for key in ups)
