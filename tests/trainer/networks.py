"""One layer of every kind, every network on it, and the reference's module with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loragraft.trainer.adapters import lora, network
from loragraft.trainer.adapters.change import Change
from loragraft.trainer.adapters.methods import Options
from loragraft.trainer.adapters.shares import Drops, Moment
from loragraft.trainer.parts import Parts, Target
from loragraft_tests.trainer import tiny

SHAPES: Mapping[str, Any] = {
    "linear": lambda: nn.Linear(24, 16),
    "wide": lambda: nn.Linear(12, 32, bias=False),
    "point": lambda: nn.Conv2d(24, 16, 1),
    "conv": lambda: nn.Conv2d(12, 16, 3, padding=1),
    "strided": lambda: nn.Conv2d(12, 16, 3, stride=2, padding=1),
}
LARGE = ("conv", "strided")


@dataclass(frozen=True)
class Case:
    """A network and its options, by our names; ``rank`` and ``alpha`` for all layers."""

    algo: str
    rank: int = 4
    alpha: float = 2.0
    options: Mapping[str, Any] = ()  # type: ignore[assignment]

    def settings(self, **changes: Any) -> network.Settings:
        """Return what is trained: all layers alike."""
        values = {"algo": self.algo, "options": Options(**dict(self.options)), **changes}
        return network.Settings(self.rank, self.alpha, self.rank, self.alpha, 7, **values)


CASES: Mapping[str, Case] = {
    "lora": Case("lora"),
    "lora tucker": Case("locon", options={"use_tucker": True}),
    "lora rank-stabilised": Case("lora", options={"rs_lora": True}),
    "dora": Case("lora", options={"dora_wd": True}),
    "dora on outputs": Case("lora", options={"dora_wd": True, "wd_on_output": True}),
    "dora tucker": Case("lora", options={"dora_wd": True, "use_tucker": True}),
    "loha": Case("loha"),
    "loha tucker": Case("loha", options={"use_tucker": True}),
    "loha dora": Case("loha", options={"dora_wd": True}),
    "lokr": Case("lokr", 2),
    "lokr whole": Case("lokr", 64),
    "lokr full matrix": Case("lokr", 2, options={"full_matrix": True}),
    "lokr factor 2": Case("lokr", 1, options={"factor": 2}),
    "lokr both": Case("lokr", 1, options={"decompose_both": True, "factor": 4}),
    "lokr unbalanced": Case("lokr", 1, options={"unbalanced_factorization": True, "factor": 2}),
    "lokr tucker": Case("lokr", 1, options={"use_tucker": True, "factor": 2}),
    "lokr dora": Case("lokr", 1, options={"dora_wd": True, "wd_on_output": True}),
    "glora": Case("glora"),
    "oft": Case("oft"),
    "oft constraint": Case("oft", options={"constraint": 0.01}),
    "boft": Case("boft"),
    "boft constraint": Case("boft", options={"constraint": 0.01}),
    "boft rescaled": Case("boft", options={"rescaled": True}),
    "ia3": Case("ia3"),
    "full": Case("full"),
    "dylora": Case("dylora", options={"unit": 2}),
}


class Layers(nn.Module):
    """One layer of every kind that is trained."""

    def __init__(self) -> None:
        super().__init__()
        for name, make in SHAPES.items():
            setattr(self, name, make())
        self.group = nn.GroupNorm(4, 16)
        self.layer = nn.LayerNorm(16)


TARGETS = tuple(
    Target("denoiser", name, f"lora_unet_{name}", "conv" if name in LARGE else "linear") for name in SHAPES
)
NORMS = tuple(Target("denoiser", name, f"lora_unet_{name}", "norm") for name in ("group", "layer"))


def layers() -> Parts:
    """Return frozen layers with the same random weights each time."""
    torch.manual_seed(0)
    module = Layers().requires_grad_(False)
    return tiny.parts_of(module, nn.Identity(), nn.Identity())


def injected(case: Case, parts: Parts | None = None, *, drops: Drops | None = None, **changes: Any) -> Any:
    """Put a network on all layers; return (parts, adapter)."""
    parts = parts or layers()
    settings = case.settings(drops=drops or Drops(), **changes)
    return parts, network.inject(parts, settings, TARGETS)


def moved(adapter: network.Adapter, seed: int = 1, by: float = 0.2) -> network.Adapter:
    """Move every trained tensor to somewhere else, as training would."""
    rng = torch.Generator().manual_seed(seed)
    for m in adapter.modules:
        for tensor in m.tensors.values():
            tensor.data += by * torch.randn(tensor.shape, generator=rng)
    return adapter


def input_of(name: str, batch: int = 2) -> torch.Tensor:
    """Return an input that the layer of this name takes."""
    rng = torch.Generator().manual_seed(3)
    shapes = {
        "linear": (5, 24),
        "wide": (5, 12),
        "point": (24, 6, 5),
        "conv": (12, 6, 5),
        "strided": (12, 6, 5),
        "group": (16, 4, 4),
        "layer": (5, 16),
    }
    return torch.randn((batch, *shapes[name]), generator=rng)


def weight_of(m: network.Adapted) -> torch.Tensor:
    """Return the changed weight W' of a trained layer."""
    weight: torch.Tensor = m.module.base.weight  # type: ignore[assignment]
    if isinstance(m.share, Change):
        return (weight + m.share.delta(m.module.base)).detach()
    saved = m.share.saved(m.module.base)
    return weight + m.share.alpha / m.share.rank * lora.delta(saved)


def at(adapter: network.Adapter, step: int, micro: int = 0, seed: int = 7) -> None:
    """Let the next pass be of this step."""
    adapter.rows.moments = {adapter.row: Moment(seed, step, micro)}


def outputs(adapter: network.Adapter) -> dict[str, torch.Tensor]:
    """Return what every layer makes of its input."""
    return {m.target.path: m.module(input_of(m.target.path)) for m in adapter.modules}
