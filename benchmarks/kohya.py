"""A peer: kohya's sd-scripts, its own script for the architecture in its own environment, unchanged.

LORAGRAFT_KOHYA names its folder, LORAGRAFT_KOHYA_PYTHON an interpreter that has its requirements.
For SD1.x its trainer keeps no text-encoder outputs: with --network_train_unet_only it encodes the
caption in each step, where ours encoded it once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .architectures import ARCHITECTURES
from .common import Work

STEP = re.compile(rb"steps:.*?\| *(\d+)/(\d+) \[.*?(?:avr_loss=([\w.+-]+))?\]")
FILES = {"vae": "ae", "clip_l": "clip_l", "t5xxl": "t5xxl"}  # its options for parts in files of their own
TOKENS = {"clip": 77, "t5": 512}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def missing() -> str | None:
    """Say what is not there, or None."""
    folder, python = os.environ.get("LORAGRAFT_KOHYA"), os.environ.get("LORAGRAFT_KOHYA_PYTHON")
    if not folder or not (Path(folder) / "train_network.py").is_file():
        return "LORAGRAFT_KOHYA names no sd-scripts folder"
    if not python or not Path(python).exists():
        return "LORAGRAFT_KOHYA_PYTHON names no interpreter"
    return None


def folder() -> Path:
    """Return sd-scripts' folder."""
    return Path(os.environ["LORAGRAFT_KOHYA"])


def versions() -> dict[str, str]:
    """Ask kohya's interpreter for its packages, and its README for its own version."""
    code = (
        "import json,sys; from importlib.metadata import version as v; "
        f"print(json.dumps({{'python': sys.version.split()[0], **{{p: v(p) for p in {PACKAGES!r}}}}}))"
    )
    done = subprocess.run(
        [os.environ["LORAGRAFT_KOHYA_PYTHON"], "-c", code], capture_output=True, text=True, check=True
    )
    readme = (folder() / "README.md").read_text(encoding="utf-8")
    own = re.search(r"[Vv]ersion (\d+\.\d+\.\d+)", readme)
    return {"sd-scripts": own[1] if own else "unknown", **json.loads(done.stdout)}


def copy_tokenizer(source: Path, target: Path, length: int = TOKENS["clip"]) -> None:
    """Copy a tokenizer to where kohya looks, with the length it reads there (ComfyUI says 8192)."""
    shutil.copytree(source, target)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "model_max_length": length}), "utf-8")


def command(work: Work, job: Path) -> list[str]:
    """Return the command line of the job, with kohya's options for the same work."""
    out = Path(work.out)
    tokenizers = out / "tokenizers"
    architecture = ARCHITECTURES[work.architecture]
    of_kind = {"clip": work.tokenizer, **work.tokenizers}
    for kind, names in architecture.tokenizers.items():
        for name in names:
            copy_tokenizer(Path(of_kind[kind]), tokenizers / name, TOKENS[kind])
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": work.checkpoint,
        "tokenizer_cache_dir": tokenizers,
        "train_data_dir": work.images,
        "caption_extension": ".txt",
        "output_dir": out,
        "output_name": "bench",
        "save_model_as": "safetensors",
        "save_precision": "fp16",
        "resolution": work.resolution,
        "train_batch_size": work.batch_size,
        "network_dim": work.rank,
        "network_alpha": work.alpha,
        "optimizer_type": "AdamW",
        "learning_rate": work.learning_rate,
        "lr_scheduler": "constant",
        "max_grad_norm": 1.0,
        "max_train_steps": work.steps,
        "mixed_precision": {"fp32": "no"}.get(work.precision, work.precision),
        "max_data_loader_n_workers": 0,
        "seed": work.seed,
        "cache_latents": True,
        "sdpa": True,
        "network_train_unet_only": not work.text_encoder,
        **{FILES[role]: file for role, file in work.files.items()},
        **architecture.options,
        **architecture.settings,
        **work.settings,
    }
    script = str(folder() / architecture.script)
    return [os.environ["LORAGRAFT_KOHYA_PYTHON"], script, *as_arguments(options)]


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Return options as a command line has them: a switch is there or not, all others have a value."""
    found: list[str] = []
    for key, value in options.items():
        if isinstance(value, bool):
            found += [f"--{key}"] if value else []
        else:
            found += [f"--{key}", str(value)]
    return found
