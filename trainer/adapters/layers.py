"""The layers that take the frozen ones' places: base(x), and each run's own update added to its slice.

The frozen weights stay where they are, whoever owns them; trained tensors are float32 whatever the
base's storage is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from ..engine import lowrank
from ..engine.lowrank import Bank
from .lora import LowRank
from .shares import Rows, Share


class Layer(nn.Module):
    """A frozen layer, a share for each run or None, and who takes part; also of normalisation layers."""

    def __init__(self, base: nn.Module, runs: Sequence[Share | None], rows: Rows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.runs = nn.ModuleList(runs)  # type: ignore[arg-type]
        self.bank: Bank | None = None  # set where the layer runs as one function

    @property
    def shares(self) -> list[Share | None]:
        """Each run's share, or None where it does not train this layer."""
        return [cast("Share | None", share) for share in self.runs]

    @property
    def lows(self) -> list[LowRank | None]:
        """The shares of runs that all train a LoRA."""
        return cast("list[LowRank | None]", self.shares)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, for code that looks at a layer's weight."""
        return cast(torch.Tensor, self.base.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return cast("torch.Tensor | None", self.base.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return base(x) with each slice's own update added to it."""
        out: torch.Tensor = self.base(x)
        x, active, moments = x.to(out.dtype), self.rows.active, self.rows.moments

        def added(out: torch.Tensor, x: torch.Tensor, row: int) -> torch.Tensor:
            share = self.shares[row]
            return out if share is None else share.added(self.base, out, x, moments.get(row))

        if len(active) == 1:
            return added(out, x, active[0])
        pieces = zip(out.chunk(len(active)), x.chunk(len(active)), active, strict=True)
        return torch.cat([added(*piece) for piece in pieces])


class LoRALinear(Layer):
    """A frozen linear layer with an update for each run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)."""
        if self.bank is None:
            return super().forward(x)
        return lowrank.linear(x, self.base, self.bank, self.rows.active)


class LoRAConv(Layer):
    """A frozen convolution (1x1 too) with an update for each run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, in, H, W) -> (B, out, H', W')."""
        if self.bank is None:
            return super().forward(x)
        return lowrank.convolution(x, cast(nn.Conv2d, self.base), self.bank, self.rows.active)


LoRAModule = LoRALinear | LoRAConv


def layer_around(base: nn.Module, runs: Sequence[Share | None], rows: Rows) -> Layer:
    """Return the layer that takes ``base``'s place."""
    kinds = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv}
    kind = next((ours for plain, ours in kinds.items() if isinstance(base, plain)), Layer)
    return kind(base, runs, rows)
