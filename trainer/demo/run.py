"""The demo: train a LoRA of the sample character on the embedded base, draw it, and measure it.

Everything is written into one folder; summary.json says where, and how often the character is
recognised with and without the LoRA, and how often the background asked for is obeyed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import api
from ..progress import ProgressLine
from .checker import read_scene
from .creatures import HERO_SEED, creature
from .draw import COLORS
from .recogniser import is_creature

NUM_SEEDS = 32
DATASET: dict[str, Any] = {
    "resolution": 64,
    "min_bucket_reso": 32,
    "max_bucket_reso": 128,
    "bucket_reso_steps": 8,
    "shuffle_caption": True,
    "keep_tokens": 1,
}
TRAINING: dict[str, Any] = {
    "network_dim": 32,
    "network_alpha": 32.0,
    "learning_rate": 3e-3,
    "text_encoder_lr": 1e-3,
    "max_train_steps": 300,
    "train_batch_size": 8,
    "save_every_n_steps": 100,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "min_snr_gamma": 5.0,
    "mixed_precision": "auto",
}
DRAWING = api.DrawSettings(size=(64, 64), steps=20, cfg=4.0, batch=16)


@dataclass(frozen=True)
class Rates:
    """Shares in [0, 1] over ``NUM_SEEDS`` images each, all of the large character."""

    recognised: float
    recognised_without_lora: float
    background_obeyed: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; exit status 1 if training was refused."""
    parser = argparse.ArgumentParser(description="Train and test the demo LoRA.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("output/demo"), help="folder for all results")
    parser.add_argument("--device", help="cpu, cuda, ...; default: the GPU if there is one")
    parser.add_argument("--fresh", action="store_true", help="train again even if this run is finished")
    arguments = parser.parse_args(argv)
    who = creature(HERO_SEED)
    try:
        summary = demo(
            api.demo_dataset(), who.seed, arguments.out, device=arguments.device, fresh=arguments.fresh
        )
    except api.LoraGraftError as error:
        print(error, file=sys.stderr)
        return 1
    for label, key in (("LoRA", "lora_path"), ("Loss plot", "loss_plot_path"), ("Preview grid", "grid_path")):
        print(f"{label:13} {summary[key]}")
    print(
        f"Recognised    {summary['recognised']:.0%} of {NUM_SEEDS} with the LoRA, "
        f"{summary['recognised_without_lora']:.0%} without; "
        f"background obeyed {summary['background_obeyed']:.0%}"
    )
    return 0


def demo(
    folder: Path, seed: int, out: Path, *, device: str | None = None, fresh: bool = False
) -> dict[str, Any]:
    """Train on ``folder``, measure against creature ``seed``, write all into ``out``; give the summary."""
    name = creature(seed).name
    began = time.perf_counter()
    base = api.open_demo_base()
    data_config, train_config = api.make_both(
        {
            **DATASET,
            **TRAINING,
            "output_name": f"demo_{name}",
            "sample_prompts": [f"{name}, large, blue background"],
        }
    )
    train_set = api.build_train_set(api.scan_folder(folder), data_config)
    places = api.Places(out / "runs", out, out / "cache")
    finished, saves = None, []
    with ProgressLine(sys.stderr) as line:
        for event in api.train(base, train_set, train_config, places=places, device=device, fresh=fresh):
            line.show(event)
            if isinstance(event, api.Saved):
                saves.append(event.step)
            if isinstance(event, api.Finished):
                finished = event
    assert finished is not None  # train ends with Finished or raises
    train_seconds = time.perf_counter() - began
    plot, grid = out / "loss.png", out / "grid.png"
    api.chart(finished.losses, saves).save(plot)
    rates = measure(base, finished.lora_file, seed, device)
    draw_grid(base, finished.lora_file, name, device).save(grid)
    summary = {
        "lora_path": str(finished.lora_file),
        "grid_path": str(grid),
        "loss_plot_path": str(plot),
        "steps": finished.step,
        "train_seconds": round(train_seconds, 2),
        "total_seconds": round(time.perf_counter() - began, 2),
        "num_seeds": NUM_SEEDS,
        "recognised": rates.recognised,
        "recognised_without_lora": rates.recognised_without_lora,
        "background_obeyed": rates.background_obeyed,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def measure(base: api.Base, lora: Path, seed: int, device: str | None = None) -> Rates:
    """Draw the character on every background with and without the LoRA and count what is recognised."""
    name = creature(seed).name
    prompts = {f"{name}, large, {color} background": color for color in COLORS}
    seeds = range(1, NUM_SEEDS // len(prompts) + 1)
    drawn = list(
        api.draw(
            base,
            [lora],
            prompts=list(prompts),
            seeds=seeds,
            strengths=[1.0, 0.0],
            settings=DRAWING,
            device=device,
        )
    )
    with_lora = [d for d in drawn if d.strength == 1.0]
    without = [d for d in drawn if d.strength == 0.0]
    return Rates(
        recognised=sum(is_creature(d.image, seed) for d in with_lora) / len(with_lora),
        recognised_without_lora=sum(is_creature(d.image, seed) for d in without) / len(without),
        background_obeyed=sum(read_scene(d.image).background == prompts[d.prompt] for d in with_lora)
        / len(with_lora),
    )


def draw_grid(base: api.Base, lora: Path, name: str, device: str | None = None) -> Any:
    """Draw prompts, with the trigger word and without, at rising strengths."""
    prompts = [f"{name}, large, {color} background" for color in ("blue", "yellow", "green")]
    prompts.append("large red circle, white background")
    strengths = [0.0, 0.5, 0.75, 1.0]
    cells = list(
        api.draw(
            base, [lora], prompts=prompts, seeds=[11], strengths=strengths, settings=DRAWING, device=device
        )
    )
    rows = [[d.image for d in cells if d.prompt == prompt] for prompt in prompts]
    return api.grid(
        rows, prompts, [f"strength {s:g}" for s in strengths], title=f"{lora.stem}: 0 is without the LoRA"
    )


if __name__ == "__main__":
    sys.exit(main())
