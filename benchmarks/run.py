"""Our trainer against its peers: the same work, the same machine, by turns. `make bench`, or `python -m benchmarks.run`.

Each turn starts every trainer once as a process of its own; the parent holds the clock and reads the steps that
they print (kohya's own progress bar). Steps count after warm-up; loading, caching and saving do not. A peer that is
not there is skipped with a word: kohya needs LORAGRAFT_KOHYA and LORAGRAFT_KOHYA_PYTHON, the other one `pip install peft`.
LORAGRAFT_SCRATCH keeps the random full-size checkpoint (2.1 GB) for the next time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import kohya
from common import NUM_IMAGES, REPEATS, ROOT, Work

OWN_STEP = re.compile(rb"bench step (\d+)/(\d+) loss (\S+)")
OWN_VERSIONS = re.compile(rb"bench versions (\{.*\})")
VARIANTS = {"unet": False, "unet+text": True}
LOSS_TOLERANCE = 1e-4  # ours against the plain loop, relative, each step
SAME_SIZE = 0.25  # mean loss of a trainer with other random draws, relative


@dataclass
class Run:
    """What one process showed; ``seconds`` are the steps after warm-up, ``others`` the CPUs that other work took."""

    trainer: str
    variant: str
    turn: int
    versions: dict[str, str] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    seconds_to_first_step: float = 0.0
    peak_mib: float = 0.0
    steady_mib: float = 0.0
    others: float = 0.0

    @property
    def step(self) -> float:
        """Median seconds a step."""
        return median(self.seconds)


def trainers() -> dict[str, tuple[Callable[[Work, Path], list[str]], re.Pattern[bytes]]]:
    """Return what can run here: name -> (command line for a job, pattern of its steps); says what cannot."""

    def own(script: str) -> Callable[[Work, Path], list[str]]:
        return lambda work, job: [sys.executable, str(HERE / script), str(work.write(job))]

    found = {"ours": (own("ours.py"), OWN_STEP)}
    if reason := kohya.missing():
        print(f"without kohya: {reason}")
    else:
        found["kohya"] = (lambda work, job: kohya.command(work), kohya.STEP)
    if subprocess.run([sys.executable, "-c", "import peft"], capture_output=True).returncode:
        print("without peft + plain loop: peft is not installed")
    else:
        found["peft loop"] = (own("peft_loop.py"), OWN_STEP)
    return found


def measure(run: Run, argv: list[str], pattern: re.Pattern[bytes], warmup: int, threads: int, log: Path) -> None:
    """Run one process to its end and fill in ``run``; raises RuntimeError with the log's end if it fails."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    cwd = kohya.folder() if run.trainer == "kohya" else ROOT
    started = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=cwd)
    assert process.stdout is not None
    times: dict[int, float] = {}
    losses: dict[int, float] = {}
    rest = b""
    before = (0.0, 0.0, 0.0)
    with log.open("wb") as copy:
        while chunk := os.read(process.stdout.fileno(), 65536):
            now = time.perf_counter()
            copy.write(chunk)
            *lines, rest = re.split(rb"[\r\n]", rest + chunk)
            for line in lines if not pattern.search(rest) else [*lines, rest]:
                if found := OWN_VERSIONS.search(line):
                    run.versions = json.loads(found[1])
                if not (found := pattern.search(line)) or int(found[1]) == 0:
                    continue
                step = int(found[1])
                if step not in times:
                    times[step] = now
                    run.peak_mib, run.steady_mib = memory(process.pid) or (run.peak_mib, run.steady_mib)
                    if step == warmup:
                        before = (now, cpu_seconds(), cpu_seconds(process.pid))
                    elif step == int(found[2]):
                        elapsed, all_cpus = now - before[0], cpu_seconds() - before[1]
                        run.others = (all_cpus - cpu_seconds(process.pid) + before[2]) / elapsed
                if found[3]:
                    losses[step] = float(found[3])
    if process.wait() != 0 or len(times) < warmup + 2:
        raise RuntimeError(f"{run.trainer} failed, see {log}:\n{log.read_text('utf-8', 'replace')[-3000:]}")
    run.seconds_to_first_step = times[1] - started
    run.seconds = [times[n] - times[n - 1] for n in sorted(times) if n > warmup]
    run.losses = [losses[n] for n in sorted(losses)]
    if run.trainer == "kohya":  # its bar shows the mean of the epoch so far
        means = run.losses
        run.losses = [m * (i + 1) - (means[i - 1] * i if i else 0.0) for i, m in enumerate(means)]


