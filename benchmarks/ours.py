"""Ours: the headless trainer as users get it. `python -m benchmarks.ours JOB.json`."""

from __future__ import annotations

import sys
from pathlib import Path

from .architectures import ARCHITECTURES
from .common import REFUSED, Work, open_base, pack, say_facts, say_gpu_peak, say_step, say_versions


def main() -> None:
    """Train the job's steps."""
    work = Work.read(sys.argv[1])
    pack()
    import loragraft.trainer.pages  # noqa: F401  # before torch, as on the command line
    from loragraft.trainer import api

    say_versions("torch", "diffusers", "transformers")
    try:
        base = open_base(work)
        data, config = settings(work)
        train_set = api.build_train_set(api.scan_folder(work.images), data)
        out = Path(work.out)
        places = api.Places(runs=out / "runs", loras=out / "loras", cache=out / "cache")
        notes: list[str] = []
        for event in api.train(base, train_set, config, places=places, device=work.device):
            if isinstance(event, api.Step):
                say_step(event.step, event.total_steps, event.loss)
            elif isinstance(event, api.Planned):
                say_facts(planned=event.lines)
            elif isinstance(event, api.Note):
                notes.append(event.text)
                say_facts(notes=notes)
    except api.LoraGraftError as error:
        say_facts(refused=f"{error.code}: {error.what} {error.why}")
        sys.exit(REFUSED)
    say_gpu_peak(work.device)


def settings(work: Work):  # type: ignore[no-untyped-def]
    """Return the job as the trainer's two configs; raises LoraGraftError for settings it does not have."""
    from loragraft.trainer import api

    return api.make_both(
        {
            "output_name": "bench",
            "resolution": work.resolution,
            "enable_bucket": False,
            "train_batch_size": work.batch_size,
            "network_dim": work.rank,
            "network_alpha": work.alpha,
            "network_train_unet_only": not work.text_encoder,
            "learning_rate": work.learning_rate,
            "lr_scheduler": "constant",
            "max_train_steps": work.steps,
            "mixed_precision": work.precision,
            "seed": work.seed,
            "preview_image": False,
            **ARCHITECTURES[work.architecture].settings,
            **work.settings,
        }
    )


if __name__ == "__main__":
    main()
