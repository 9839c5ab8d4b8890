"""Run by ComfyUI's interpreter: its own transformer on given weights, and its own reading of a LoRA file.

    python comfy_child.py COMFYUI WORK

WORK/job.json names the class ("comfy.ldm.chroma.model.Chroma"), its arguments, and the calls' keyword
arguments as tensor names; WORK/weights.safetensors and WORK/inputs.safetensors hold the tensors, and
WORK/lora.safetensors, where it is there, a LoRA. Written are WORK/results.safetensors, of call i as "out.i"
and of a changed weight as "weight.NAME", and WORK/unmatched.json.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT, WORK = Path(sys.argv[1]), Path(sys.argv[2])
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent.parent / "comfyui")]


class Messages(logging.Handler):
    """Keeps what ComfyUI says of keys that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        message = record.getMessage()
        if "not loaded" in message:
            self.found.append(message)


def main() -> None:
    """Do what the job says."""
    importlib.import_module("launch").cure_imports()
    importlib.import_module("comfy.options").enable_args_parsing()
    import torch
    from safetensors.torch import load_file, save_file

    job = json.loads((WORK / "job.json").read_text(encoding="utf-8"))
    module, _, name = job["class"].rpartition(".")
    operations = importlib.import_module("comfy.ops").disable_weight_init
    built = getattr(importlib.import_module(module), name)(
        dtype=torch.float32, device="cpu", operations=operations, **job["arguments"]
    )
    built.load_state_dict(load_file(WORK / "weights.safetensors"), strict=True)
    tensors = load_file(WORK / "inputs.safetensors")
    results = {}
    with torch.no_grad():
        for number, call in enumerate(job["calls"]):
            values = {k: tensors[v] if isinstance(v, str) else v for k, v in call.items()}
            results[f"out.{number}"] = built(**values).contiguous()
    unmatched: list[str] = []
    if (WORK / "lora.safetensors").exists():
        changed, unmatched = with_lora(built, load_file(WORK / "lora.safetensors"))
        results |= {f"weight.{k}": v.contiguous() for k, v in changed.items()}
    save_file(results, WORK / "results.safetensors")
    (WORK / "unmatched.json").write_text(json.dumps(unmatched), encoding="utf-8")


def with_lora(built: Any, file: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the weights as ComfyUI's LoraLoader changes them, and its messages about unknown keys."""
    import torch

    lora = importlib.import_module("comfy.lora")
    model = torch.nn.Module()
    model.diffusion_model = built
    model.model_config = SimpleNamespace(unet_config={})  # type: ignore[assignment]
    messages = Messages()
    logging.getLogger().addHandler(messages)
    patches = lora.load_lora(file, lora.model_lora_keys_unet(model, {}))
    weights = model.state_dict()
    return {
        key.removeprefix("diffusion_model."): lora.calculate_weight(
            [(1.0, patch, 1.0, None, None)], weights[key].clone(), key
        )
        for key, patch in patches.items()
    }, messages.found


main()
