"""A peer: ComfyUI's own node Train LoRA (`TrainLoraNode`), called headless in a process of its own.

COMFYUI_PATH names its folder, COMFYUI_PYTHON an interpreter that has its requirements (without it, this
one). The node trains more than the others and cannot be told not to: every layer with a weight, the 3x3
convolutions too, and the biases and norms; it clips no gradient, and alpha is 1. Its loss is the error
of the picture instead of the noise; `comfyui_node` divides it by what turns one into the other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from .common import ROOT, Work

STEP = re.compile(rb"Training LoRA:.*?\| *(\d+)/(\d+) \[.*?(?:loss=([\w.+-]+))?\]")


@cache
def missing() -> str | None:
    """Say what is not there, or None."""
    given = os.environ.get("COMFYUI_PATH")
    if not given or not (Path(given) / "comfy_extras" / "nodes_train.py").is_file():
        return "COMFYUI_PATH names no ComfyUI with comfy_extras/nodes_train.py"
    code = "import torch, aiohttp, av, einops, transformers, torchsde, safetensors"
    done = subprocess.run([python(), "-c", code], capture_output=True, text=True)
    if done.returncode:
        return (
            f"COMFYUI_PYTHON ({python()}) lacks of its requirements: {done.stderr.strip().splitlines()[-1]}"
        )
    return None


def folder() -> Path:
    """Return ComfyUI's folder."""
    return Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()


def python() -> str:
    """Return the interpreter that runs it."""
    return os.environ.get("COMFYUI_PYTHON") or sys.executable


def command(work: Work, job: Path) -> list[str]:
    """Return the command line of the job."""
    script = ROOT / "benchmarks" / "comfyui_node.py"
    return [python(), str(script), str(folder()), str(work.write(job))]
