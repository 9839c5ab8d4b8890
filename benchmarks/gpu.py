"""The measurements of one plan on a GPU in one call of less than ten minutes. `make bench-gpu PLAN=sd15`.

A plan of `PLANS` is an architecture's cases, where a step goes, for SD1.5 LoRAs side by side, and the
planner's prediction of memory against the measured peak. The results file is written again after each run,
most important first; what the time does not suffice for is left out with a word.
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
from dataclasses import dataclass, replace
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
ENGINES = ["ours fused", "ours eager"]
THEN = [*ENGINES, "comfyui", "onetrainer"]
MEMORY = ["ours checkpointed", "ours swapped", "ours fp8 base", "ours int8 base", "ours nf4 base"]
SMALLEST = ["ours smallest", "kohya smallest"]
STEPS = {"sd15-512-b1": (60, 20), "sd15-512-b8": (40, 15)}  # steps, warm-up; others as in cases.py
Parts = list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Plan:
    """What one call measures: (case, trainers) in this order; a case that comes again goes on with its table.

    ``profiled`` is seen from inside; ``together`` trains LoRAs side by side. No run of a trainer is begun
    with less than ``longest_s`` seconds left. ``compares`` says that tables need all peers.
    """

    first: Parts
    last: Parts
    profiled: str | None = None
    together: bool = False
    longest_s: float = 60.0
    compares: bool = True


PLANS: dict[str, Plan] = {
    "sd15": Plan(
        [("sd15-512-b1", PEERS_FIRST), ("sd15-512-b8", PEERS_FIRST)],
        [("sd15-512-b1", THEN), ("sd15-512-b1", MEMORY), ("sd15-512-b8", THEN)],
        "sd15-512-b1",
        together=True,
    ),
    "sdxl": Plan(
        [("sdxl-1024-b1", PEERS_FIRST), ("sdxl-1024-b4", PEERS_FIRST)],
        [("sdxl-1024-b1", ENGINES), ("sdxl-1024-b4", ENGINES)],
        "sdxl-1024-b1",
        longest_s=80.0,
    ),
    "flux": Plan(
        [("flux-1024-b1", PEERS_FIRST)],
        [("flux-1024-b1", ["diffusers loop", *ENGINES])],
        "flux-1024-b1",
        longest_s=120.0,
    ),
    "smallest": Plan(
        [("flux-1024-b1", SMALLEST), ("sdxl-1024-b1", SMALLEST), ("sd15-512-b1", SMALLEST)],
        [("sdxl-1024-b1", ["ours checkpointed", "kohya checkpointed"])],
        longest_s=120.0,
        compares=False,
    ),
    # of Flux.1's true width with fewer blocks: a card with 24 GB, and a check of the call itself
    "flux-4-8": Plan(
        [("flux-4-8-1024-b1", PEERS_FIRST)],
        [("flux-4-8-1024-b1", ["diffusers loop", *ENGINES, "ours checkpointed", "ours nf4 base"])],
        "flux-4-8-1024-b1",
        longest_s=80.0,
    ),
}
TOGETHER_STEPS = 60
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

    def __init__(self, plan: Plan, scratch: Path, clock: Clock, results: Results, threads: int) -> None:
        self.plan, self.scratch, self.clock = plan, scratch, clock
        self.results, self.threads = results, threads
        self.benches: dict[str, Bench] = {}
        self.failed: list[str] = []

    def part(self, name: str, work: Callable[[], None], runs: int = 1) -> None:
        """Do one part of so many runs if there is time for it."""
        if not self.clock.has(runs * self.plan.longest_s, name):
            return
        try:
            work()
        except (RuntimeError, subprocess.CalledProcessError) as error:
            self.failed.append(name)
            self.results.put("failed", name, str(error)[-3000:])
            print(f"FAILED {name}: {error}", flush=True)

    def measure(self, parts: Parts) -> None:
        """Run trainers on cases, each once."""
        for name, names in parts:
            if name not in self.benches:
                self.part(f"the files of {name}", partial(self.prepare, name))
            if name not in self.benches:
                continue
            bench = self.benches[name]
            chosen, absent = trainers(names)
            self.results.put("absent", ", ".join(names), absent)
            for trainer, how in chosen.items():
                self.part(f"{name} {trainer}", partial(bench.run, trainer, how, "unet"))
                self.results.put("cases", name, bench.result())

    def prepare(self, name: str) -> None:
        """Write a case's files and measure what the card could do."""
        steps, warmup = STEPS.get(name, (CASES[name].steps, CASES[name].warmup))
        case = replace(CASES[name], steps=steps, warmup=warmup)
        began = time.monotonic()
        made = prepare(self.scratch / name, case.resolution, self.scratch, case.architecture)
        bench = Bench(name, case, made, self.scratch / name, self.threads)
        bench.ceiling = ceiling_of(case, self.threads)
        bench.compares = self.plan.compares
        self.benches[name] = bench
        print(f"files of {name}: {time.monotonic() - began:.0f} s", flush=True)

    def profile(self, name: str, variant: str) -> None:
        """See where a step goes, after as many steps as the case's warm-up."""
        warmup = STEPS.get(name, (0, CASES[name].warmup))[1]
        found = step_profile.profile_case(name, variant, self.scratch, self.threads, warmup, warmup)
        self.results.put("profiles", f"{name} {variant}", found)
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
    parser.add_argument("plan", nargs="?", choices=list(PLANS), default="sd15")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--runs", type=int, default=8, help="LoRAs side by side")
    parser.add_argument("--label", help="end of the results file's name; default: gpu and the plan")
    args = parser.parse_args()
    if not has_gpu():
        sys.exit("There is no NVIDIA GPU with its driver here; make bench measures on the CPU.")
    plan = PLANS[args.plan]
    results = Results(args.label or f"gpu-{args.plan}", args.threads)
    with tempfile.TemporaryDirectory(prefix="loragraft-gpu-") as folder:
        session = Session(plan, Path(folder), Clock(args.budget), results, args.threads)
        session.measure(plan.first)
        if plan.profiled:
            session.part("profile", partial(session.profile, plan.profiled, "ours"))
        if plan.together:
            session.part("together", partial(session.side_by_side, args.runs), runs=2)
        session.measure(plan.last)
        if plan.profiled:
            session.part("profile of fused steps", partial(session.profile, plan.profiled, "ours fused"))
        session.conclude()
    print(results.where())
    if session.failed:
        sys.exit(f"FAILED: {', '.join(session.failed)}")


if __name__ == "__main__":
    main()
