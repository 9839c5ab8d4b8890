"""Our trainer against its peers: the same work on the same machine, by turns. `make bench`.

Each turn starts every trainer once as a process of its own; the parent holds the clock and reads the
steps that they print (kohya's own progress bar). Steps count after warm-up; loading, caching and
saving do not. A peer that is not there is skipped with a word: kohya needs LORAGRAFT_KOHYA and
LORAGRAFT_KOHYA_PYTHON, the other one `pip install peft`. LORAGRAFT_SCRATCH keeps the random full-size
checkpoint (2.1 GB) for the next time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from . import kohya
from .common import NUM_IMAGES, REPEATS, ROOT, Work
from .process import Run, measure

HERE = Path(__file__).resolve().parent

OWN_STEP = re.compile(rb"bench step (\d+)/(\d+) loss (\S+)")
VARIANTS = {"unet": False, "unet+text": True}
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}  # ours against the plain loop, relative, each step
SAME_SIZE = 0.25  # mean loss of a trainer with other random draws, relative


Trainer = tuple[Callable[[Work, Path], list[str]], re.Pattern[bytes]]


def trainers(on_gpu: bool = False) -> dict[str, Trainer]:
    """Return what can run here: name -> (command line for a job, pattern of its steps); says what cannot."""

    def own(script: str) -> Callable[[Work, Path], list[str]]:
        return lambda work, job: [sys.executable, "-m", f"benchmarks.{script}", str(work.write(job))]

    def engine(name: str) -> Callable[[Work, Path], list[str]]:
        return lambda work, job: own("ours")(replace(work, engine=name), job)

    found = {"ours": (own("ours"), OWN_STEP)}
    if on_gpu:
        found["ours eager"] = (engine("eager"), OWN_STEP)
    if reason := kohya.missing():
        print(f"without kohya: {reason}")
    else:
        found["kohya"] = (lambda work, job: kohya.command(work), kohya.STEP)
    if subprocess.run([sys.executable, "-c", "import peft"], capture_output=True).returncode:
        print("without peft + plain loop: peft is not installed")
    else:
        found["peft loop"] = (own("peft_loop"), OWN_STEP)
    return found


def run_one(run: Run, work: Work, trainer: Trainer, warmup: int, threads: int) -> None:
    """Run one trainer once and fill in ``run``."""
    command, pattern = trainer
    out = Path(work.out)
    kohyas = run.trainer == "kohya"
    measure(
        run,
        command(work, out / "job.json"),
        pattern,
        cwd=kohya.folder() if kohyas else ROOT,
        warmup=warmup,
        threads=threads,
        log=out / "log",
        gpu=work.device != "cpu",
    )
    if kohyas:
        run.versions = kohya.versions()


def check(runs: list[Run], tolerance: float) -> list[str]:
    """Say what the losses show; a line that starts with WRONG is a failure."""
    lines = []
    for variant in dict.fromkeys(r.variant for r in runs):
        by_trainer = {r.trainer: r for r in runs if r.variant == variant and r.turn == 0}
        for name, run in by_trainer.items():
            if not run.losses or not all(map(math.isfinite, run.losses)):
                lines.append(f"WRONG {variant}: {name} has losses that are not finite")
        ours = by_trainer.get("ours")
        if ours and (plain := by_trainer.get("peft loop")):
            worst = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, plain.losses, strict=True))
            word = "ok" if worst <= tolerance else "WRONG"
            lines.append(
                f"{word} {variant}: losses differ from the plain loop's by {worst:.1e} (relative, at most)"
            )
        if ours and (other := by_trainer.get("kohya")):
            a, b = sum(ours.losses) / len(ours.losses), other.losses[-1]  # kohya's bar shows the mean so far
            word = "ok" if abs(a - b) <= SAME_SIZE * b else "WRONG"
            lines.append(f"{word} {variant}: mean loss {a:.3f}, kohya's {b:.3f} (other random draws)")
    return lines


def table(runs: list[Run]) -> list[dict[str, Any]]:
    """Return one row per variant and trainer; ratios are ours over the peer in steps/s, turn by turn."""
    rows = []
    for variant, trainer in dict.fromkeys((r.variant, r.trainer) for r in runs):
        mine = [r for r in runs if (r.variant, r.trainer) == (variant, trainer)]
        ours = {r.turn: r for r in runs if (r.variant, r.trainer) == (variant, "ours")}
        ratios = [r.step / ours[r.turn].step for r in mine if r.turn in ours]
        cpu_ratios = [r.cpu_step / ours[r.turn].cpu_step for r in mine if r.turn in ours and r.cpu_step]
        step = median(s for r in mine for s in r.seconds)
        rows.append(
            {
                "variant": variant,
                "trainer": trainer,
                "steps_per_second": 1 / step,
                "seconds_per_step": step,
                "ours_over_this": median(ratios) if ratios else math.nan,
                "ours_over_this_by_turn": ratios,
                "cpu_seconds_per_step": median(s for r in mine for s in r.cpu_seconds),
                "ours_over_this_by_cpu_time": median(cpu_ratios) if cpu_ratios else math.nan,
                "peak_mib": max(r.peak_mib for r in mine),
                "gpu_mib": max(r.gpu_mib for r in mine),
                "own_mib": max(r.own_mib for r in mine),
                "seconds_to_first_step": median(r.seconds_to_first_step for r in mine),
                "others_cpus": max(r.others for r in mine),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(
        f"{'trained':<10} {'trainer':<10} {'steps/s':>8} {'s/step':>7} {'ours/this':>9}  {'by turn':<20}"
        f"{'CPU s/step':>10} {'ratio':>6} {'peak MiB':>9} {'own':>7} {'GPU MiB':>8} "
        f"{'to step 1':>9} {'other CPUs':>10}"
    )
    for r in rows:
        turns = " ".join(f"{x:.2f}" for x in r["ours_over_this_by_turn"])
        print(
            f"{r['variant']:<10} {r['trainer']:<10} "
            f"{r['steps_per_second']:>8.4f} {r['seconds_per_step']:>7.3f} "
            f"{r['ours_over_this']:>8.2f}x  {turns:<20}"
            f"{r['cpu_seconds_per_step']:>10.3f} {r['ours_over_this_by_cpu_time']:>5.2f}x "
            f"{r['peak_mib']:>9.0f} {r['own_mib']:>7.0f} {r['gpu_mib']:>8.0f} "
            f"{r['seconds_to_first_step']:>8.1f}s {r['others_cpus']:>10.2f}"
        )


def machine(threads: int) -> dict[str, Any]:
    """Describe the machine."""
    info: dict[str, Any] = {"system": platform.platform(), "cores": os.cpu_count(), "threads": threads}
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
        info["cpu"] = re.search(r"model name\s*: (.*)", cpuinfo)[1]  # type: ignore[index]
        info["avx512"] = "avx512f" in cpuinfo
        total = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]  # type: ignore[index]
        info["memory_gib"] = round(int(total) / 2**20, 1)
    except (OSError, TypeError):
        info["cpu"] = platform.processor()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if shutil.which(query[0]):
        info["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return info


def prepare(folder: Path, resolution: int) -> tuple[Path, Path, Path]:
    """Write what all trainers read, in a process of its own; return checkpoint, images and tokenizer."""
    sizes = map(str, (resolution, NUM_IMAGES, REPEATS))
    argv = [sys.executable, "-m", "benchmarks.prepare", str(folder), *sizes]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    checkpoint, images, tokenizer = done.stdout.splitlines()[-3:]
    return Path(checkpoint), Path(images), Path(tokenizer)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="steps of each run, warm-up included")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that do not count")
    parser.add_argument("--turns", type=int, default=3, help="how often each trainer runs")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--trainers", nargs="*", help="only these")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--label", default="cpu", help="end of the results file's name")
    parser.add_argument("--no-keep", action="store_true", help="write no results file")
    args = parser.parse_args()

    chosen = {
        k: v for k, v in trainers(args.device != "cpu").items() if not args.trainers or k in args.trainers
    }
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="loragraft-bench-") as name:
        paths = prepare(Path(name), args.resolution)
        for turn in range(args.turns):
            order = list(chosen)[turn % len(chosen) :] + list(chosen)[: turn % len(chosen)]
            for variant in args.variants:
                for trainer in order:
                    out = Path(name) / f"{len(runs)}"
                    out.mkdir()
                    size = (args.steps, args.resolution, VARIANTS[variant], args.batch_size)
                    work = Work(*map(str, (*paths, out)), *size, args.device, args.precision)
                    runs.append(Run(trainer, variant, turn))
                    run_one(runs[-1], work, chosen[trainer], args.warmup, args.threads)
                    print(f"turn {turn + 1} {variant} {trainer}: {runs[-1].step:.3f} s a step", flush=True)

    lines, rows = check(runs, TOLERANCES[args.precision]), table(runs)
    print()
    show(rows)
    print(*lines, sep="\n")
    now = datetime.now(timezone.utc)
    result = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine(args.threads),
        "work": {
            "model": "SD1.5, random weights",
            "resolution": args.resolution,
            "batch_size": args.batch_size,
            "rank": Work.rank,
            "precision": args.precision,
            "steps": args.steps,
            "warmup": args.warmup,
            "turns": args.turns,
            "note": "U-Net alone: ours and the peft loop encode captions once; kohya's cannot for SD1.x",
        },
        "table": rows,
        "checks": lines,
        "runs": [asdict(r) for r in runs],
    }
    if not args.no_keep:
        file = HERE / "results" / f"{now:%Y-%m-%d}-{args.label}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"kept in {file.relative_to(ROOT)}")
    if any(line.startswith("WRONG") for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
