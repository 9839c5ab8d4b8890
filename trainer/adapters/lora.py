"""LoRA on linear layers and convolutions (Hu et al. 2021), in kohya's form: W x + (alpha/r) up(down(x))."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .shapes import device_of, shape_of
from .shares import Drops, Moment, Start, Tensors, draw, is_left_out, kaiming, kept_samples, limits

DOWN, UP = "lora_down.weight", "lora_up.weight"


class LowRank(nn.Module):
    """The two trained tensors of one layer: float32, ``down`` (r, in, ...) and ``up`` (out, r, ...)."""

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, key: str = "", drops: Drops | None = None
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.key, self.drops = key, drops or Drops()
        shape, device = shape_of(base), device_of(base)
        self.down = nn.Parameter(torch.empty(rank, shape.inputs, *shape.kernel, device=device))
        self.up = nn.Parameter(torch.zeros(shape.outputs, rank, *shape.ones, device=device))

    def begin(self, seed: int) -> None:
        """Draw ``down`` as kaiming_uniform_ (a = sqrt(5)) does, from the module's own generator."""
        self.down.data.copy_(draw(kaiming(*self.down.shape), seed, "init", self.key))

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """See `Share`."""
        return {DOWN: self.down, UP: self.up}

    def added(
        self, base: nn.Module, out: torch.Tensor, x: torch.Tensor, moment: Moment | None
    ) -> torch.Tensor:
        """See `Share`; the scale is applied at rank r, where it is cheapest."""
        if is_left_out(self.drops, moment, self.key):
            return out
        down, up = products(base)
        hidden = down(x, self.down.to(out.dtype))
        scale = self.scale
        if moment is not None and self.drops.any:
            hidden, factor = self._thinned(hidden, moment)
            scale *= factor
        return out + up(hidden * scale, self.up.to(out.dtype))

    def _thinned(self, hidden: torch.Tensor, moment: Moment) -> tuple[torch.Tensor, float]:
        """Leave out values, and ranks of each sample, of (B, ..., r) or (B, r, H, W), as kohya does."""
        factor, drops = 1.0, self.drops
        if drops.network:
            shape = tuple(hidden.shape)
            mask = kept_samples(drops.network, moment, self.key, "network_dropout", shape, hidden)
            hidden = hidden * mask / (1 - drops.network)
        if drops.rank:
            # Attention hands in all tokens as rows of one matrix: those of a sample leave out the same ranks.
            samples = moment.samples if hidden.ndim == 2 else hidden.shape[0]
            shape = (samples, self.rank)
            mask = kept_samples(drops.rank, moment, self.key, "rank_dropout", shape, hidden)
            mask = mask.repeat_interleave(hidden.shape[0] // samples, dim=0)
            channels = 1 if self.down.ndim == 4 else hidden.ndim - 1
            sides = [self.rank if dim == channels else 1 for dim in range(1, hidden.ndim)]
            hidden, factor = hidden * mask.view(hidden.shape[0], *sides), 1 / (1 - drops.rank)
        return hidden, factor

    def saved(self, base: nn.Module) -> dict[str, torch.Tensor]:
        """See `Share`."""
        return {
            "alpha": torch.tensor(float(self.alpha)),
            **{name: tensor.detach().float().cpu() for name, tensor in self.tensors.items()},
        }

    def set_strength(self, strength: float) -> None:
        """See `Share`."""
        self.scale = self.alpha / self.rank * strength

    @torch.no_grad()
    def limit_norm(self, base: nn.Module, largest: float) -> torch.Tensor:
        """See `Share`; both tensors take the square root of the factor."""
        norm = (self.scale * (self.up.flatten(1) @ self.down.flatten(1))).norm()
        factor = limits(norm, largest)
        for tensor in (self.down, self.up):
            tensor.mul_(factor.sqrt())
        return torch.stack([norm, norm * factor])


def products(base: nn.Module) -> tuple[partial[torch.Tensor], partial[torch.Tensor]]:
    """Return the products with down, which has the layer's kernel, and with up, which is 1x1."""
    if not isinstance(base, nn.Conv2d):
        return partial(F.linear), partial(F.linear)
    geometry = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
    return partial(F.conv2d, **geometry), partial(F.conv2d)


def delta(t: Tensors) -> torch.Tensor:
    """Return up down, or with ``lora_mid`` (r, r, kh, kw) its Tucker form, unscaled: (out, in, ...)."""
    down, up = t[DOWN], t[UP]
    if "lora_mid.weight" not in t:
        return (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])
    mid = t["lora_mid.weight"]
    return torch.einsum("or,rm...,mi->oi...", up.flatten(1), mid, down.flatten(1))


def begin(rank: int, outputs: int, inputs: int, kernel: tuple[int, ...], tucker: bool) -> dict[str, Start]:
    """Return how the tensors begin; with ``tucker`` the kernel lies in a tensor of its own."""
    ones = tuple(1 for _ in kernel)
    up = Start((outputs, rank, *ones))
    if not tucker:
        return {DOWN: kaiming(rank, inputs, *kernel), UP: up}
    return {
        DOWN: kaiming(rank, inputs, *ones),
        "lora_mid.weight": kaiming(rank, rank, *kernel),
        UP: up,
    }
