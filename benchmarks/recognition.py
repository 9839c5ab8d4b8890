"""Train the demo character with every kind of network and optimizer, and count how often it is recognised.

    python -m benchmarks.recognition [names ...] [--out FILE]

The demo's data, steps and evaluation; each row changes only what its network or optimizer needs. Prints one
line a row and writes them with machine and versions. A rate says that the way works on a small task; it says
nothing about which way is the best on photographs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .common import pack
from .machine import machine

BAR = 0.6
FAST = {"learning_rate": 1e-2, "text_encoder_lr": 3e-3}
ONE_RATE = {"learning_rate": 1.0, "text_encoder_lr": None}
# Where the demo's rates do not suit: what a network with other scales needs to get as far in 300 steps.
NETWORKS: Mapping[str, dict[str, Any]] = {
    "LoRA": {},
    "LoCon": {"algo": "locon", "conv_dim": 8, "conv_alpha": 8.0},
    "DoRA": {"dora_wd": True},
    "LoHa": {"algo": "loha", "network_dim": 8, "network_alpha": 8.0},
    "LoKr": {"algo": "lokr", "factor": 4, "network_dim": 16, "network_alpha": 16.0, **FAST},
    # Each step trains one block of ranks, so that it needs more of them.
    "DyLoRA": {"algo": "dylora", "unit": 16, "max_train_steps": 450},
    "OFT": {"algo": "oft", "network_dim": 8},
    "BOFT": {"algo": "boft", "network_dim": 8},
    "GLoRA": {"algo": "glora"},
    "full": {"algo": "full", "learning_rate": 1e-3, "text_encoder_lr": 3e-4},
}
OPTIMIZERS: Mapping[str, dict[str, Any]] = {
    "AdamW8bit": {"optimizer_type": "AdamW8bit"},
    "Adafactor": {
        "optimizer_type": "Adafactor",
        "optimizer_args": ["relative_step=False", "scale_parameter=False", "warmup_init=False"],
    },
    "Lion": {"optimizer_type": "Lion", "learning_rate": 1e-3, "text_encoder_lr": 4e-4},
    "Prodigy": {"optimizer_type": "Prodigy", **ONE_RATE},
    "DAdaptAdam": {"optimizer_type": "DAdaptAdam", **ONE_RATE},
    "AdamWScheduleFree": {
        "optimizer_type": "AdamWScheduleFree",
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
    },
    "CAME": {"optimizer_type": "CAME", "learning_rate": 3e-4, "text_encoder_lr": 1e-4},
    "SGDNesterov": {"optimizer_type": "SGDNesterov", "learning_rate": 10.0, "text_encoder_lr": 3.0},
}
NO_BAR: Mapping[str, dict[str, Any]] = {
    "IA3": {"algo": "ia3", "learning_rate": 1e-2, "text_encoder_lr": 5e-3},
    "norms": {"train_norm": True, "network_dim": 1, "network_alpha": 1.0},
}
WHOLE = {"algo": "full", "preset": "everything", "save_as": "checkpoint", "network_train_unet_only": True}
# All of the U-Net, saved as a model; DreamBooth beside images that the base drew, at their own loss weight.
WHOLES: Mapping[str, dict[str, Any]] = {
    "fine-tune": {**WHOLE, "learning_rate": 1e-3, "text_encoder_lr": None},
    "fine-tune with EMA": {**WHOLE, "learning_rate": 1e-3, "text_encoder_lr": None, "ema_decay": 0.99},
    "DreamBooth": {
        **WHOLE,
        "learning_rate": 1e-3,
        "text_encoder_lr": None,
        "prior_loss_weight": 0.5,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 450,  # half of each gradient keeps what the base can do
    },
}
CLASS_BATCH, CLASS_IMAGES, CLASS_SEED = 4, 16, 11
ROWS: Mapping[str, dict[str, Any]] = {**NETWORKS, **OPTIMIZERS, **WHOLES, **NO_BAR}


def class_images(base: Any, folder: Path) -> Any:
    """Let the base draw what it knows, with captions: the class that is to stay as it is.

    A creature of another name would not do: a text encoder that is not trained reads both names alike.
    """
    import numpy as np

    from loragraft.trainer import api
    from loragraft.trainer.demo.draw import random_scene, tag_caption

    rng = np.random.default_rng(CLASS_SEED)
    captions = [tag_caption(random_scene(rng)) for _ in range(CLASS_IMAGES)]
    drawing = api.SampleSettings(size=(64, 64), cfg=4.0, mixed_precision="fp32")
    inside = folder / "1_class"
    inside.mkdir(parents=True, exist_ok=True)
    for number, drawn in enumerate(api.draw_images(base, captions, [CLASS_SEED], drawing, device="cpu")):
        drawn.image.save(inside / f"{number:02}.png")
        (inside / f"{number:02}.txt").write_text(captions[number], encoding="utf-8")
    return api.scan_folder(folder, is_reg=True)


def train(name: str, changes: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Train one row into its own folder; return what is to be told of it."""
    pack()
    from loragraft.trainer import api
    from loragraft.trainer.demo import run
    from loragraft.trainer.demo.creatures import HERO_SEED

    base = api.open_demo_base()
    settings = {**run.DATASET, **run.TRAINING, "save_every_n_steps": None, "preview_image": False}
    data, config = api.make_both({**settings, **changes, "output_name": f"demo_{name}"}, where=name)
    blocks = [api.Block(api.scan_folder(api.demo_dataset()), data)]
    if name == "DreamBooth":
        blocks.append(api.Block(class_images(base, out / "class"), data, CLASS_BATCH, keeps_pace=True))
    train_set = api.freeze_blocks(blocks)
    places = api.Places(out / name / "runs", out / name, out / "cache")
    began, first, end, engine = time.perf_counter(), None, None, ""
    for event in api.train(base, train_set, config, places=places, device="cpu", fresh=True):
        if isinstance(event, api.Planned):
            engine = next(line for line in event.lines if " steps (" in line)
        if isinstance(event, api.Step) and first is None:
            first = time.perf_counter()
        if isinstance(event, api.Finished):
            end = event
    assert end is not None and first is not None
    seconds = (time.perf_counter() - first) / max(1, config.max_train_steps - 1)
    rates = run.measure(base, end.lora_file, HERO_SEED)
    return {
        "name": name,
        "recognised": rates.recognised,
        "background_obeyed": rates.background_obeyed,
        "seconds_per_step": round(seconds, 4),
        "seconds": round(time.perf_counter() - began, 1),
        "bytes": end.lora_file.stat().st_size,
        "model_bytes": None if end.model_file is None else end.model_file.stat().st_size,
        "engine": engine,
        "changes": dict(changes),
        "loss_first_50": sum(end.losses[:50]) / 50,
        "loss_last_50": sum(end.losses[-50:]) / 50,
    }


