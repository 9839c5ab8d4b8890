"""Run by ComfyUI's interpreter: its own reading of LoRA files for a model of which only the names are there.

    python comfy_names_child.py COMFYUI WORK

WORK/job.json holds the class of comfy.model_base and the LoRA files; WORK/weights.safetensors the model's
weights, the denoiser's below "diffusion_model." and text encoders' below "text_encoders.". Written are
WORK/FILE.changed.safetensors with the weights that a file changes, and WORK/unmatched.json.
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
TEXT = "text_encoders."


class Messages(logging.Handler):
    """Keeps what ComfyUI says of keys that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        if "not loaded" in record.getMessage():
            self.found.append(record.getMessage())


def main() -> None:
    """Do what the job says."""
    importlib.import_module("launch").cure_imports()
    importlib.import_module("comfy.options").enable_args_parsing()
    import torch
    from safetensors.torch import load_file, save_file

    job = json.loads((WORK / "job.json").read_text(encoding="utf-8"))
    lora = importlib.import_module("comfy.lora")
    base = importlib.import_module("comfy.model_base")
    detection = importlib.import_module("comfy.model_detection")
    weights = load_file(WORK / "weights.safetensors")
    denoiser = {k: v for k, v in weights.items() if not k.startswith(TEXT)}
    texts = {k.removeprefix(TEXT): v for k, v in weights.items() if k.startswith(TEXT)}

    cls: Any = getattr(base, job["class"])
    model = cls.__new__(cls)
    torch.nn.Module.__init__(model)
    object.__setattr__(model, "state_dict", lambda: denoiser)
    unet_config = detection.detect_unet_config(denoiser, "diffusion_model.")
    model.model_config = SimpleNamespace(unet_config=unet_config)
    key_map = lora.model_lora_keys_unet(model, {})
    if texts:
        key_map = lora.model_lora_keys_clip(SimpleNamespace(state_dict=lambda: texts), key_map)
    messages = Messages()
    logging.getLogger().addHandler(messages)
    unmatched = {}
    for name in job["files"]:
        messages.found.clear()
        patches = lora.load_lora(load_file(WORK / name), key_map)
        by_key: dict[str, list[Any]] = {}
        for key, patch in patches.items():
            weight, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
            by_key.setdefault(weight, []).append((1.0, patch, 1.0, offset, function))
        both = {**denoiser, **texts}
        changed = {
            (key if key in denoiser else TEXT + key): lora.calculate_weight(found, both[key].clone(), key)
            for key, found in by_key.items()
        }
        save_file({k: v.contiguous() for k, v in changed.items()}, WORK / f"{name}.changed.safetensors")
        unmatched[name] = list(messages.found)
    (WORK / "unmatched.json").write_text(json.dumps(unmatched), encoding="utf-8")


main()
