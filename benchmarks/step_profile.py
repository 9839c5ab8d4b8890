"""Where a step of ours goes, by part, and what it dispatches. `python -m benchmarks.step_profile`.

Steps run as users get them, with a clock around the loop's parts; then one more under a counter of
dispatched operations (a replayed CUDA graph dispatches next to none), and on a GPU three under torch's
profiler for the time in which the device was busy. Gaps are what remains of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .cases import CASES, VARIANTS
from .common import ROOT, Work, open_base, pack
from .machine import Results, has_gpu
from .ours import settings
from .prepare import job_of, prepare, settings_for
from .process import environment
from .run import cases_here

# name -> the part that contains it; a part's own time is without what it contains
PARTS = {"data": None, "encode": "forward", "forward": "gradients", "gradients": None, "update": None}
WORDS = {
    "data": "draws of the next batch",
    "encode": "encoding of captions",
    "forward": "forward pass",
    "gradients": "backward pass (a replayed graph: forward too)",
    "update": "clip and optimizer",
    "gaps": "all else: loop, log, waiting",
}
PROFILED = 3  # steps under torch's profiler
TOP = 8  # operations named


@dataclass
class Clock:
    """Seconds of each part in the step under way; on a GPU from events on the stream, read at its end."""

    on_gpu: bool
    seconds: Counter[str] = field(default_factory=Counter)
    _pending: list[tuple[str, Any, Any]] = field(default_factory=list)

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``work`` with a clock around it."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._mark()
            result = work(*args, **kwargs)
            end = self._mark()
            if begin is not None and end is not None:
                self._pending.append((name, begin, end))
            return result

        return timed

    def read(self) -> dict[str, float]:
        """Return each part's own seconds, and begin anew."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
        for name, begin, end in self._pending:
            self.seconds[name] += begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin
        own = own_times(self.seconds)
        self.seconds.clear()
        self._pending.clear()
        return own

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        import torch

        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def own_times(seconds: dict[str, float]) -> dict[str, float]:
    """Take from each part what the parts inside it took."""
    own = {name: seconds.get(name, 0.0) for name in PARTS}
    for name, outer in PARTS.items():
        if outer is not None:
            own[outer] -= seconds.get(name, 0.0)
    return own


def child(job: str, warmup: int, timed: int) -> dict[str, Any]:
    """Train the job with clocks; return medians of the timed steps."""
    work = Work.read(job)
    pack()
    import torch

    from loragraft.trainer import api
    from loragraft.trainer import opened as opened_module
    from loragraft.trainer import together as together_module

    clock = Clock(work.device != "cpu")
    watched: dict[str, Any] = {}

    def open_runs(*args: Any) -> Any:
        (run,) = opened = original(*args)
        run.feed = clock.around("data", run.feed)
        run.inputs.embed = clock.around("encode", run.inputs.embed)
        run.engine.backward = clock.around("gradients", run.engine.backward)
        run.engine.update = clock.around("update", run.engine.update)
        watched["engine"] = run.engine.name
        return opened

    # The loop has no hooks for this; the functions that it looks up by name are replaced in this process.
    original = together_module.open_runs
    together_module.open_runs = open_runs
    opened_module.micro_losses = clock.around("forward", opened_module.micro_losses)
    base = open_base(work)
    data, config = settings(work)
    train_set = api.build_train_set(api.scan_folder(work.images), data)
    out = Path(work.out)
    places = api.Places(runs=out / "runs", loras=out / "loras", cache=out / "cache")
    events = api.train(base, train_set, config, places=places, device=work.device)
    steps = (event for event in events if isinstance(event, api.Step))

    for _ in range(warmup):
        next(steps)
    clock.read()
    found = [_timed_step(steps, clock) for _ in range(timed)]
    result = {"engine": watched["engine"], **{k: median(f[k] for f in found) for k in found[0]}}
    with _counting() as (counts, views):
        next(steps)
    result["operations"], result["views"] = sum(counts.values()), sum(views.values())
    result["top_operations"] = dict(counts.most_common(TOP))
    if clock.on_gpu:
        result |= _busy(steps)
    events.close()
    result["torch"] = torch.__version__
    return result


