"""A peer: kohya's sd-scripts, its own train_network.py in its own environment, unchanged.

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
from pathlib import Path

from .common import Work

STEP = re.compile(rb"steps:.*?\| *(\d+)/(\d+) \[.*?(?:avr_loss=([\w.+-]+))?\]")
TOKENIZER_NAME = "openai_clip-vit-large-patch14"
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


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer to where kohya looks, with the length it reads there (ComfyUI says 8192)."""
    shutil.copytree(source, target)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "model_max_length": 77}), "utf-8")


def command(work: Work, job: Path) -> list[str]:
    """Return the command line of the job, with kohya's options for the same work."""
    out = Path(work.out)
    tokenizers = out / "tokenizers"
    copy_tokenizer(Path(work.tokenizer), tokenizers / TOKENIZER_NAME)
    options = {
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
        "network_module": "networks.lora",
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
    }
    flags = ["--cache_latents", "--sdpa"] + ([] if work.text_encoder else ["--network_train_unet_only"])
    pairs = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return [os.environ["LORAGRAFT_KOHYA_PYTHON"], str(folder() / "train_network.py"), *pairs, *flags]
