"""Two processes against one: gradients, whole runs, who writes, and how they end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from loragraft.trainer import api
from loragraft.trainer.commands import processes
from loragraft.trainer.commands.stop import StopFlag
from loragraft.trainer.engine.distributed import ALONE, Alone
from loragraft.trainer.engine.precision import Precision
from loragraft.trainer.engine.steps import choose
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.trainer import distributed_child as child
from loragraft_tests.trainer import runs, tiny

CHILD = Path(child.__file__)
LONGER = ("whole", "finished", "rolled_back", "killed")  # the last one ends the second process
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="one process becomes two")
Said = dict[str, list[dict[str, Any]]]  # what each process saw, by scenario


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, its tokenizer and images: what the processes work on."""
    root = tmp_path_factory.mktemp("together")
    tiny.write_tokenizer(root / "tokenizer")
    tiny.write_checkpoint(root / "tiny.safetensors")
    tiny.write_images(root / "images" / "2_zibu", [(32, 32), (40, 24), (24, 40), (32, 32), (32, 32)])
    tiny.write_images(root / "images" / "1_alone", [(48, 16)], seed=2)
    tiny.write_images(root / "reg" / "1_thing", [(32, 32), (32, 32)], seed=1)
    (root / "images" / "masks" / "2_zibu").mkdir(parents=True)
    half = np.zeros((32, 32), np.uint8)
    half[:, :16] = 255
    Image.fromarray(half).save(root / "images" / "masks" / "2_zibu" / "image0.png")
    return root


@pytest.fixture(scope="module")
def said(folder: Path) -> Said:
    """Let two processes go through the quick scenarios; return what they saw."""
    return start(folder, [name for name in child.SCENARIOS if name not in LONGER])


@pytest.fixture(scope="module")
def longer(folder: Path) -> Said:
    """Let two processes go through the others."""
    return start(folder, list(LONGER))


def start(folder: Path, names: list[str]) -> Said:
    """Let two processes go through scenarios; return what they saw."""
    ended = subprocess.run(
        [sys.executable, str(CHILD), str(folder), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout
    return {
        name: [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob(f"{name}-?.json"))]
        for name in names
    }


@pytest.mark.parametrize("kind", child.GRADIENTS)
def test_gradients_are_those_of_one_process_with_the_whole_batch(kind: str, folder: Path, said: Said) -> None:
    """Several buckets, partial batches, a batch with fewer images than processes, weights, a mask."""
    run = child.opened(folder, ALONE, "unused", **child.GRADIENTS[kind])
    expected, losses, _ = child.epoch_gradients(run)
    found = load_file(folder / f"{kind}.safetensors")
    assert found.keys() == expected.keys()
    sizes = {len(b.indices) for step in range(run.plan.steps_per_epoch) for b in run.batches(step)}
    assert {1, child.EACH * child.SIZE} <= sizes
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)
    assert apart(found, expected) < 5e-6  # rounding: kernels add up otherwise for another batch size
    for process in said[kind]:
        assert process["losses"] == pytest.approx(losses, rel=1e-6)


def test_every_image_is_used_once_an_epoch_by_one_of_the_processes(folder: Path, said: Said) -> None:
    records = child.train_set(folder).records
    fed = Counter(i for process in said["fused"] for batch in process["fed"] for i in batch)
    assert fed == {i: record.repeats for i, record in enumerate(records)}
    most = [max(len(batch) for batch in process["fed"]) for process in said["fused"]]
    assert most == [child.EACH, child.EACH]


def finish(folder: Path, name: str, **changes: Any) -> list[api.Event]:
    return list(child.start(folder, ALONE, name, **changes))


