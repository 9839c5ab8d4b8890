"""Run one trainer as a process of its own and watch its steps, memory and CPU time from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from .common import REFUSED

FACTS = re.compile(rb"bench facts (\{.*\})")
OWN_STEP = re.compile(rb"bench step (\d+)/(\d+) loss (\S+)")
WATCH_EVERY_S = 0.1


class RefusedError(RuntimeError):
    """The trainer refused the settings on this machine; the message says why."""


@dataclass
class Run:
    """What one process showed; lists hold one value a step after warm-up, ``losses`` one for every step.

    ``peak_mib`` is all that was resident, ``own_mib`` the same without mapped files, whose pages the system
    takes back when it needs them, ``gpu_mib`` what the GPU's memory grew by; each the most over the
    whole life of the process. ``others`` counts the CPUs that other work on the machine took meanwhile:
    above a few tenths, trust ``cpu_seconds`` (with one thread) more than ``seconds``.
    """

    case: str
    trainer: str
    trained: str
    turn: int
    facts: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    seconds_to_first_step: float = 0.0
    peak_mib: float = 0.0
    own_mib: float = 0.0
    gpu_mib: float = 0.0
    others: float = 0.0

    @property
    def step(self) -> float:
        """Median seconds a step."""
        return median(self.seconds)

    @property
    def cpu_step(self) -> float:
        """Median CPU seconds a step."""
        return median(self.cpu_seconds)


@dataclass
class Seen:
    """Steps as they appeared: step number -> clock, CPU seconds of the process, of the machine; losses."""

    clock: dict[int, float] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)
    machine: dict[int, float] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a trainer: its threads, no network."""
    count = str(threads)
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
    }


def measure(
    run: Run,
    argv: list[str],
    pattern: re.Pattern[bytes],
    *,
    cwd: Path,
    warmup: int,
    threads: int,
    log: Path,
    gpu: bool = False,
) -> None:
    """Run one process to its end and fill in ``run``.

    ``pattern`` finds a step's number, the number of all steps and the loss in what the process prints.
    Raises RefusedError where the trainer refused, RuntimeError with the log's end where it failed.
    """
    started, seen = time.perf_counter(), Seen()
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(threads), cwd=cwd
    )
    watch = _Memory(process.pid, gpu)
    try:
        for now, line in _lines(process, log):
            take(seen, run.facts, pattern, line, now, process.pid)
        status = process.wait()
    finally:
        process.kill()
        watch.stop()
    run.peak_mib, run.own_mib, run.gpu_mib = watch.peak_mib, watch.own_mib, watch.gpu_mib
    if status == REFUSED and "refused" in run.facts:
        raise RefusedError(run.facts["refused"])
    if status != 0 or max(seen.clock, default=0) < warmup + 2:
        raise RuntimeError(f"{run.trainer} failed, see {log}:\n{log.read_text('utf-8', 'replace')[-3000:]}")
    run.seconds_to_first_step = seen.clock[min(seen.clock)] - started
    count_steps(run, seen, warmup)


def take(
    seen: Seen, facts: dict[str, Any], pattern: re.Pattern[bytes], line: bytes, now: float, pid: int | None
) -> None:
    """Take what one line of a trainer's output tells: facts, or that a step is done."""
    if found := FACTS.search(line):
        facts.update(json.loads(found[1]))
    if not (found := pattern.search(line)) or int(found[1]) == 0:
        return
    step = int(found[1])
    if step not in seen.clock:
        seen.clock[step] = now
        seen.cpu[step], seen.machine[step] = (cpu_time(pid), cpu_time()) if pid else (0.0, 0.0)
    if found[3]:
        seen.losses[step] = float(found[3])


def count_steps(run: Run, seen: Seen, warmup: int) -> None:
    """Fill in what the steps after ``warmup`` took.

    A progress bar that is redrawn more seldom than steps are taken shows some of them only: what lies
    between two shown ones is shared out evenly.
    """
    shown = [n for n in sorted(seen.clock) if n >= max(1, warmup)]
    for n, m in pairwise(shown):
        run.seconds += [(seen.clock[m] - seen.clock[n]) / (m - n)] * (m - n)
        run.cpu_seconds += [(seen.cpu[m] - seen.cpu[n]) / (m - n)] * (m - n)
    first, last = shown[0], shown[-1]
    others = (seen.machine[last] - seen.machine[first]) - (seen.cpu[last] - seen.cpu[first])
    run.others = others / max(seen.clock[last] - seen.clock[first], 1e-9)
    run.losses = run.facts.pop("losses", None) or [seen.losses[n] for n in sorted(seen.losses)]


class _Memory:
    """Read a process's memory, and the GPU's, until stopped: the same measure for every trainer."""

    def __init__(self, pid: int, gpu: bool) -> None:
        self.pid, self.peak_mib, self.own_mib, self.gpu_mib = pid, 0.0, 0.0, 0.0
        self._before = gpu_memory() if gpu else 0.0
        self._gpu, self._stop = gpu, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(WATCH_EVERY_S):
            peak, own = memory(self.pid)
            self.peak_mib, self.own_mib = max(self.peak_mib, peak), max(self.own_mib, own)
            if self._gpu:
                self.gpu_mib = max(self.gpu_mib, gpu_memory() - self._before)


def gpu_memory() -> float:
    """Return the memory in use on the first GPU as its driver counts it, in MiB."""
    argv = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(argv, capture_output=True, text=True).stdout.split()[0])


def _lines(process: subprocess.Popen[bytes], log: Path) -> Iterator[tuple[float, bytes]]:
    """Yield each line with the time of its arrival; progress bars end theirs with a carriage return only.

    A bar's newest text has no end yet, so the unfinished line is yielded too, again and again.
    """
    assert process.stdout is not None
    rest = b""
    with log.open("wb", buffering=0) as copy:
        while chunk := os.read(process.stdout.fileno(), 65536):
            now = time.perf_counter()
            copy.write(chunk)
            *lines, rest = re.split(rb"[\r\n]", rest + chunk)
            for line in lines:
                yield now, line
            if rest and not rest.startswith(b"bench "):  # our own lines end with a line break
                yield now, rest


def memory(pid: int) -> tuple[float, float]:
    """Return the peak resident memory and the present one without mapped files, in MiB (Linux; else 0)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0, 0.0
    found = dict(re.findall(r"(VmHWM|RssAnon):\s+(\d+)", text))
    return int(found.get("VmHWM", 0)) / 1024, int(found.get("RssAnon", 0)) / 1024


def cpu_time(pid: int | None = None) -> float:
    """Return the CPU seconds used so far by one process, or by all of the machine (Linux; else 0)."""
    try:
        if pid is None:
            fields = list(map(int, Path("/proc/stat").read_text().split()[1:8]))
            ticks = sum(fields) - fields[3] - fields[4]  # all but idle and waiting for a disk
        else:
            ticks = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0