def memory(pid: int) -> tuple[float, float] | None:
    """Return a process's peak and present resident memory in MiB (Linux)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        return tuple(int(re.search(rf"{key}:\s+(\d+)", text)[1]) / 1024 for key in ("VmHWM", "VmRSS"))  # type: ignore[index, return-value]
    except (OSError, TypeError):
        return None


def cpu_seconds(pid: int | None = None) -> float:
    """Return the CPU time used so far by one process, or by all of the machine (Linux; else 0)."""
    try:
        if pid is None:
            user, nice, system, _, _, irq, softirq, steal = map(
                int, Path("/proc/stat").read_text().split()[1:9]
            )
            ticks = user + nice + system + irq + softirq + steal
        else:
            ticks = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0


def check(runs: list[Run]) -> list[str]:
    """Say what the losses show; a line that starts with WRONG is a failure."""
    lines = []
    for variant in dict.fromkeys(r.variant for r in runs):
        by_trainer = {r.trainer: r for r in runs if r.variant == variant and r.turn == 0}
        ours = by_trainer["ours"]
        for name, run in by_trainer.items():
            if not run.losses or not all(map(math.isfinite, run.losses)):
                lines.append(f"WRONG {variant}: {name} has losses that are not finite")
        if plain := by_trainer.get("peft loop"):
            worst = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, plain.losses, strict=True))
            word = "ok" if worst <= LOSS_TOLERANCE else "WRONG"
            lines.append(
                f"{word} {variant}: losses differ from the plain loop's by {worst:.1e} (relative, at most)"
            )
        if other := by_trainer.get("kohya"):
            a, b = (sum(r.losses) / len(r.losses) for r in (ours, other))
            word = "ok" if abs(a - b) <= SAME_SIZE * b else "WRONG"
            lines.append(f"{word} {variant}: mean loss {a:.3f}, kohya's {b:.3f} (other random draws)")
    return lines


def table(runs: list[Run]) -> list[dict[str, Any]]:
    """Return one row per variant and trainer; ratios are ours over the peer in steps/s, turn by turn."""
    rows = []
    for variant, trainer in dict.fromkeys((r.variant, r.trainer) for r in runs):
        mine = [r for r in runs if (r.variant, r.trainer) == (variant, trainer)]
        ours = {r.turn: r.step for r in runs if (r.variant, r.trainer) == (variant, "ours")}
        ratios = [r.step / ours[r.turn] for r in mine if r.turn in ours]
        step = median(s for r in mine for s in r.seconds)
        rows.append(
            {
                "variant": variant,
                "trainer": trainer,
                "steps_per_second": 1 / step,
                "seconds_per_step": step,
                "ours_over_this": median(ratios),
                "ours_over_this_by_turn": ratios,
                "peak_mib": max(r.peak_mib for r in mine),
                "steady_mib": max(r.steady_mib for r in mine),
                "seconds_to_first_step": median(r.seconds_to_first_step for r in mine),
                "others_cpus": max(r.others for r in mine),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(
        f"{'trained':<10} {'trainer':<10} {'steps/s':>8} {'s/step':>7} {'ours/this':>9}  {'by turn':<24}"
        f"{'peak MiB':>9} {'steady':>7} {'to step 1':>9} {'other CPUs':>10}"
    )
    for r in rows:
        turns = " ".join(f"{x:.2f}" for x in r["ours_over_this_by_turn"])
        print(
            f"{r['variant']:<10} {r['trainer']:<10} {r['steps_per_second']:>8.4f} {r['seconds_per_step']:>7.3f} "
            f"{r['ours_over_this']:>8.2f}x  {turns:<24}{r['peak_mib']:>9.0f} {r['steady_mib']:>7.0f} "
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
    return info


def prepare(folder: Path, resolution: int) -> tuple[Path, Path, Path]:
    """Write what all trainers read, in a process of its own; return checkpoint, images and tokenizer."""
    argv = [sys.executable, str(HERE / "prepare.py"), str(folder), str(resolution), str(NUM_IMAGES), str(REPEATS)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    checkpoint, images, tokenizer = done.stdout.splitlines()[-3:]
    return Path(checkpoint), Path(images), Path(tokenizer)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps of each run, warm-up included")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that do not count")
    parser.add_argument("--turns", type=int, default=3, help="how often each trainer runs")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--trainers", nargs="*", help="only these")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-keep", action="store_true", help="write no results file")
    args = parser.parse_args()

    chosen = {k: v for k, v in trainers().items() if not args.trainers or k in args.trainers}
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="loragraft-bench-") as name:
        scratch = Path(name)
        checkpoint, images, tokenizer = prepare(scratch, args.resolution)
        for turn in range(args.turns):
            for variant in args.variants:
                for trainer, (command, pattern) in chosen.items():
                    run = Run(trainer, variant, turn)
                    out = scratch / f"{len(runs)}"
                    out.mkdir()
                    work = Work(
                        str(checkpoint),
                        str(images),
                        str(tokenizer),
                        str(out),
                        args.steps,
                        args.resolution,
                        VARIANTS[variant],
                        args.batch_size,
                    )
                    measure(run, command(work, out / "job.json"), pattern, args.warmup, args.threads, out / "log")
                    if trainer == "kohya":
                        run.versions = kohya.versions()
                    runs.append(run)
                    print(f"turn {turn + 1} {variant} {trainer}: {run.step:.3f} s a step", flush=True)

    lines, rows = check(runs), table(runs)
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
            "precision": "fp32",
            "steps": args.steps,
            "warmup": args.warmup,
            "turns": args.turns,
            "note": "with the U-Net alone trained, ours and the peft loop encode captions once; kohya's trainer cannot for SD1.x",
        },
        "table": rows,
        "checks": lines,
        "runs": [asdict(r) for r in runs],
    }
    if not args.no_keep:
        file = HERE / "results" / f"{now:%Y-%m-%d}-cpu.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"kept in {file.relative_to(ROOT)}")
    if any(line.startswith("WRONG") for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
