"""What the machine could do: its matmul rate, and the FLOPs of a step. Each in a process of its own.

`python -m benchmarks.ceiling rate DEVICE PRECISION` and `... flops RESOLUTION BATCH RANK`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from .cases import Case
from .common import ROOT, Work
from .peft_loop import UNET_TARGETS
from .process import environment

SIZES = {"cpu": (1024, 2048, 3072), "cuda": (4096, 8192)}  # edges of square matrices; the best rate counts
SECONDS_EACH = 2.0
TOKENS, WIDTH = 77, 768  # of CLIP ViT-L's text encoder


def ceiling_of(case: Case, threads: int) -> dict[str, float]:
    """Return the FLOPs of a step of the U-Net (forward, backward, LoRA) and the matmul rate in FLOP/s."""
    rate = _child(threads, "rate", case.device, case.precision)
    flops = _child(threads, "flops", case.resolution, case.batch_size, Work.rank)
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


def step_flops(resolution: int, batch_size: int, rank: int) -> dict[str, float]:
    """Count a step on SD1.5's true architecture, on tensors without memory."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

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

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
        ).requires_grad_(False)
        inputs = (
            torch.empty(batch_size, 4, resolution // 8, resolution // 8),
            torch.ones(batch_size, dtype=torch.long),
            torch.empty(batch_size, TOKENS, WIDTH),
        )
        counted = {}
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            unet(*inputs)
        counted["forward_flops"] = float(forward.get_total_flops())
        targets = [
            path
            for path, _ in unet.named_modules()
            if "attentions" in path and any(path.endswith(f".{name}") for name in UNET_TARGETS)
        ]
        for path in targets:
            parent, _, name = path.rpartition(".")
            setattr(unet.get_submodule(parent), name, LowRank(unet.get_submodule(path)))
        with FlopCounterMode(display=False) as step:
            unet(*inputs).sample.sum().backward()
    return {**counted, "step_flops": float(step.get_total_flops()), "targets": float(len(targets))}


def main() -> None:
    """Print one measurement as JSON."""
    what, *arguments = sys.argv[1:]
    if what == "rate":
        found = matmul_rate(*arguments)
    else:
        found = step_flops(*map(int, arguments))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
