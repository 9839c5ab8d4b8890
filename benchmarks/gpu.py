"""All GPU measurements in one call of less than ten minutes, into one file. `make bench-gpu`.

The cases for a GPU, where a step goes, LoRAs side by side, and the planner's prediction against the measured
peak. The results file is written again after each run, most important first; what the time does not
suffice for is left out with a word.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from . import step_profile, together
from .cases import CASES
from .ceiling import ceiling_of
from .machine import Results, has_gpu
from .prepare import prepare
from .run import Bench, show, trainers

BUDGET_S = 560.0
PEERS_FIRST = ["ours", "kohya", "peft loop"]
THEN = ["ours fused", "ours eager", "comfyui", "onetrainer"]
MEMORY = ["ours checkpointed", "ours swapped", "ours fp8 base", "ours int8 base", "ours nf4 base"]
STEPS = {"sd15-512-b1": (60, 20), "sd15-512-b8": (40, 15)}  # steps, warm-up
# (case, trainers) in this order; a case that comes again goes on with the same table.
FIRST = [("sd15-512-b1", PEERS_FIRST), ("sd15-512-b8", PEERS_FIRST)]
LAST = [("sd15-512-b1", THEN), ("sd15-512-b1", MEMORY), ("sd15-512-b8", THEN)]
LONGEST_RUN_S = 60.0  # none is begun with less time left
PROFILED, TOGETHER_STEPS = "sd15-512-b1", 60
PREDICTED = re.compile(r"memory: ([\d.]+)(?: of [\d.]+)? GiB predicted")


class Clock:
    """The time that is left."""

    def __init__(self, budget_s: float) -> None:
        self.end = time.monotonic() + budget_s

    def has(self, seconds: float, what: str) -> bool:
        """Tell whether so much is left; say it where it is not."""
        if time.monotonic() + seconds <= self.end:
            return True
        print(f"no time left for {what}", flush=True)
        return False


def predictions(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, for each run of ours, the memory that its plan predicts beside torch's allocator's peak."""
    found = []
    for run in result["runs"]:
        matches = [PREDICTED.search(line) for line in run["facts"].get("planned", [])]
        predicted = next((float(match[1]) for match in matches if match), None)
        if predicted is None or "torch_peak_mib" not in run["facts"]:
            continue
        measured = run["facts"]["torch_peak_mib"]["allocated"] / 1024
        found.append(
            {
                "case": run["case"],
                "trainer": run["trainer"],
                "predicted_gib": predicted,
                "measured_gib": measured,
                "measured_over_predicted": measured / predicted,
            }
        )
    return found


class Session:
    """One call: what is measured is kept at once, what fails is remembered and the rest goes on."""

    def __init__(self, scratch: Path, clock: Clock, results: Results, threads: int) -> None:
        self.scratch, self.clock, self.results, self.threads = scratch, clock, results, threads
        self.benches: dict[str, Bench] = {}
        self.failed: list[str] = []

    def part(self, name: str, work: Callable[[], None], seconds: float = LONGEST_RUN_S) -> None:
        """Do one part if there is time for it."""
        if not self.clock.has(seconds, name):
            return
        try:
            work()
        except (RuntimeError, subprocess.CalledProcessError) as error:
            self.failed.append(name)
            self.results.put("failed", name, str(error)[-3000:])
            print(f"FAILED {name}: {error}", flush=True)

    def measure(self, parts: list[tuple[str, list[str]]]) -> None:
        """Run trainers on cases, each once."""
        for name, names in parts:
            chosen, absent = trainers(names)
            self.results.put("absent", ", ".join(names), absent)
            bench = self.bench(name)
            for trainer, how in chosen.items():
                self.part(f"{name} {trainer}", partial(bench.run, trainer, how, "unet"))
                self.results.put("cases", name, bench.result())

    def bench(self, name: str) -> Bench:
        """Return the runs of a case so far."""
        if name not in self.benches:
            steps, warmup = STEPS[name]
            case = replace(CASES[name], steps=steps, warmup=warmup)
            made = prepare(self.scratch / name, case.resolution, self.scratch)
            self.benches[name] = Bench(name, case, made, self.scratch / name, self.threads)
            self.benches[name].ceiling = ceiling_of(case, self.threads)
        return self.benches[name]

    def profile(self, variant: str) -> None:
        """See where a step goes."""
        found = step_profile.profile_case(PROFILED, variant, self.scratch, self.threads, 20, 20)
        self.results.put("profiles", f"{PROFILED} {variant}", found)
        print(*step_profile.lines_of(found), sep="\n", flush=True)

    def side_by_side(self, runs: int) -> None:
        """Train LoRAs side by side and one by one."""
        found = together.measure_together(self.scratch, runs, TOGETHER_STEPS, "cuda", self.threads)
        self.results.put("together", f"{runs} runs", found)
        print(*together.lines_of(found), sep="\n", flush=True)
        if not together.agrees(found):
            self.failed.append("the losses of LoRAs side by side")

    def conclude(self) -> None:
        """Print all tables, and predictions of memory beside what was measured."""
        for name, bench in self.benches.items():
            if not show(name, bench.result()):
                self.failed.append(f"the losses of {name}")
            for found in predictions(bench.result()):
                self.results.put("memory", f"{name} {found['trainer']}", found)
                planned, measured = found["predicted_gib"], found["measured_gib"]
                print(f"{name} {found['trainer']}: {planned:.2f} GiB predicted, {measured:.2f} measured")


def main() -> None:
    """Measure in order of importance, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--runs", type=int, default=8, help="LoRAs side by side")
    parser.add_argument("--label", default="gpu", help="end of the results file's name")
    args = parser.parse_args()
    if not has_gpu():
        sys.exit("There is no NVIDIA GPU with its driver here; make bench measures on the CPU.")
    results = Results(args.label, args.threads)
    with tempfile.TemporaryDirectory(prefix="loragraft-gpu-") as folder:
        session = Session(Path(folder), Clock(args.budget), results, args.threads)
        session.measure(FIRST)
        session.part("profile", partial(session.profile, "ours"))
        session.part("together", partial(session.side_by_side, args.runs), 2 * LONGEST_RUN_S)
        session.measure(LAST)
        session.part("profile of fused steps", partial(session.profile, "ours fused"))
        session.conclude()
    print(results.where())
    if session.failed:
        sys.exit(f"FAILED: {', '.join(session.failed)}")


if __name__ == "__main__":
    main()
