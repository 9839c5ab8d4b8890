"""What the runs of one case say: do the losses agree, and who is how fast. Pure functions of runs."""

from __future__ import annotations

import math
from statistics import mean, median
from typing import Any

from .cases import LOSSY, NEEDED_ALWAYS, NEEDED_PEERS
from .process import Run

PLAIN_LOOP = "peft loop"  # it is fed our draws, so its losses must be ours
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}  # ours against the plain loop, relative, each step
SAME_SIZE = 0.25  # mean loss of a trainer with other random draws, or on a lossy base, relative


def check(runs: list[Run], tolerance: float) -> list[str]:
    """Say what the losses show; a line that starts with WRONG is a failure."""
    lines = []
    for trained in dict.fromkeys(r.trained for r in runs):
        first: dict[str, Run] = {}
        for run in runs:
            if run.trained == trained:
                first.setdefault(run.trainer, run)
        for name, run in first.items():
            if not run.losses or not all(map(math.isfinite, run.losses)):
                lines.append(f"WRONG {trained}: {name} has losses that are not finite")
        for name, run in first.items():
            if name.startswith("ours"):
                if PLAIN_LOOP in first and name not in LOSSY:
                    lines.append(_step_by_step(trained, run, first[PLAIN_LOOP], tolerance))
                elif PLAIN_LOOP in first:
                    lines.append(_same_size(trained, run, first[PLAIN_LOOP], "rounded base"))
            elif name != PLAIN_LOOP and "ours" in first:
                lines.append(_same_size(trained, run, first["ours"], "other random draws"))
    return lines


def _step_by_step(trained: str, run: Run, plain: Run, tolerance: float) -> str:
    if len(run.losses) != len(plain.losses):
        return (
            f"WRONG {trained}: {run.trainer} took {len(run.losses)} steps, {PLAIN_LOOP} {len(plain.losses)}"
        )
    worst = max(abs(a - b) / abs(b) for a, b in zip(run.losses, plain.losses, strict=True))
    word = "ok" if worst <= tolerance else "WRONG"
    return f"{word} {trained}: losses of {run.trainer} differ from the plain loop's by {worst:.1e} at most"


def _same_size(trained: str, run: Run, other: Run, why: str) -> str:
    a, b = mean_loss(run), mean_loss(other)
    word = "ok" if abs(a - b) <= SAME_SIZE * abs(b) else "WRONG"
    return f"{word} {trained}: mean loss of {run.trainer} {a:.3f}, of {other.trainer} {b:.3f} ({why})"


def mean_loss(run: Run) -> float:
    """Return the mean of a run's losses; kohya's bar shows the mean so far, so its last one is that."""
    return run.losses[-1] if run.trainer.startswith("kohya") else mean(run.losses)


def table(runs: list[Run], ceiling: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Return one row for each trainer and what it trained; ratios are ours over it in steps/s, turn by turn.

    ``ceiling`` holds the FLOPs of a step of the U-Net and the machine's matmul rate in FLOP/s.
    """
    rows = []
    for trained, trainer in dict.fromkeys((r.trained, r.trainer) for r in runs):
        mine = [r for r in runs if (r.trained, r.trainer) == (trained, trainer)]
        ours = {r.turn: r for r in runs if (r.trained, r.trainer) == (trained, "ours")}
        ratios = [r.step / ours[r.turn].step for r in mine if r.turn in ours]
        cpu_ratios = [r.cpu_step / ours[r.turn].cpu_step for r in mine if r.turn in ours and r.cpu_step]
        step = median(s for r in mine for s in r.seconds)
        share = None
        if ceiling and trained == "unet":
            share = share_of_ceiling(ceiling["step_flops"], step, ceiling["matmul_flops_per_second"])
        rows.append(
            {
                "trained": trained,
                "trainer": trainer,
                "steps_per_second": 1 / step,
                "seconds_per_step": step,
                "ours_over_this": median(ratios) if ratios else None,
                "ours_over_this_by_turn": ratios,
                "share_of_matmul_ceiling": share,
                "cpu_seconds_per_step": median(s for r in mine for s in r.cpu_seconds),
                "ours_over_this_by_cpu_time": median(cpu_ratios) if cpu_ratios else None,
                "peak_mib": max(r.peak_mib for r in mine),
                "own_mib": max(r.own_mib for r in mine),
                "gpu_mib": max(r.gpu_mib for r in mine),
                "seconds_to_first_step": median(r.seconds_to_first_step for r in mine),
                "others_cpus": max(r.others for r in mine),
            }
        )
    return rows


def share_of_ceiling(flops: float, seconds: float, rate: float) -> float:
    """Return which share of the matmul rate (FLOP/s) a step of ``flops`` reaches in ``seconds``."""
    return flops / seconds / rate


def missing_peers(rows: list[dict[str, Any]], device: str, architecture: str = "sd15") -> list[str]:
    """Name the peers that a table needs and lacks; without them it does not count."""
    there = {row["trainer"] for row in rows}
    needed = NEEDED_PEERS[device] if architecture == "sd15" else NEEDED_ALWAYS
    return [name for name in needed if name not in there]


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table as text."""
    lines = [
        f"{'trained':<10} {'trainer':<20} {'steps/s':>8} {'s/step':>7} {'ours/this':>9}  {'by turn':<20}"
        f"{'ceiling':>7} {'CPU s/step':>10} {'ratio':>6} {'peak MiB':>9} {'own':>7} {'GPU MiB':>8} "
        f"{'to step 1':>9} {'other CPUs':>10}"
    ]
    for r in rows:
        turns = " ".join(f"{x:.2f}" for x in r["ours_over_this_by_turn"])
        lines.append(
            f"{r['trained']:<10} {r['trainer']:<20} "
            f"{r['steps_per_second']:>8.4f} {r['seconds_per_step']:>7.3f} "
            f"{_or_dash(r['ours_over_this'], 8, '.2f')}x  {turns:<20}"
            f"{_or_dash(r['share_of_matmul_ceiling'], 7, '.1%')} "
            f"{r['cpu_seconds_per_step']:>10.3f} {_or_dash(r['ours_over_this_by_cpu_time'], 5, '.2f')}x "
            f"{r['peak_mib']:>9.0f} {r['own_mib']:>7.0f} {r['gpu_mib']:>8.0f} "
            f"{r['seconds_to_first_step']:>8.1f}s {r['others_cpus']:>10.2f}"
        )
    return lines


def _or_dash(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"
