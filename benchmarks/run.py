"""Our trainer against its peers: the same work on the same machine, by turns. `make bench`.

Each turn starts every trainer once as a process of its own; the parent holds the clock and reads the
steps that they print (a peer's own progress bar). Steps count after warm-up; loading, caching and saving
do not. A peer that is not there is skipped with a word, and a table without its peers does not count;
README.md lists what each needs. LORAGRAFT_SCRATCH keeps the random full-size weights for the next time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import comfyui, kohya, onetrainer
from .architectures import ARCHITECTURES
from .cases import CASES, COMFYUI_VARIANTS, ENGINES, KOHYA_VARIANTS, PEERS, TRAINED, VARIANTS, Case
from .ceiling import ceiling_of
from .common import ROOT, Work
from .machine import Results, has_gpu
from .prepare import Prepared, job_of, prepare, settings_for
from .process import OWN_STEP, RefusedError, Run, measure
from .report import TOLERANCES, check, lines_of, missing_peers, table

NOTES = {
    "sd15": "captions are encoded once, by kohya in each step; "
    "ComfyUI's node trains more layers than the others"
}


@dataclass(frozen=True)
class Trainer:
    """How to start a trainer for a job, what finds its steps, and where it runs."""

    command: Callable[[Work, Path], list[str]]
    pattern: re.Pattern[bytes] = OWN_STEP
    folder: Callable[[], Path] = lambda: ROOT
    versions: Callable[[], dict[str, str]] = dict
    settings: dict[str, Any] = field(default_factory=dict)
    ours: bool = False
    architectures: Sequence[str] = tuple(ARCHITECTURES)


def _script(name: str) -> Callable[[Work, Path], list[str]]:
    return lambda work, job: [sys.executable, "-m", f"benchmarks.{name}", str(work.write(job))]


def _no_peft() -> str | None:
    done = subprocess.run([sys.executable, "-c", "import peft"], capture_output=True)
    return "peft is not installed" if done.returncode else None


ONLY_SD15 = ("sd15",)
FLUX_ONLY = tuple(name for name, known in ARCHITECTURES.items() if known.family == "flux")
ONETRAINER = Trainer(
    onetrainer.command, onetrainer.STEP, onetrainer.folder, onetrainer.versions, architectures=ONLY_SD15
)
# name -> (how it runs, what says why it cannot)
PEER_TABLE: dict[str, tuple[Trainer, Callable[[], str | None]]] = {
    **{
        name: (
            Trainer(kohya.command, kohya.STEP, kohya.folder, kohya.versions, settings=settings),
            kohya.missing,
        )
        for name, settings in KOHYA_VARIANTS.items()
    },
    "peft loop": (Trainer(_script("peft_loop")), _no_peft),
    "diffusers loop": (
        Trainer(_script("peft_loop"), settings={"diffusers": True}, architectures=FLUX_ONLY),
        _no_peft,
    ),
    **{
        name: (
            Trainer(
                comfyui.command,
                comfyui.STEP,
                comfyui.folder,
                settings=settings,
                architectures=ONLY_SD15,
            ),
            comfyui.missing,
        )
        for name, settings in COMFYUI_VARIANTS.items()
    },
    "onetrainer": (ONETRAINER, onetrainer.missing),
}


def trainers(names: Sequence[str]) -> tuple[dict[str, Trainer], dict[str, str]]:
    """Return which of ``names`` can run here, and why the others cannot."""
    found: dict[str, Trainer] = {}
    absent: dict[str, str] = {}
    for name in names:
        if name in VARIANTS:
            found[name] = Trainer(_script("ours"), settings=VARIANTS[name], ours=True)
            continue
        trainer, missing = PEER_TABLE[name]
        if reason := missing():
            absent[name] = reason
            print(f"without {name}: {reason}", flush=True)
        else:
            found[name] = trainer
    return found, absent


class Bench:
    """The runs of one case: all trainers, turn by turn; ``result`` is what is kept of it so far."""

    def __init__(self, name: str, case: Case, prepared: Prepared, scratch: Path, threads: int) -> None:
        self.name, self.case, self.prepared, self.threads = name, case, prepared, threads
        self.scratch, self.turns = scratch, 0
        self.runs: list[Run] = []
        self.left_out: dict[str, str] = {}
        self.ceiling: dict[str, float] | None = None
        self.compares = True  # a table of memory alone needs no peer

    def turn(
        self, chosen: dict[str, Trainer], trained: Sequence[str], keep: Callable[[dict[str, Any]], None]
    ) -> None:
        """Run every trainer once, another one first each time; ``keep`` gets the result after each run."""
        shift = self.turns % max(1, len(chosen))
        order = [*list(chosen)[shift:], *list(chosen)[:shift]]
        for what in trained:
            for name in order:
                if name not in self.left_out:
                    self.run(name, chosen[name], what)
                    keep(self.result())
        self.turns += 1

    def run(self, name: str, trainer: Trainer, trained: str) -> None:
        """Run one trainer once; a variant of ours that is refused here is left out with its reason."""
        if self.case.architecture not in trainer.architectures:
            self._leave_out(name, f"the benchmark runs it on {', '.join(trainer.architectures)} only")
            return
        out = self.scratch / f"{self.name}-{len(self.runs)}-{len(self.left_out)}"
        out.mkdir(parents=True)
        settings = settings_for(name, trainer.settings, self.case)
        work = job_of(self.case, self.prepared, out, settings, trained=trained)
        run = Run(self.name, name, trained, self.turns)
        run.facts["versions"] = trainer.versions()
        try:
            measure(
                run,
                trainer.command(work, out / "job.json"),
                trainer.pattern,
                cwd=trainer.folder(),
                warmup=self.case.warmup,
                threads=self.threads,
                log=out / "log",
                gpu=self.case.device != "cpu",
            )
        except RefusedError as error:
            if name == "ours":
                raise
            self._leave_out(name, str(error))
            return
        self.runs.append(run)
        print(f"{self.name} turn {self.turns + 1} {trained} {name}: {run.step:.3f} s a step", flush=True)

    def _leave_out(self, name: str, why: str) -> None:
        self.left_out[name] = why
        print(f"{self.name} without {name}: {why}", flush=True)

    def result(self) -> dict[str, Any]:
        """Return what the runs so far show."""
        architecture = ARCHITECTURES[self.case.architecture]
        rows = table(self.runs, self.ceiling)
        missing = missing_peers(rows, self.case.device, self.case.architecture) if self.compares else []
        return {
            "work": {
                **asdict(self.case),
                "model": f"{architecture.title}, random weights",
                "rank": architecture.rank,
                "note": NOTES.get(self.case.architecture, ""),
            },
            "ceiling": self.ceiling,
            "missing_peers": missing,
            "table": rows,
            "checks": check(self.runs, TOLERANCES[self.case.precision]),
            "left_out": self.left_out,
            "runs": [asdict(run) for run in self.runs],
        }


def show(name: str, result: dict[str, Any]) -> bool:
    """Print a case's table and checks; return whether all losses agree."""
    print(f"\n{name}", *lines_of(result["table"]), *result["checks"], sep="\n")
    if result["missing_peers"]:
        print(f"THIS TABLE DOES NOT COUNT: without {', '.join(result['missing_peers'])}")
    print(flush=True)
    return not any(line.startswith("WRONG") for line in result["checks"])


