"""DyLoRA: a LoRA whose ranks learn in turn, so that it can be cut to any of them (Valipour et al. 2023).

As in kohya's trainer: each micro-batch trains one block of ``unit`` ranks, the others stay as they are, and
the update is multiplied by sqrt(r / number of ranks up to that block). The file is that of a plain LoRA.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ..objective import generator
from .lora import DOWN, UP, products
from .shapes import device_of, shape_of
from .shares import Drops, Moment, draw, is_left_out, kaiming, limits


class Nested(nn.Module):
    """Down (unit, in, ...) and up tensors (out, unit, ...), one pair for each block of ranks; see `Share`.

    Each block is a tensor of its own, so that an optimizer leaves alone what was not trained.
    """

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, unit: int, key: str, drops: Drops | None = None
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.unit, self.key, self.drops = unit, key, drops or Drops()
        shape, device = shape_of(base), device_of(base)
        blocks = range(rank // unit)
        self.downs = nn.ParameterList(
            nn.Parameter(torch.empty(unit, shape.inputs, *shape.kernel, device=device)) for _ in blocks
        )
        self.ups = nn.ParameterList(
            nn.Parameter(torch.zeros(shape.outputs, unit, *shape.ones, device=device)) for _ in blocks
        )

    def begin(self, seed: int) -> None:
        """Draw the down tensors as those of a LoRA of this rank."""
        self.load(draw(kaiming(self.rank, *self.downs[0].shape[1:]), seed, "init", self.key), None)

    @torch.no_grad()
    def load(self, down: torch.Tensor, up: torch.Tensor | None) -> None:
        """Take over the tensors of a LoRA of the same rank; raises RuntimeError for other shapes."""
        for number, block in enumerate(self.downs):
            block.copy_(down[number * self.unit : (number + 1) * self.unit])
        for number, block in enumerate(self.ups if up is not None else ()):
            block.copy_(up[:, number * self.unit : (number + 1) * self.unit])  # type: ignore[index]

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """See `Share`; the names have the block's number behind them."""
        downs = {f"{DOWN}.{number}": tensor for number, tensor in enumerate(self.downs)}
        return {**downs, **{f"{UP}.{number}": tensor for number, tensor in enumerate(self.ups)}}

    def added(
        self, base: nn.Module, out: torch.Tensor, x: torch.Tensor, moment: Moment | None
    ) -> torch.Tensor:
        """See `Share`; without a moment, the whole LoRA."""
        if is_left_out(self.drops, moment, self.key):
            return out
        blocks, scale, turn = len(self.downs), self.scale, None
        if moment is not None:
            rng = generator(moment.seed, moment.step, moment.micro, self.key, "dylora")
            turn = int(torch.randint(blocks, (), generator=rng))
            scale *= math.sqrt(blocks / (turn + 1))

        def joined(tensors: nn.ParameterList, dim: int) -> torch.Tensor:
            parts = [t if turn in (None, number) else t.detach() for number, t in enumerate(tensors)]
            return torch.cat(parts, dim).to(out.dtype)

        down, up = products(base)
        return out + up(down(x, joined(self.downs, 0)) * scale, joined(self.ups, 1))

    def saved(self, base: nn.Module) -> dict[str, torch.Tensor]:
        """See `Share`."""
        return {
            "alpha": torch.tensor(float(self.alpha)),
            DOWN: torch.cat(list(self.downs)).detach().float().cpu(),
            UP: torch.cat(list(self.ups), 1).detach().float().cpu(),
        }

    def set_strength(self, strength: float) -> None:
        """See `Share`."""
        self.scale = self.alpha / self.rank * strength

    @torch.no_grad()
    def limit_norm(self, base: nn.Module, largest: float) -> torch.Tensor:
        """See `Share`."""
        down, up = torch.cat(list(self.downs)), torch.cat(list(self.ups), 1)
        norm = (self.scale * (up.flatten(1) @ down.flatten(1))).norm()
        factor = limits(norm, largest)
        for tensor in (*self.downs, *self.ups):
            tensor.mul_(factor.sqrt())
        return torch.stack([norm, norm * factor])