def main() -> int:
    """Train the named rows, or all; 1 where one with a bar stays below it."""
    parser = argparse.ArgumentParser(
        description="Recognition of the demo character by network and optimizer."
    )
    parser.add_argument("names", nargs="*", help=f"rows; all: {', '.join(ROWS)}")
    parser.add_argument("--out", type=Path, default=Path("output/recognition"))
    arguments = parser.parse_args()
    import torch

    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "recognition.json"
    rows = {row["name"]: row for row in json.loads(file.read_text("utf-8"))["rows"]} if file.is_file() else {}
    results = []
    for name in arguments.names or ROWS:
        result = train(name, ROWS[name], arguments.out)
        results.append(result)
        rows[name] = result
        told = {"machine": machine(torch.get_num_threads()), "rows": list(rows.values())}
        file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        print(
            f"{name:18} recognised {result['recognised']:4.0%}, "
            f"background {result['background_obeyed']:4.0%}, {result['seconds_per_step']:.3f} s a step, "
            f"{result['bytes'] / 2**20:.2f} MiB, {result['engine']}",
            flush=True,
        )
    low = [r["name"] for r in results if r["name"] not in NO_BAR and r["recognised"] < BAR]
    if low:
        print(f"below {BAR:.0%}: {', '.join(low)}", file=sys.stderr)
    return bool(low)


if __name__ == "__main__":
    sys.exit(main())
