"""Messages of pretended runs, as Train LoRA sends them."""

from __future__ import annotations

import math
from typing import Any

Message = dict[str, Any]


def steps(first: int, last: int, total: int = 400) -> list[Message]:
    """Return one message per step, with a loss that falls and jitters."""
    return [
        {
            "step": i,
            "total": total,
            "epoch": 1 + i // 64,
            "loss": (0.03 + 0.14 * math.exp(-i / 80)) * (0.5 + 1.1 * abs(math.sin(i * 12.9898))),
            "lr": 1e-4 * (1 + math.cos(math.pi * i / total)) / 2,
            "seconds": 0.12,
        }
        for i in range(first, last + 1)
    ]


def training(node: str, last: int = 250, **head: Any) -> list[Message]:
    """Return the messages of a run that is at step ``last`` of 400."""
    head = {"node": node, **head}
    lines = [
        "16 images x 4 repeats = 64 a epoch",
        "buckets: 64x64 (9), 64x96 (7)",
        "264 modules, 1.6 M parameters",
    ]
    return [
        {**head, "kind": "plan", "total_steps": 400, "first_step": 1, "lines": lines},
        {**head, "kind": "cache", "what": "images", "done": 16, "total": 16},
        {**head, "kind": "step", "steps": steps(1, last)},
        {**head, "kind": "save", "step": 100, "zero_tensors": 0, "num_tensors": 528},
        {**head, "kind": "save", "step": 200, "zero_tensors": 0, "num_tensors": 528},
    ]


def done(node: str, **more: Any) -> Message:
    """Return the message that closes a run."""
    losses = [[s["step"], s["loss"]] for s in steps(1, 400)]
    payload = {
        "file": "blorb.safetensors",
        "trigger": "blorb",
        "step": 400,
        "total_steps": 400,
        "losses": losses,
    }
    return {"node": node, "kind": "done", "saves": [{"step": 400}], "seconds": 48.2, **payload, **more}


SWEPT = [
    (f"blorb_learning_rate{rate}_network_dim{dim}", rate, dim) for rate in ("1e-4", "3e-4") for dim in (8, 32)
]


def sweep(node: str, last: int = 250, **head: Any) -> list[Message]:
    """Return the messages of a sweep of four runs, of which one has failed and three are at step ``last``."""
    head = {"node": node, **head}
    named = [{"name": name, "label": f"learning_rate {rate}, network_dim {dim}"} for name, rate, dim in SWEPT]
    plan = {
        "kind": "plan",
        "total_steps": 400,
        "first_step": 0,
        "lines": ["16 images", "one of 4 runs side by side"],
    }
    taken = [
        {**step, "run": run, "loss": step["loss"] * (1 + run / 3)}
        for run in range(4)
        for step in steps(1, 60 if run == 2 else last)
    ]
    return [
        {**head, "kind": "sweep", "runs": named},
        *({**head, **plan, "run": run} for run in range(4)),
        {**head, "kind": "step", "steps": taken, "pace": 0.05, "left": 22.5},
        {**head, "kind": "failed", "run": 2, "error": "LG-RUN-004  The loss became NaN at step 61."},
    ]


def sweep_done(node: str) -> Message:
    """Return the message that closes that sweep."""
    losses = [[s["step"], s["loss"]] for s in steps(1, 400)]
    runs = [
        {
            "name": name,
            "label": f"learning_rate {rate}, network_dim {dim}",
            "file": "" if run == 2 else f"{name}.safetensors",
            "error": "LG-RUN-004  The loss became NaN at step 61." if run == 2 else "",
            "step": 60 if run == 2 else 400,
            "total_steps": 400,
            "losses": [[x, loss * (1 + run / 3)] for x, loss in losses[: 60 if run == 2 else 400]],
        }
        for run, (name, rate, dim) in enumerate(SWEPT)
    ]
    files = "\n".join(run["file"] for run in runs if run["file"])
    whole = {
        "file": files,
        "trigger": "blorb",
        "step": 1260,
        "total_steps": 1600,
        "losses": [],
        "seconds": 61.4,
    }
    return {"node": node, "kind": "done", "runs": runs, **whole}
