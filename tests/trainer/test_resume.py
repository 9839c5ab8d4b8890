"""A run that is stopped and continued gives the same bytes as one that never stopped, at every step."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer import api
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal

STEPS = 12  # four micro-batches an epoch: epochs end within, at and after accumulated steps
ROOT = Path(__file__).resolve().parents[2]

# Settings of the run, settings of the images. Between them: every schedule, accumulation, sampling,
# varied captions, kept captions, the loss scaler's state, latents encoded at each step.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"lr_scheduler": "cosine"}, {}),
    "accumulated": (
        {
            "gradient_accumulation_steps": 3,
            "lr_scheduler": "cosine_with_restarts",
            "lr_scheduler_num_cycles": 2,
            "lr_warmup_steps": 3,
        },
        {
            "shuffle_caption": True,
            "caption_dropout_rate": 0.3,
            "caption_tag_dropout_rate": 0.2,
            "keep_tokens": 1,
        },
    ),
    "sampled": (
        {
            "sample_prompts": ["zibu"],
            "sample_every_n_steps": 1,
            "sample_steps": 1,
            "conv_dim": 2,
            "min_snr_gamma": 5.0,
            "clip_skip": 2,
            "lr_scheduler": "linear",
            "lr_warmup_steps": 0.25,
        },
        {},
    ),
    "scaled": (
        {
            "mixed_precision": "fp16",
            "network_train_unet_only": True,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": 5,
            "gradient_checkpointing": True,
        },
        {"caption_dropout_rate": 0.5},
    ),
    "uncached": (
        {
            "cache_latents": False,
            "lr_scheduler": "polynomial",
            "lr_scheduler_power": 0.5,
            "optimizer_args": ["amsgrad=True", "weight_decay=0.1"],
            "max_token_length": 150,
            "unet_lr": 0.0,
        },
        {},
    ),
}


# The quick suite has the richest one; test_split_points has all of it in one run, at places of its own.
QUICK = ("accumulated",)


@pytest.fixture(params=[n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS])
def variant(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of one variant; every step is saved, so that every step can be compared."""
    run, data = VARIANTS[request.param]
    return {"max_train_steps": STEPS, "save_every_n_steps": 1, **run}, data


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Return the checkpoint's files but the manifest, which only repeats them."""
    return {
        name: (checkpoint / name).read_bytes()
        for name in ("lora.safetensors", "train_state.safetensors", "state.json")
    }


def straight(training: runs.Training, options: dict[str, Any]) -> tuple[list[dict[str, bytes]], api.Finished]:
    """Run without a stop; return every step's checkpoint and the end."""
    found = []
    for event in training.start(**options):
        if isinstance(event, api.Saved):
            found.append(contents(event.folder))
        last = event
    assert len(found) == STEPS
    return found, last


def published(places: api.Places) -> dict[str, bytes]:
    return runs.tree(places.loras)