def distance(one: Path, other: Path) -> float:
    return apart(load_file(one), load_file(other))


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the relative L2 distance over all tensors."""
    assert found.keys() == expected.keys()
    square = sum(float((found[k].double() - v.double()).square().sum()) for k, v in expected.items())
    return (square / sum(float(v.double().square().sum()) for v in expected.values())) ** 0.5


@pytest.mark.slow
def test_a_whole_run_is_that_of_one_process(folder: Path, longer: Said) -> None:
    alone = runs.only(finish(folder, "alone", sample_prompts=("a",), preview_image=True), api.Finished)
    together = folder / "whole"
    (run_folder,) = (together / "runs").iterdir()
    assert run_folder.name == alone.run_folder.name
    # AdamW divides by what may be nearly zero, which makes rounding larger.
    assert distance(together / "loras" / "x.safetensors", alone.lora_file) < 2e-5
    assert (run_folder / "run.toml").read_bytes() == (alone.run_folder / "run.toml").read_bytes()
    ours, theirs = (api.lora_metadata(f) for f in (together / "loras" / "x.safetensors", alone.lora_file))
    same = {k for k in theirs if ours.get(k) == theirs[k]}
    assert theirs.keys() - same <= {"sshs_model_hash", "modelspec.hash_sha256", "sshs_legacy_hash"}


@pytest.mark.slow
def test_one_process_writes_and_the_other_touches_no_file(longer: Said) -> None:
    writer, other = longer["whole"]
    assert {"Planned", "Cached", "Step", "Saved", "Sampled", "Finished"} <= set(writer["events"])
    assert other["events"] == ["Step"] * child.WHOLE["max_train_steps"]
    assert other["written"] == []
    assert any("ckpt" in line for line in writer["written"])


@pytest.mark.slow
def test_a_finished_run_is_returned_by_all(longer: Said) -> None:
    writer, other = longer["finished"]
    assert (writer["events"], other["events"]) == (["Finished"], [])


def test_a_stop_in_one_process_stops_all_and_another_number_continues(folder: Path, said: Said) -> None:
    writer, other = said["stopped"]
    assert other == {"events": ["Step"] * 3}
    assert writer == {"stopped": True, "told": True}
    events = finish(folder, "stopped", **child.PLAIN)
    assert runs.only(events, api.Planned).first_step == 3
    straight = runs.only(finish(folder, "straight", **child.PLAIN), api.Finished)
    assert distance(runs.only(events, api.Finished).lora_file, straight.lora_file) < 1e-6


def test_an_error_in_one_process_ends_all_with_its_message(said: Said) -> None:
    writer, other = said["refused"]
    assert writer["error"] == other["error"] == "LG-RUN-005"
    assert "ä.png (process 1 of 2, counted from 0)" in writer["text"]
    assert "process 1" not in other["text"]


def test_a_fault_in_one_process_is_told_to_the_others(said: Said) -> None:
    writer, other = said["crashed"]
    assert (writer["error"], other["error"]) == ("LG-DIST-004", "RuntimeError")
    assert "a wire came loose" in writer["text"]


def test_processes_of_two_runs_are_refused(said: Said) -> None:
    assert [process["error"] for process in said["apart"]] == ["LG-DIST-002"] * 2


def test_weights_that_come_apart_are_noticed(said: Said) -> None:
    assert [process["error"] for process in said["drifted"]] == ["LG-DIST-005"] * 2


@pytest.mark.slow
def test_all_go_back_where_one_meets_what_is_no_number(folder: Path, longer: Said) -> None:
    assert [process.get("steps") for process in longer["rolled_back"]] == [3 + 4] * 2
    (run_folder,) = (folder / "rolled_back" / "runs").iterdir()
    assert "Rolled back to step 2" in (run_folder / "log.log").read_text("utf-8")


@pytest.mark.slow
def test_a_process_that_vanishes_ends_the_others_with_the_last_step_saved(folder: Path, longer: Said) -> None:
    (survivor,) = longer["killed"]
    assert survivor["error"] == "LG-DIST-003"
    (run_folder,) = (folder / "killed" / "runs").iterdir()
    assert runs.newest(run_folder).name == "step-000003"


# ---- shares ----


def world_of(size: int, rank: int) -> Alone:
    """Return what a process knows of the arithmetic; nothing is exchanged."""
    world = Alone()
    world.size, world.rank = size, rank
    return world


@given(count=st.integers(1, 200), size=st.integers(1, 16))
def test_shares_cover_a_batch_once_and_evenly(count: int, size: int) -> None:
    shares = [world_of(size, rank).share(count) for rank in range(size)]
    assert [i for first, last in shares for i in range(first, last)] == list(range(count))
    sizes = [last - first for first, last in shares]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == world_of(size, 0).largest(count)


def test_one_process_takes_everything() -> None:
    assert (ALONE.share(7), ALONE.largest(7), ALONE.divisor(7)) == ((0, 7), 7, 1)
    assert ALONE.lines(4) == []
    assert processes.join(None) is ALONE


def test_steps_of_several_processes_are_not_captured() -> None:
    precision = Precision("bf16", torch.device("cuda"))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    assert choose("auto", precision, [optimizer])[0] == "captured"
    name, why = choose("auto", precision, [optimizer], processes=2)
    assert (name, "several processes" in why) == ("fused", True)
    assert refusal(lambda: choose("captured", precision, [optimizer], processes=2)).code == "LG-RUN-008"


# ---- starting ----

WHOLE_BATCHES = [(2, 3, False, 6), (2, 4, True, 4), (1, 3, True, 3), (4, 8, True, 8)]


@pytest.mark.parametrize(("size", "wished", "is_whole", "expected"), WHOLE_BATCHES)
def test_batch_sizes_count_a_process_or_all(size: int, wished: int, is_whole: bool, expected: int) -> None:
    assert processes.whole_batch(world_of(size, 0), wished, is_whole) == expected


def refusal(call: Callable[[], object]) -> LoraGraftError:
    with pytest.raises(LoraGraftError) as caught:
        call()
    return caught.value


def test_batches_that_cannot_be_shared_evenly_are_refused() -> None:
    error = refusal(lambda: processes.whole_batch(world_of(3, 0), 4, True))
    assert error.code == "LG-DIST-006"
    assert "for instance 3" in error.fix


def test_a_sweep_is_refused() -> None:
    assert refusal(lambda: processes.refuse_sweep(world_of(2, 1))).code == "LG-DIST-007"
    processes.refuse_sweep(ALONE)


LAUNCHED = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("more", "device", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "cpu", "DEEPSPEED is switched on"),
        ({"ACCELERATE_USE_FSDP": "true"}, "cpu", "FSDP is switched on"),
        ({}, "cuda:1", "--device cuda:1 names one GPU"),
        ({"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "no number"}, "cpu", "do not find each other"),
    ],
)
def test_what_a_launcher_cannot_ask_for(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, str], device: str, words: str
) -> None:
    for name, value in {**LAUNCHED, **more}.items():
        monkeypatch.setenv(name, value)
    error = refusal(lambda: processes.join(device))
    assert error.code == "LG-DIST-001"
    assert words in error.what


def test_settings_of_the_launcher_that_are_not_used_are_named() -> None:
    quiet = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    assert processes.launcher_lines(quiet) == []
    (line,) = processes.launcher_lines({**quiet, "ACCELERATE_MIXED_PRECISION": "bf16"})
    assert (
        line == "accelerate's mixed_precision 'bf16' is not used; the run's setting mixed_precision decides"
    )


def test_under_a_launcher_one_ctrl_c_may_come_twice_and_a_termination_stops_too() -> None:
    with StopFlag(launched=True) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.wanted
    with StopFlag() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


# ---- the real launcher ----

CLI = Path(processes.__file__).parents[1] / "launch" / "cli.py"


def launched(folder: Path, *flags: str, number: int = 2) -> list[str]:
    """Return the command of a run that accelerate starts, or of one without it."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(number)]
    train = ["train", "--pretrained_model_name_or_path", str(folder / "tiny.safetensors"), "--device", "cpu"]
    train += ["--tokenizer", str(folder / "tokenizer"), "--train_data_dir", str(folder / "images")]
    train += [
        "--output_dir",
        str(folder / "launched"),
        "--preview_image",
        "false",
        "--lr_scheduler",
        "constant",
    ]
    for name, value in runs.SMALL_BUCKETS.items():
        train += [f"--{name}", str(value)]
    started = [*launcher, "--main_process_port", "0"] if number > 1 else []
    return [sys.executable, *started, str(CLI), *train, *flags]


