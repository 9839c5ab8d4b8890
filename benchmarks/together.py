"""N LoRAs side by side against the same N one after the other. `python -m benchmarks.together`.

On a CPU the embedded demo base, on a GPU SD1.5 of true size. Both ways run in processes of their own, the
runs of the second way in one process with the base opened once. The losses of each run must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from .cases import CASES
from .common import ROOT, pack
from .machine import Results, has_gpu
from .prepare import prepare
from .process import environment
from .report import TOLERANCES

DEMO: dict[str, Any] = {
    "resolution": 64,
    "min_bucket_reso": 32,
    "max_bucket_reso": 128,
    "bucket_reso_steps": 8,
    "network_dim": 32,
    "network_alpha": 32.0,
    "learning_rate": 1e-3,
    "mixed_precision": "fp32",
}
TRUE_SIZE: dict[str, Any] = {
    "resolution": 512,
    "enable_bucket": False,
    "network_dim": 32,
    "network_alpha": 16.0,
    "network_train_unet_only": True,
    "mixed_precision": "bf16",
}
WAYS = ("together", "one by one")
# What the runs differ in. With one seed all have the same shapes at the same time; with many, buckets mix.
VARIED: dict[str, Callable[[int], dict[str, Any]]] = {
    "learning_rate": lambda number: {"learning_rate": 2e-4 * (number + 1)},
    "seed": lambda number: {"seed": 42 + number},
}
TAIL = 0.5  # the last half of the steps gives the rate: caching, capturing and loading are over


def child(way: str, job: str) -> dict[str, Any]:
    """Train all runs in one way; return seconds, losses, and the moment of each step."""
    given = json.loads(job)
    pack()
    import torch

    from loragraft.trainer import api

    if given["checkpoint"]:
        base = api.open_base(given["checkpoint"], tokenizer=given["tokenizer"])
    else:
        base = api.open_demo_base()
    images = given["images"] or api.demo_dataset()
    jobs = []
    for number in range(given["count"]):
        own = {"output_name": f"run{number}", "max_train_steps": given["steps"]}
        own |= VARIED[given["varied"]](number)
        data, config = api.make_both(
            {**given["settings"], **own, "train_batch_size": 1, "preview_image": False}
        )
        jobs.append((api.build_train_set(api.scan_folder(images), data), config))
    out = Path(given["out"])
    places = api.Places(runs=out / "runs", loras=out / "loras", cache=out / "cache")
    losses: list[list[float]] = [[] for _ in jobs]
    moments: list[float] = []
    begun = time.perf_counter()

    def take(number: int, event: Any) -> None:
        if isinstance(event, api.Step):
            losses[number].append(event.loss)
            moments.append(time.perf_counter() - begun)
        elif isinstance(event, api.Failed):
            raise event.error

    if way == "together":
        for number, event in api.train_together(base, jobs, places=places, device=given["device"]):
            take(number, event)
    else:
        for number, (train_set, config) in enumerate(jobs):
            for event in api.train(base, train_set, config, places=places, device=given["device"]):
                take(number, event)
    found = {"seconds": time.perf_counter() - begun, "losses": losses, "moments": moments}
    if given["device"] != "cpu":
        found["torch_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def steps_per_second(moments: list[float], count: int, way: str) -> float:
    """Return LoRA steps a second over the later part of each run, from the moments of all steps."""
    if way == "together":  # all runs end together
        tail = moments[-max(2, int(len(moments) * TAIL)) :]
        return (len(tail) - 1) / (tail[-1] - tail[0])
    each = len(moments) // count
    rates = []
    for number in range(count):
        tail = moments[number * each : (number + 1) * each][-max(2, int(each * TAIL)) :]
        rates.append((len(tail) - 1) / (tail[-1] - tail[0]))
    return median(rates)


def compare(found: dict[str, dict[str, Any]], count: int) -> dict[str, Any]:
    """Return how much faster together is, in all and by step, and how far the losses lie apart."""
    one, all_ = found["one by one"], found["together"]
    rates = {way: steps_per_second(found[way]["moments"], count, way) for way in WAYS}
    pairs = [
        (a, b)
        for mine, theirs in zip(all_["losses"], one["losses"], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    return {
        "runs": count,
        "seconds": {way: found[way]["seconds"] for way in WAYS},
        "total_time_ratio": one["seconds"] / all_["seconds"],
        "lora_steps_per_second": rates,
        "throughput_ratio": rates["together"] / rates["one by one"],
        "worst_relative_loss_difference": max(abs(a - b) / abs(b) for a, b in pairs),
        "torch_peak_mib": {way: found[way].get("torch_peak_mib") for way in WAYS},
    }


def measure_together(
    scratch: Path, count: int, steps: int, device: str, threads: int, varied: str = "learning_rate"
) -> dict[str, Any]:
    """Run both ways, each in a process of its own."""
    given: dict[str, Any] = {"count": count, "steps": steps, "device": device, "settings": DEMO}
    given["varied"] = varied
    given |= {"checkpoint": None, "tokenizer": None, "images": None}
    if device != "cpu":
        made = prepare(scratch / "together", CASES["sd15-512-b1"].resolution, scratch)
        given |= {"settings": TRUE_SIZE, "checkpoint": str(made.checkpoint)}
        given |= {"tokenizer": str(made.tokenizer), "images": str(made.images)}
    found = {}
    for way in WAYS:
        job = json.dumps({**given, "out": str(scratch / f"runs-{way.replace(' ', '-')}")})
        argv = [sys.executable, "-m", "benchmarks.together", "--child", way, job]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=environment(threads))
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        found[way] = json.loads(done.stdout.splitlines()[-1])
    return {**compare(found, count), "steps": steps, "device": device, "varied": varied}


def lines_of(result: dict[str, Any]) -> list[str]:
    """Return a comparison as text."""
    seconds, rates = result["seconds"], result["lora_steps_per_second"]
    return [
        f"{result['runs']} LoRAs of different {result['varied']}, {result['steps']} steps each, "
        f"on {result['device']}",
        *(f"  {way:<11} {seconds[way]:>7.1f} s in all, {rates[way]:>7.2f} LoRA steps/s" for way in WAYS),
        f"  together: {result['total_time_ratio']:.2f} x in all, {result['throughput_ratio']:.2f} x by step",
        f"  losses differ by {result['worst_relative_loss_difference']:.1e} at most",
    ]


def agrees(result: dict[str, Any]) -> bool:
    """Tell whether the losses are those of the single runs."""
    precision = DEMO["mixed_precision"] if result["device"] == "cpu" else TRUE_SIZE["mixed_precision"]
    return bool(result["worst_relative_loss_difference"] <= TOLERANCES[precision])


def main() -> None:
    """Measure, print and keep."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:4])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cuda" if has_gpu() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--label", default="together", help="end of the results file's name")
    parser.add_argument("--no-keep", action="store_true", help="write no results file")
    args = parser.parse_args()
    results = Results(args.label, args.threads, keep=not args.no_keep)
    wrong = False
    for varied in VARIED:
        with tempfile.TemporaryDirectory(prefix="loragraft-together-") as folder:
            scratch = Path(folder)
            found = measure_together(scratch, args.runs, args.steps, args.device, args.threads, varied)
        results.put("together", f"{args.runs} runs of different {varied}", found)
        print(*lines_of(found), sep="\n", flush=True)
        wrong |= not agrees(found)
    print(results.where())
    if wrong:
        sys.exit("WRONG the losses are not those of the single runs")


if __name__ == "__main__":
    main()
