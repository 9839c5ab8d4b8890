"""Keep a training run's state in safetensors and JSON, so that it continues exactly after any kill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors beside `path` first and then rename, so that a kill leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, dict(metadata or {}))
    part.replace(path)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read tensors and metadata."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


class TrainState:
    """Named modules, one AdamW and a step number, saved and loaded as one file."""

    def __init__(
        self, path: Path, modules: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer
    ) -> None:
        self.path, self.modules, self.optimizer = path, dict(modules), optimizer

    def save(self, step: int, **facts: Any) -> None:
        """Write everything the next step depends on; `facts` are plain JSON values."""
        tensors = {}
        for name, module in self.modules.items():
            tensors.update({f"{name}/{key}": value for key, value in module.state_dict().items()})
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer/{index}/{slot}": value for slot, value in slots.items()})
        save_tensors(self.path, tensors, {"step": str(step), "facts": json.dumps(facts)})

    def load(self) -> tuple[int, dict[str, Any]]:
        """Fill modules and optimizer from the file, if any; give the number of steps done and facts."""
        if not self.path.exists():
            return 0, {}
        tensors, metadata = load_tensors(self.path)
        for name, module in self.modules.items():
            own = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{name}/")}
            module.load_state_dict(own)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, slot = key.split("/")
                state.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        return int(metadata["step"]), json.loads(metadata["facts"])
