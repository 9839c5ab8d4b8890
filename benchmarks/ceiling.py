"""What the machine could do: its matmul rate, and the FLOPs of a step. Each in a process of its own.

`python -m benchmarks.ceiling rate DEVICE PRECISION` and `... flops ARCHITECTURE RESOLUTION BATCH RANK`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from .architectures import ARCHITECTURES
from .cases import Case
from .common import ROOT, pack
from .process import environment

SIZES = {"cpu": (1024, 2048, 3072), "cuda": (4096, 8192)}  # edges of square matrices; the best rate counts
SECONDS_EACH = 2.0


def ceiling_of(case: Case, threads: int) -> dict[str, float]:
    """Return the FLOPs of a step of the denoiser (forward, backward, LoRA) and the matmul rate in FLOP/s.

    A forward pass that checkpointing does once more is not counted: it adds nothing to what is learnt.
    """
    rate = _child(threads, "rate", case.device, case.precision)
    rank = ARCHITECTURES[case.architecture].rank
    flops = _child(threads, "flops", case.architecture, case.resolution, case.batch_size, rank)
    return {**flops, **rate}


def _child(threads: int, *arguments: object) -> dict[str, float]:
    argv = [sys.executable, "-m", "benchmarks.ceiling", *map(str, arguments)]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=True, cwd=ROOT, env=environment(threads)
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def matmul_rate(device: str, precision: str) -> dict[str, float]:
    """Multiply square matrices for some seconds and return the best rate."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    best = 0.0
    for edge in SIZES[device]:
        a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        for seconds in _timed(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device):
            best = max(best, 2 * edge**3 / seconds)
    return {"matmul_flops_per_second": best}


def _timed(work: Callable[[], Any], device: str) -> list[float]:
    """Return the seconds of each run; on a GPU a run is many, so that launches do not count."""
    import torch

    repeats = 1 if device == "cpu" else 20
    found: list[float] = []
    work()
    until = time.perf_counter() + SECONDS_EACH
    while time.perf_counter() < until:
        if device != "cpu":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(repeats):
            work()
        if device != "cpu":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - begun) / repeats)
    return found


def step_flops(name: str, resolution: int, batch_size: int, rank: int) -> dict[str, float]:
    """Count a step of an architecture's denoiser with a LoRA on each target, on tensors without memory."""
    pack()
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    from loragraft.trainer.families import FAMILIES
    from loragraft.trainer.families.base import Reading
    from loragraft.trainer.parts import Parts

    from .shapes import modules_of

    class LowRank(nn.Module):
        """A frozen layer with a LoRA beside it."""

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer
            out, width = layer.weight.shape[:2]  # of a linear layer or a 1x1 convolution
            self.down = nn.Parameter(torch.empty(rank, width, *layer.weight.shape[2:]))
            self.up = nn.Parameter(torch.empty(out, rank, *layer.weight.shape[2:]))
            self.product = nn.functional.linear if layer.weight.ndim == 2 else nn.functional.conv2d

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + self.product(self.product(x, self.down), self.up)

    architecture = ARCHITECTURES[name]
    family = FAMILIES[architecture.family]
    denoiser, vae, *texts = modules_of(architecture.shapes, architecture.sizes).values()
    encoders = nn.ModuleDict(dict(zip(family.encoders, texts, strict=True)))
    parts = Parts(denoiser.requires_grad_(False), vae, encoders, {})
    length = architecture.settings.get("t5xxl_max_token_length")
    shapes = family.cond_shapes(parts, Reading(t5_length=length))
    with torch.device("meta"):
        noisy = torch.empty(batch_size, *family.latent_shape(parts, resolution, resolution))
        cond = tuple(torch.empty(batch_size, *shape) for shape in shapes)
        t, sizes = torch.ones(batch_size, dtype=torch.long), torch.empty(batch_size, 6)

        def predict() -> torch.Tensor:
            return family.predict(parts, noisy, t, cond, sizes if family.uses_sizes else None)

        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            predict()
        targets = [t.path for t in family.targets(parts, convolutions=False) if t.part == "denoiser"]
        for path in targets:
            parent, _, last = path.rpartition(".")
            setattr(denoiser.get_submodule(parent), last, LowRank(denoiser.get_submodule(path)))
        with FlopCounterMode(display=False) as step:
            predict().sum().backward()
    return {
        "forward_flops": float(forward.get_total_flops()),
        "step_flops": float(step.get_total_flops()),
        "targets": float(len(targets)),
    }


def main() -> None:
    """Print one measurement as JSON."""
    what, *arguments = sys.argv[1:]
    if what == "rate":
        found = matmul_rate(*arguments)
    else:
        name, *sizes = arguments
        found = step_flops(name, *map(int, sizes))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
