"""Train with ComfyUI's node: `COMFYUI_PYTHON comfyui_node.py COMFYUI_PATH JOB.json`; see comfyui.py.

This file is run by ComfyUI's interpreter, so it imports nothing of this repository's package.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Train the job's steps with the node, on latents and conditionings made as ComfyUI makes them."""
    folder, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    start_comfyui(folder, job)
    import comfy.sd
    import torch
    from comfy_extras import nodes_train

    versions = {p: version(p) for p in ("torch", "transformers")}
    versions |= {"comfyui": importlib.import_module("comfyui_version").__version__}
    say(versions={"python": sys.version.split()[0], **versions})
    sigmas = remember_sigmas(nodes_train.TrainSampler)
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(job["checkpoint"])
    with torch.no_grad():
        latents, positive = encode(Path(job["images"]), clip, vae)
    dtype = job["precision"]
    out = nodes_train.TrainLoraNode.execute(
        **{name: [value] for name, value in settings(job, dtype).items()},
        model=[model],
        latents=[{"samples": latents}],
        positive=[positive],
    )
    losses = out.args[1]["loss"]
    # The picture's error is sigma squared times the noise's (x = z + sigma * noise).
    per_step = [s.double().square().mean().item() for s in sigmas]
    say(losses=[loss / square for loss, square in zip(losses, per_step, strict=True)])
    if job["device"] != "cpu":
        peak = {
            "allocated": torch.cuda.max_memory_allocated() / 2**20,
            "reserved": torch.cuda.max_memory_reserved() / 2**20,
        }
        say(torch_peak_mib=peak)


def settings(job: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the node's widgets for the same work; what is not named here is at the node's default."""
    return {
        "batch_size": job["batch_size"],
        "grad_accumulation_steps": 1,
        "steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "rank": job["rank"],
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": job["seed"],
        "training_dtype": dtype,
        "lora_dtype": dtype,
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
        **job["settings"],
    }


def encode(images: Path, clip: Any, vae: Any) -> tuple[Any, list[Any]]:
    """Return the latents (N, 4, h, w), and one conditioning for each image."""
    import numpy as np
    import torch
    from PIL import Image

    latents, positive = [], []
    for file in sorted(images.rglob("*.png")):
        pixels = np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255
        latents.append(vae.encode(torch.from_numpy(pixels)[None]))
        tokens = clip.tokenize(file.with_suffix(".txt").read_text(encoding="utf-8"))
        positive += clip.encode_from_tokens_scheduled(tokens)
    return torch.cat(latents), positive


def remember_sigmas(sampler: Any) -> list[Any]:
    """Return a list that will hold the noise levels (B,) of each step."""
    drawn: list[Any] = []
    draw = sampler._generate_batch_sigmas

    def remember(*arguments: Any) -> Any:
        sigmas = draw(*arguments)
        drawn.append(sigmas.detach().cpu())
        return sigmas

    sampler._generate_batch_sigmas = remember
    return drawn


def start_comfyui(folder: str, job: dict[str, Any]) -> None:
    """Make ComfyUI importable with the job's device, and let it write into the job's folder only."""
    cure_imports()
    sys.path.insert(0, folder)
    flags = ["--cpu"] if job["device"] == "cpu" else []
    sys.argv = ["main.py", "--base-directory", job["out"], *flags]
    import comfy.options

    comfy.options.enable_args_parsing()


def cure_imports() -> None:
    """Let torchvision load beside a CPU build of torch, and stand in for what no SD1.5 model needs."""
    launch = load("comfyui_launch", ROOT / "tests" / "comfyui" / "launch.py")
    sys.meta_path.insert(0, launch._CureTorchvision())
    for name, parts in launch.STUBS.items():
        if importlib.util.find_spec(name) is None:
            for full in (name, *(f"{name}.{part}" for part in parts)):
                sys.modules[full] = launch._Stub(full)
                sys.modules[full].__spec__ = ModuleSpec(full, None, is_package=True)


def load(name: str, file: Path) -> ModuleType:
    """Import one file under a name."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def say(**facts: Any) -> None:
    """Tell the parent something that is kept with the run."""
    print("bench facts " + json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
