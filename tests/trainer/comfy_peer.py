"""ComfyUI's own transformers as peers: what they compute on given weights, and how they read a LoRA file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragraft_tests.comfyui.harness import cannot_run, python
from loragraft_tests.conftest import comfyui_path

CHILD = Path(__file__).with_name("comfy_child.py")
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Answer:
    """What ComfyUI computed: the calls' outputs, changed weights by name, and keys that it did not know."""

    outputs: list[torch.Tensor]
    weights: dict[str, torch.Tensor]
    unmatched: list[str]


def ask(
    folder: Path,
    model: str,
    arguments: Mapping[str, Any],
    weights: Tensors,
    inputs: Tensors,
    calls: Sequence[Mapping[str, Any]],
    lora: Path | None = None,
) -> Answer:
    """Have ComfyUI build a ``model`` on weights with its own names and call it; skips where there is none.

    A call maps arguments to names of ``inputs`` or to plain values.
    """
    root = comfyui_path()
    if root is None:
        pytest.skip("no ComfyUI: COMFYUI_PATH is not set to one")
    if (lacking := cannot_run()) is not None:
        pytest.skip(lacking)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().clone().contiguous() for k, v in weights.items()}, folder / "weights.safetensors"
    )
    save_file({k: v.contiguous() for k, v in inputs.items()}, folder / "inputs.safetensors")
    if lora is not None:
        (folder / "lora.safetensors").write_bytes(lora.read_bytes())
    job = {"class": model, "arguments": arguments, "calls": list(calls)}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run(
        [python(), str(CHILD), str(root), str(folder)], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(folder / "results.safetensors")
    return Answer(
        [found[f"out.{i}"] for i in range(len(calls))],
        {k.removeprefix("weight."): v for k, v in found.items() if k.startswith("weight.")},
        json.loads((folder / "unmatched.json").read_text(encoding="utf-8")),
    )
