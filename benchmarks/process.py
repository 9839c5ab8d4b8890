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

VERSIONS = re.compile(rb"bench versions (\{.*\})")


@dataclass
class Run:
    """What one process showed; lists hold one value a step after warm-up, ``losses`` one for every step.

    ``own_mib`` is the largest resident memory at a step's end without mapped files, whose pages the
    system takes back when it needs them. ``others`` counts the CPUs that other work on the machine took
    meanwhile: above a few tenths, trust ``cpu_seconds`` (with one thread) more than ``seconds``.
    """

    trainer: str
    variant: str
    turn: int
    versions: dict[str, str] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    seconds_to_first_step: float = 0.0
    peak_mib: float = 0.0
    own_mib: float = 0.0
    gpu_mib: float = 0.0  # most memory in use on the GPU meanwhile, all processes and the driver's own
    others: float = 0.0

    @property
    def step(self) -> float:
        """Median seconds a step."""
        return median(self.seconds)

    @property
    def cpu_step(self) -> float:
        """Median CPU seconds a step."""
        return median(self.cpu_seconds)


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
    """Run one process to its end and fill in ``run``; raises RuntimeError with the log's end if it fails.

    ``pattern`` finds a step's number, the number of all steps and the loss in what the process prints.
    """
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    started = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=cwd)
    times: dict[int, float] = {}
    cpu: dict[int, float] = {}
    machine: dict[int, float] = {}
    losses: dict[int, float] = {}
    watch = _GpuMemory(gpu)
    for now, line in _lines(process, log):
        if found := VERSIONS.search(line):
            run.versions = json.loads(found[1])
        if not (found := pattern.search(line)) or int(found[1]) == 0:
            continue
        step = int(found[1])
        if step not in times:
            times[step], cpu[step], machine[step] = now, cpu_time(process.pid), cpu_time()
            run.peak_mib, own = memory(process.pid)
            run.own_mib = max(run.own_mib, own)
        if found[3]:
            losses[step] = float(found[3])
    run.gpu_mib = watch.stop()
    if process.wait() != 0 or len(times) < 2 or max(times) < warmup + 2:
        raise RuntimeError(f"{run.trainer} failed, see {log}:\n{log.read_text('utf-8', 'replace')[-3000:]}")
    run.seconds_to_first_step = times[min(times)] - started
    # A progress bar that is redrawn more seldom than steps are taken shows some of them only.
    shown = [n for n in sorted(times) if n >= max(1, warmup)]
    first, last = shown[0], shown[-1]
    for n, m in pairwise(shown):
        run.seconds += [(times[m] - times[n]) / (m - n)] * (m - n)
        run.cpu_seconds += [(cpu[m] - cpu[n]) / (m - n)] * (m - n)
    others = (machine[last] - machine[first]) - (cpu[last] - cpu[first])
    run.others = others / (times[last] - times[first])
    run.losses = [losses[n] for n in sorted(losses)]


class _GpuMemory:
    """Ask the driver for the memory in use until stopped: the same measure for every trainer."""

    def __init__(self, wanted: bool) -> None:
        self.peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        if wanted:
            self._thread.start()

    def stop(self) -> float:
        """Return the most that was seen, in MiB."""
        self._stop.set()
        return self.peak

    def _ask(self) -> None:
        argv = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._stop.wait(0.25):
            done = subprocess.run(argv, capture_output=True, text=True)
            self.peak = max(self.peak, float(done.stdout.split()[0]))


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
            for line in [*lines, rest]:
                yield now, line


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
