"""What trainers print, and how the benchmark watches a process through it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from loragraft_tests.benchmark_modules import load

common, process, run_module = map(load, ("common", "process", "run"))

LINES = {
    "ours": b"bench step 2/12 loss 1.06250000",
    "kohya": b"steps:  17%|\xe2\x96\x88\xe2\x96\x8b  | 2/12 [00:09<00:46,  4.69s/it, avr_loss=1.06]",
    "comfyui": b"Training LoRA:  17%|\xe2\x96\x88 | 2/12 [00:16<00:08,  8.46s/it, loss=1.06]",
    "onetrainer": b"step:  17%|\xe2\x96\x88| 2/12 [00:25<00:24, 1.23s/it, loss=1.06, smooth loss=1.1]",
}


def pattern_of(trainer: str) -> re.Pattern[bytes]:
    return process.OWN_STEP if trainer == "ours" else run_module.PEER_TABLE[trainer][0].pattern


@pytest.mark.parametrize("trainer", LINES)
def test_a_step_is_found_in_what_each_trainer_prints(trainer: str) -> None:
    found = pattern_of(trainer).search(LINES[trainer])
    assert found is not None and (int(found[1]), int(found[2])) == (2, 12)
    assert float(found[3]) == pytest.approx(1.06, abs=0.003)


def test_a_bar_without_a_loss_is_a_step_too() -> None:
    found = pattern_of("kohya").search(b"steps:   8%|8   | 1/12 [00:09<00:46,  4.69s/it]")
    assert found is not None and int(found[1]) == 1 and found[3] is None


@pytest.mark.parametrize("line", [b"epoch:  50%|5| 1/2 [00:09<00:46]", b"caching:  50%|5| 1/2 [00:09<00:46]"])
def test_other_bars_are_no_steps(line: bytes) -> None:
    assert not any(pattern_of(trainer).search(line) for trainer in LINES)


def test_only_the_first_sight_of_a_step_counts_and_step_0_does_not() -> None:
    seen, facts = process.Seen(), {}
    for now, line in enumerate(
        (b"bench step 0/9 loss 5", b"bench step 1/9 loss 1", b"bench step 1/9 loss 2")
    ):
        process.take(seen, facts, process.OWN_STEP, line, float(now), None)
    assert seen.clock == {1: 1.0} and seen.losses == {1: 2.0}


def test_facts_are_kept() -> None:
    facts: dict[str, Any] = {}
    for line in (b'bench facts {"versions": {"torch": "2"}}', b'bench facts {"planned": ["a {b}"]}'):
        process.take(process.Seen(), facts, process.OWN_STEP, line, 0.0, None)
    assert facts == {"versions": {"torch": "2"}, "planned": ["a {b}"]}


def test_time_between_two_shown_steps_is_shared_out() -> None:
    run = process.Run("case", "kohya", "unet", 0)
    clock = {1: 0.0, 2: 9.0, 4: 13.0, 5: 16.0}  # step 3 was not shown; steps 1 and 2 are warm-up
    flat = dict.fromkeys(clock, 0.0)
    process.count_steps(run, process.Seen(clock, flat, flat, dict.fromkeys(clock, 1.0)), warmup=2)
    assert run.seconds == [2.0, 2.0, 3.0] and run.step == 2.0 and len(run.losses) == 4


CHILD = """
import sys, json
for n in range(5):
    print(f"\\rsteps:  9%|# | {n}/4 [00:0{n}<00:01, 1.0s/it, avr_loss=0.{n}]", end="", flush=True)
print()
if sys.argv[1] != "0": print("bench facts " + json.dumps({"refused": "LG-RUN-008: not here"}))
sys.exit(int(sys.argv[1]))
"""


def watch(tmp_path: Path, status: int) -> Any:
    run = process.Run("case", "kohya", "unet", 0)
    argv = [sys.executable, "-c", CHILD, str(status)]
    pattern, log = pattern_of("kohya"), tmp_path / "log"
    process.measure(run, argv, pattern, cwd=tmp_path, warmup=1, threads=1, log=log)
    return run


def test_a_process_is_watched_through_its_progress_bar(tmp_path: Path) -> None:
    run = watch(tmp_path, 0)
    assert len(run.seconds) == 3 and run.losses[-1] == 0.4 and run.seconds_to_first_step > 0


def test_a_refusal_is_told_from_a_failure(tmp_path: Path) -> None:
    with pytest.raises(process.RefusedError, match="LG-RUN-008: not here"):
        watch(tmp_path, common.REFUSED)
    with pytest.raises(RuntimeError, match="kohya failed"):
        watch(tmp_path, 1)