def test_every_step_continues_bit_exact(
    base: api.Base, images: Path, tmp_path: Path, variant: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Stop after every single step: each step is then taken by a run that was put back from disk.

    If each of these states equals the uninterrupted run's, so does every run with any stops.
    """
    options, data = variant
    train_set = runs.train_set(images, **data)
    never, stopped = (
        runs.Training(
            base, train_set, api.Places(tmp_path / n / "runs", tmp_path / n / "loras", tmp_path / n / "cache")
        )
        for n in ("never", "stopped")
    )
    expected, end = straight(never, options)
    for step in range(1, STEPS):
        stopped.stop_after(step, **options)
        found = contents(runs.newest(runs.run_folder(stopped.places)))
        differing = [name for name in found if found[name] != expected[step - 1][name]]
        assert not differing, f"step {step}: {differing}"
    finished = stopped.finish(**options)
    assert published(stopped.places) == published(never.places)
    assert finished.losses == end.losses
    log = [(p / "log.jsonl").read_text("utf-8").splitlines() for p in (end.run_folder, finished.run_folder)]
    assert len(log[0]) == len(log[1]) == STEPS


@pytest.mark.slow
def test_every_split_gives_the_same_file(
    base: api.Base, images: Path, tmp_path: Path, variant: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Run A straight; run B stopped once, after each step in turn, and carried to its end."""
    options, data = variant
    train_set = runs.train_set(images, **data)
    shared = tmp_path / "cache"

    def training(name: str) -> runs.Training:
        return runs.Training(
            base, train_set, api.Places(tmp_path / name / "runs", tmp_path / name / "loras", shared)
        )

    _, end = straight(training("never"), options)
    for step in range(1, STEPS):
        once = training(f"stop{step}")
        once.stop_after(step, **options)
        assert once.finish(**options).losses == end.losses
        assert published(once.places) == published(training("never").places), f"stopped after step {step}"


def test_an_older_checkpoint_continues_as_well(
    base: api.Base, train_set: api.TrainSet, tmp_path: Path
) -> None:
    """Where the newest state is damaged, the one before it is taken, and the result is the same."""
    never, damaged = (
        runs.Training(base, train_set, api.Places(tmp_path / f"{n}r", tmp_path / f"{n}l", tmp_path / f"{n}c"))
        for n in ("never", "damaged")
    )
    options = {"max_train_steps": 6, "save_every_n_steps": 2}
    never.finish(**options)
    damaged.stop_after(5, **options)
    folder = runs.run_folder(damaged.places)
    state = runs.newest(folder) / "train_state.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    events = damaged.events(**options)
    assert runs.only(events, api.Planned).first_step == 4
    assert published(damaged.places) == published(never.places)


def test_nothing_but_the_folders_is_needed_to_continue(
    base: api.Base, train_set: api.TrainSet, places: api.Places, tmp_path: Path
) -> None:
    """The cache can be deleted, and all folders can move to another place."""
    never = runs.Training(base, train_set, api.Places(tmp_path / "a", tmp_path / "b", tmp_path / "c"))
    never.finish()
    training = runs.Training(base, train_set, places)
    training.stop_after(2)
    shutil.rmtree(places.cache)
    places.runs.rename(tmp_path / "moved")
    moved = dataclasses.replace(
        training, places=api.Places(tmp_path / "moved", tmp_path / "l", tmp_path / "k")
    )
    events = moved.events()
    assert runs.only(events, api.Planned).first_step == 2
    assert published(moved.places) == published(never.places)


def test_a_state_of_another_run_is_refused(
    base: api.Base, train_set: api.TrainSet, places: api.Places
) -> None:
    """A run folder that was copied under this run's name is not trained on."""
    training = runs.Training(base, train_set, places)
    training.stop_after(2, seed=1)
    other = runs.run_folder(places)
    training.stop_after(1, seed=2)
    (mine,) = [f for f in places.runs.iterdir() if f != other]
    (other / "ckpt" / "step-000002").rename(mine / "ckpt" / "step-000002")
    with Refusal("LG-RUN-007", "step 2", str(mine), "afresh"):
        training.events(seed=2)
    events = list(training.start(seed=2, fresh=True))
    assert runs.only(events, api.Finished).step == 4


def test_a_finished_state_of_another_run_is_not_published(
    base: api.Base, train_set: api.TrainSet, places: api.Places
) -> None:
    training = runs.Training(base, train_set, places)
    other = training.finish(seed=1).run_folder
    training.stop_after(1, seed=2)
    (mine,) = [f for f in places.runs.iterdir() if f != other]
    (other / "ckpt" / "step-000004").rename(mine / "ckpt" / "step-000004")
    with Refusal("LG-RUN-007", "step 4", str(mine)):
        training.events(seed=2)


# ---- killed ----

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import conftest
from loragraft_tests.trainer import runs
from loragraft.trainer import api
root, images, base, tokenizer = map(Path, sys.argv[1:])
places = api.Places(root / "runs", root / "loras", root / "cache")
training = runs.Training(api.open_base(base, tokenizer=tokenizer), runs.train_set(images), places)
for event in training.start(max_train_steps=40, save_every_n_steps=1):
    print(type(event).__name__, flush=True)
"""


@pytest.fixture
def command(tmp_path: Path, images: Path, checkpoint: Path, tokenizer: Path) -> Iterator[list[str]]:
    """Return the command line of another process that trains."""
    child = CHILD.format(tests=str(ROOT / "tests"))
    yield [sys.executable, "-c", child, *map(str, (tmp_path, images, checkpoint, tokenizer))]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_killed_processes_lose_at_most_the_steps_since_the_last_save(
    base: api.Base, train_set: api.TrainSet, places: api.Places, tmp_path: Path, command: list[str]
) -> None:
    """Kill a training process again and again; what it left continues and ends in the same bytes."""
    never = runs.Training(base, train_set, api.Places(tmp_path / "a", tmp_path / "b", tmp_path / "c"))
    options = {"max_train_steps": 40, "save_every_n_steps": 1}
    never.finish(**options)
    steps = [0]
    for kill in range(6):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("Saved"):
                break
        time.sleep(0.05 + 0.037 * kill)  # somewhere in the next steps and saves
        child.send_signal(signal.SIGKILL)
        child.wait()
        newest = runs.newest(runs.run_folder(places))
        steps.append(int(newest.name[5:11]))
        assert steps[-1] > steps[-2]
    training = runs.Training(base, train_set, places)
    finished = training.finish(**options)
    assert published(places) == published(never.places)
    assert not list(finished.run_folder.rglob("*.tmp-*")), "what the kills left is swept"


@pytest.mark.slow
def test_two_processes_do_not_share_a_run(
    base: api.Base, train_set: api.TrainSet, places: api.Places, command: list[str]
) -> None:
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("Step"):
                break
        with Refusal("LG-RUN-003"):
            runs.Training(base, train_set, places).events(max_train_steps=40, save_every_n_steps=1)
    finally:
        child.kill()
        child.wait()
