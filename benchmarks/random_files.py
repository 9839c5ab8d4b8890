"""Random checkpoints, written tensor by tensor: no more of them than one tensor is ever in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .architectures import Architecture
from .shapes import modules_of, state_dicts

POOL = 2**24 + 61  # random values that all tensors are cut from; odd, so that no two begin alike


class Values:
    """Values for one tensor after the other: norms at 1 and 0, the rest uniform in +-1/sqrt(fan_in)."""

    def __init__(self, dtype: torch.dtype, seed: int = 0, pool: int = POOL) -> None:
        drawn = torch.empty(pool).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
        self.pool, self.begin = drawn.to(dtype), 0

    def of(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return a tensor's values, in the dtype of the file."""
        values = torch.empty(shape, dtype=self.pool.dtype)
        if len(shape) == 1:
            return values.fill_(1.0 if name.endswith(("weight", "scale")) else 0.0)
        flat, done = values.view(-1), 0
        while done < flat.numel():
            piece = self.pool[self.begin : self.begin + flat.numel() - done]
            flat[done : done + piece.numel()] = piece
            done += piece.numel()
            self.begin = (self.begin + piece.numel()) % len(self.pool)
        bound = 0.02 if "embedding" in name else shape[1:].numel() ** -0.5
        return values.mul_(bound)


def write_files(architecture: Architecture, name: str, folder: Path, pool: int = POOL) -> dict[str, Path]:
    """Return the files of an architecture in ``folder`` by their roles, writing those that are not there."""
    from loragraft.trainer.families import FAMILIES
    from loragraft.trainer.tools.stream import write_stream

    # Parts beside the denoiser are the same in all sizes of a family.
    owners = {role: name if role == "checkpoint" else architecture.family for role in architecture.files}
    files = {role: folder / f"{owner}_random_{role}.safetensors" for role, owner in owners.items()}
    if all(file.exists() for file in files.values()):
        return files
    dtype = getattr(torch, architecture.dtype)
    meta = state_dicts(modules_of(architecture.shapes, architecture.sizes))
    tensors = FAMILIES[architecture.family].join(meta)
    for role, prefix in architecture.files.items():
        if files[role].exists():
            continue
        shapes = _below(tensors, prefix)
        values = Values(dtype, pool=pool)
        write_stream(
            files[role],
            {key: (dtype, tuple(shape)) for key, shape in shapes.items()},
            lambda key, shapes=shapes, values=values: values.of(key, shapes[key]),  # type: ignore[misc]
            {"format": "pt"},
        )
    return files


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Size]:
    return {key[len(prefix) :]: tensors[key].shape for key in tensors if key.startswith(prefix)}