def cases_here(architecture: str = "sd15") -> list[str]:
    """Name an architecture's cases for this machine."""
    device = "cuda" if has_gpu() else "cpu"
    return [
        name for name, case in CASES.items() if (case.device, case.architecture) == (device, architecture)
    ]


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="*", choices=list(CASES), help="default: those for this machine")
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default="sd15", help="of the cases")
    parser.add_argument(
        "--trainers", nargs="*", choices=[*VARIANTS, *PEER_TABLE], help="default: engines, peers"
    )
    parser.add_argument("--variants", action="store_true", help="every variant of ours, not only the engines")
    parser.add_argument("--trained", nargs="*", choices=list(TRAINED), default=["unet"])
    parser.add_argument("--turns", type=int, default=3, help="how often each trainer runs")
    parser.add_argument("--steps", type=int, help="steps of each run, warm-up included; default: the case's")
    parser.add_argument("--warmup", type=int, help="first steps that do not count")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--label", help="end of the results file's name; default: cpu or gpu")
    parser.add_argument("--no-keep", action="store_true", help="write no results file")
    args = parser.parse_args()

    names = args.trainers or [*(VARIANTS if args.variants else ENGINES), *PEERS]
    chosen, absent = trainers(names)
    cases = args.case or cases_here(args.architecture)
    label = args.label or ("gpu" if has_gpu() else "cpu")
    results = Results(label, args.threads, keep=not args.no_keep)
    results.put("call", "arguments", sys.argv[1:])
    results.put("call", "absent", absent)
    agree = True
    with tempfile.TemporaryDirectory(prefix="loragraft-bench-") as folder:
        for name in cases:
            case = replace(
                CASES[name],
                steps=args.steps or CASES[name].steps,
                warmup=CASES[name].warmup if args.warmup is None else args.warmup,
            )
            scratch = Path(folder) / name
            made = prepare(scratch, case.resolution, Path(folder), case.architecture)
            bench = Bench(name, case, made, scratch, args.threads)
            bench.ceiling = ceiling_of(case, args.threads)
            for _ in range(args.turns):
                bench.turn(chosen, args.trained, lambda result, name=name: results.put("cases", name, result))
            agree &= show(name, bench.result())
    print(results.where())
    if not agree:
        sys.exit(1)


if __name__ == "__main__":
    main()
