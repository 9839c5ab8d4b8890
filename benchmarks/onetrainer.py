"""A peer: OneTrainer through its documented command line, `scripts/train.py --config-path`.

LORAGRAFT_ONETRAINER names its folder, LORAGRAFT_ONETRAINER_PYTHON an interpreter that has its requirements.
It reads a diffusers folder, because for a single file it would ask the network for a tokenizer. On a GPU
its blocks are compiled, its fastest way that keeps the base's values.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from .common import NUM_IMAGES, ROOT, Work, pack
from .kohya import copy_tokenizer

STEP = re.compile(rb"step:.*?\| *(\d+)/(\d+) \[.*?(?:, loss=([\w.+-]+).*?)?\]")
CONFIG_VERSION, CONCEPT_VERSION = 11, 2  # of TrainConfig and ConceptConfig, whose migrations are skipped
DTYPES = {"fp32": "FLOAT_32", "bf16": "BFLOAT_16"}
PACKAGES = ("torch", "diffusers", "transformers")


def missing() -> str | None:
    """Say what is not there, or None."""
    folder, python = os.environ.get("LORAGRAFT_ONETRAINER"), os.environ.get("LORAGRAFT_ONETRAINER_PYTHON")
    if not folder or not (Path(folder) / "scripts" / "train.py").is_file():
        return "LORAGRAFT_ONETRAINER names no OneTrainer folder"
    if not python or not Path(python).exists():
        return "LORAGRAFT_ONETRAINER_PYTHON names no interpreter"
    return None


def folder() -> Path:
    """Return OneTrainer's folder."""
    return Path(os.environ["LORAGRAFT_ONETRAINER"]).expanduser().resolve()


def versions() -> dict[str, str]:
    """Ask its interpreter for its packages; it has no version of its own."""
    code = (
        "import json,sys; from importlib.metadata import version as v; "
        f"print(json.dumps({{'python': sys.version.split()[0], **{{p: v(p) for p in {PACKAGES!r}}}}}))"
    )
    argv = [os.environ["LORAGRAFT_ONETRAINER_PYTHON"], "-c", code]
    return dict(json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout))


def command(work: Work, job: Path) -> list[str]:
    """Return the command line of the job; its base is written as a diffusers folder beside the checkpoint."""
    model = Path(work.checkpoint).with_suffix("")
    if not (model / "model_index.json").exists():
        argv = [sys.executable, "-m", "benchmarks.onetrainer", work.checkpoint, work.tokenizer, str(model)]
        subprocess.run(argv, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    job.write_text(json.dumps(config(work, model)), encoding="utf-8")
    script = folder() / "scripts" / "train.py"
    return [os.environ["LORAGRAFT_ONETRAINER_PYTHON"], str(script), "--config-path", str(job)]


def config(work: Work, model: Path) -> dict[str, Any]:
    """Return its configuration for the same work; what is not named here is at its default."""
    out, dtype = Path(work.out), DTYPES[work.precision]
    part = {"weight_dtype": dtype, "gradient_checkpointing": False}
    return {
        "__version": CONFIG_VERSION,
        "training_method": "LORA",
        "model_type": "STABLE_DIFFUSION_15",
        "workspace_dir": str(out / "workspace"),
        "cache_dir": str(out / "cache"),
        "offline_mode": True,
        "tensorboard": False,
        "base_model_name": str(model),
        "output_model_format": "LEGACY_LORA",
        "output_model_destination": str(out / "bench.safetensors"),
        "output_dtype": "FLOAT_16",
        "compile": work.device != "cpu",
        "concepts": [concept(work)],
        "aspect_ratio_bucketing": False,
        "latent_caching": True,
        "learning_rate_scheduler": "CONSTANT",
        "learning_rate": work.learning_rate,
        "learning_rate_warmup_steps": 0,
        "epochs": 1,
        "batch_size": work.batch_size,
        "dataloader_threads": 1,
        "train_device": work.device,
        "temp_device": "cpu",
        "train_dtype": dtype,
        "fallback_train_dtype": dtype,
        "resolution": str(work.resolution),
        "attention_mechanism": "SDP",
        "clip_grad_norm": 1.0,
        "unet": {"__version": 0, "train": True, **part},
        "text_encoder": {"__version": 0, "train": work.text_encoder, "train_embedding": False, **part},
        "vae": {"__version": 0, "weight_dtype": "FLOAT_32"},
        "layer_filter_preset": "attn-mlp",
        "layer_filter": "attentions",
        "lora_rank": work.rank,
        "lora_alpha": work.alpha,
        "lora_weight_dtype": "FLOAT_32",
        "optimizer": {"__version": 0, "optimizer": "ADAMW", "fused": False, "weight_decay": 1e-2},
        "samples": [],
        "sample_after_unit": "NEVER",
        "backup_after_unit": "NEVER",
        "backup_before_save": False,
    }


def concept(work: Work) -> dict[str, Any]:
    """Return its description of the images; its one epoch has as many steps as the job."""
    (images,) = (path for path in Path(work.images).iterdir() if path.is_dir())
    return {
        "__version": CONCEPT_VERSION,
        "name": "bench",
        "path": str(images),
        "seed": work.seed,
        "balancing": work.steps * work.batch_size / NUM_IMAGES,
        "balancing_strategy": "REPEATS",
        "image": {"__version": 0, "enable_crop_jitter": False},
        "text": {"__version": 0, "prompt_source": "sample"},
    }


def main() -> None:
    """Write CHECKPOINT with TOKENIZER as a diffusers folder at TARGET."""
    checkpoint, tokenizer, target = map(Path, sys.argv[1:4])
    pack()
    import torch
    from diffusers import DDIMScheduler
    from safetensors.torch import save_file

    from loragraft.trainer import api

    unfinished = target.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    parts = api.open_base(checkpoint, tokenizer=tokenizer).load()
    for name, module in (("unet", parts.denoiser), ("vae", parts.vae)):
        module.to(torch.float16).save_pretrained(unfinished / name)
    # Names as in published folders, which newer transformers would write otherwise.
    parts.text_encoder.config.save_pretrained(unfinished / "text_encoder")
    text = {
        f"text_model.{k.removeprefix('text_model.')}": v for k, v in parts.text_encoder.state_dict().items()
    }
    save_file(text, unfinished / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    copy_tokenizer(tokenizer, unfinished / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    scheduler.save_pretrained(unfinished / "scheduler")
    (unfinished / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}', "utf-8")
    unfinished.rename(target)


if __name__ == "__main__":
    main()