def _timed_step(steps: Iterator[Any], clock: Clock) -> dict[str, float]:
    begun, cpu = time.perf_counter(), time.process_time()
    next(steps)
    parts = clock.read()
    wall = time.perf_counter() - begun
    return {**parts, "gaps": wall - sum(parts.values()), "wall": wall, "cpu": time.process_time() - cpu}


def _counting() -> Any:
    """Return a context that counts the operations dispatched in it, those of the backward pass too.

    Views are counted apart: they launch nothing.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    counts: Counter[str] = Counter()
    views: Counter[str] = Counter()

    class Count(TorchDispatchMode):  # type: ignore[misc]
        def __enter__(self) -> tuple[Counter[str], Counter[str]]:
            super().__enter__()
            return counts, views

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
            is_view = bool(aliases) and not any(alias.is_write for alias in aliases)
            (views if is_view else counts)[str(func)] += 1
            return func(*args, **(kwargs or {}))

    return Count()


def _busy(steps: Iterator[Any]) -> dict[str, float]:
    """Return a step's kernels, and the seconds in which the device ran them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            next(steps)
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    microseconds = sum(e.self_device_time_total for e in kernels)
    return {"kernels": len(kernels) / PROFILED, "busy": microseconds / 1e6 / PROFILED}


def lines_of(result: dict[str, Any]) -> list[str]:
    """Return one profile as text."""
    wall = result["wall"]
    lines = [f"{result['engine']} steps, {wall * 1e3:.1f} ms"]
    for name, words in WORDS.items():
        lines.append(f"  {words:<48} {result[name] * 1e3:>9.2f} ms {result[name] / wall:>7.1%}")
    outside = result["data"] + result["update"] + result["gaps"]
    lines.append(f"  {'outside forward and backward':<48} {outside * 1e3:>9.2f} ms {outside / wall:>7.1%}")
    if "busy" in result:
        gap = wall - result["busy"]
        lines.append(f"  {'device idle':<48} {gap * 1e3:>9.2f} ms {gap / wall:>7.1%}")
        lines.append(f"  {result['kernels']:.0f} kernels")
    top = ", ".join(f"{name} {count}" for name, count in result["top_operations"].items())
    lines.append(f"  {result['operations']} operations and {result['views']} views dispatched: {top}")
    return lines


def profile_case(
    name: str, variant: str, scratch: Path, threads: int, warmup: int, timed: int
) -> dict[str, Any]:
    """Profile one case with one variant's settings, in a process of its own."""
    case, out = CASES[name], scratch / f"profile-{variant.replace(' ', '-')}"
    prepared = prepare(out, case.resolution, scratch, case.architecture)
    settings = settings_for(variant, VARIANTS[variant], case)
    work = job_of(case, prepared, out, settings, steps=warmup + timed + PROFILED + 2)
    arguments = (work.write(out / "job.json"), warmup, timed)
    argv = [sys.executable, "-m", "benchmarks.step_profile", "--child", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=environment(threads))
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Profile, print and keep."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], *map(int, sys.argv[3:5]))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=list(CASES), help="default: the first for this machine")
    parser.add_argument("--variant", choices=list(VARIANTS), default="ours")
    parser.add_argument("--warmup", type=int, default=20 if has_gpu() else 2)
    parser.add_argument("--steps", type=int, default=20 if has_gpu() else 4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--label", default="profile", help="end of the results file's name")
    parser.add_argument("--no-keep", action="store_true", help="write no results file")
    args = parser.parse_args()
    name = args.case or cases_here()[0]
    results = Results(args.label, args.threads, keep=not args.no_keep)
    with tempfile.TemporaryDirectory(prefix="loragraft-profile-") as folder:
        found = profile_case(name, args.variant, Path(folder), args.threads, args.warmup, args.steps)
    results.put("profiles", f"{name} {args.variant}", found)
    print(f"{name}, {args.variant}", *lines_of(found), results.where(), sep="\n")


if __name__ == "__main__":
    main()