@pytest.mark.slow
def test_accelerate_starts_stops_and_one_process_continues(folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    asked = ("--max_train_steps", "400", "--save_every_n_steps", "1000", "--train_batch_size", "4")
    with subprocess.Popen(
        launched(folder, *asked, "--split_batches"),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        assert running.stdout is not None
        seen = []
        for line in running.stdout:
            seen.append(line)
            if "steps:" in line:
                running.send_signal(signal.SIGINT)
                break
        seen += running.stdout.readlines()
    text = "".join(seen)
    assert text.count("2 processes take each step together") == 1
    assert text.count("Stopped; the last finished step is saved") == 1
    (run_folder,) = (folder / "launched" / "runs").iterdir()
    step = int(runs.newest(run_folder).name.removeprefix("step-"))
    assert 1 <= step < 400
    asked = ("--max_train_steps", str(step + 2), "--train_batch_size", "4")
    again = subprocess.run(
        launched(folder, *asked, number=1), env=environment, capture_output=True, text=True, timeout=600
    )
    assert again.returncode == 0, again.stderr
    assert f"continues at step {step}" in again.stderr
    assert run_folder.name in again.stdout
    assert len(list((folder / "launched" / "runs").iterdir())) == 1


@pytest.mark.slow
def test_an_error_is_said_once(folder: Path) -> None:
    asked = launched(folder, "--train_batch_size", "3", "--split_batches", "--max_train_steps", "2")
    ended = subprocess.run(asked, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 1
    assert ended.stderr.count("LG-DIST-006") == 1
