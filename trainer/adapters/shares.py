"""What all networks have in common: whose turn it is, what is left out of a step, how tensors begin.

A share is what one run trains in one layer. What is left out (dropout) is a function of (seed, step,
micro-batch, module), so that a continued run leaves out the same, and so does a block computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from ..objective import generator

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Moment:
    """A micro-batch of a run: what its random draws depend on.

    ``part`` is (first, behind the last, number) of its samples where other processes have the rest;
    ``samples`` is how many there are here.
    """

    seed: int
    step: int
    micro: int
    part: tuple[int, int, int] | None = None
    samples: int = 1


@dataclass
class Rows:
    """Which runs the present batch belongs to, in equal slices: shared by all layers of a base model.

    ``moments`` has a run's moment while it trains; nothing is left out of samples and validation.
    """

    active: tuple[int, ...] = (0,)
    moments: dict[int, Moment] = field(default_factory=dict)


@dataclass(frozen=True)
class Drops:
    """Chances that something is left out of a step: values, ranks (outputs), whole modules."""

    network: float = 0.0
    rank: float = 0.0
    rank_scale: bool = False
    module: float = 0.0

    @property
    def any(self) -> bool:
        """Say whether anything is ever left out."""
        return bool(self.network or self.rank or self.module)


class Share(Protocol):
    """What one run trains in one layer; ``key`` is the module's name in a LoRA file."""

    key: str
    rank: int
    alpha: float

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The trained tensors by their names behind the key, in a fixed order."""

    def added(
        self, base: nn.Module, out: torch.Tensor, x: torch.Tensor, moment: Moment | None
    ) -> torch.Tensor:
        """Return ``out``, which is base(x), with this share's update added to it."""

    def saved(self, base: nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors as a LoRA file has them, float32."""

    def set_strength(self, strength: float) -> None:
        """Multiply the effect; 0 is the base model."""

    @torch.no_grad()
    def limit_norm(self, base: nn.Module, largest: float) -> torch.Tensor:
        """Scale the tensors so that the update is not longer; return its length (before, after), (2,)."""


def is_left_out(drops: Drops, moment: Moment | None, key: str) -> bool:
    """Say whether a module is left out of this micro-batch."""
    if moment is None or not drops.module:
        return False
    rng = generator(moment.seed, moment.step, moment.micro, key, "module_dropout")
    return bool(torch.rand((), generator=rng) < drops.module)


def kept(
    chance: float, moment: Moment, key: str, what: str, shape: tuple[int, ...], like: torch.Tensor
) -> torch.Tensor:
    """Return 1 for what stays and 0 for what is left out, as ``like`` is, of a shape; drawn on its device."""
    seed = generator(moment.seed, moment.step, moment.micro, key, what).initial_seed()
    rng = torch.Generator(like.device).manual_seed(seed)
    return (torch.rand(shape, generator=rng, device=like.device) > chance).to(like.dtype)


def kept_samples(
    chance: float, moment: Moment, key: str, what: str, shape: tuple[int, ...], like: torch.Tensor
) -> torch.Tensor:
    """Return what `kept` does for a shape (B, ...); for a part of a batch, what the whole batch has there."""
    if moment.part is None:
        return kept(chance, moment, key, what, shape, like)
    first, last, number = moment.part
    each = shape[0] // (last - first)  # a text encoder sees a long caption as several rows
    whole = kept(chance, moment, key, what, (number * each, *shape[1:]), like)
    return whole[first * each : last * each]


def limits(norm: torch.Tensor, largest: float) -> torch.Tensor:
    """Return the factor that brings a length down to ``largest``, 1 where it is shorter (kohya's rule)."""
    norm = norm.clamp(min=largest / 2)
    return norm.clamp(max=largest) / norm


@dataclass(frozen=True)
class Start:
    """How a tensor begins: "zeros", "ones", "uniform" in +-width, or "normal" of that width."""

    shape: tuple[int, ...]
    how: str = "zeros"
    width: float = 1.0


def kaiming(*shape: int) -> Start:
    """Return uniform in +-1/sqrt(fan_in): what kaiming_uniform_ with a = sqrt(5) draws."""
    return Start(shape, "uniform", math.prod(shape[1:]) ** -0.5)


def normal(std: float, *shape: int) -> Start:
    """Return a normal distribution around 0."""
    return Start(shape, "normal", std)


def zeros(*shape: int) -> Start:
    """Return zeros."""
    return Start(shape)


def ones(*shape: int) -> Start:
    """Return ones."""
    return Start(shape, "ones")


def draw(start: Start, *key: object) -> torch.Tensor:
    """Return the tensor as it begins, float32 on the CPU: a function of ``key`` alone."""
    if start.how == "uniform":
        return (torch.rand(start.shape, generator=generator(*key)) * 2 - 1) * start.width
    if start.how == "normal":
        return torch.randn(start.shape, generator=generator(*key)) * start.width
    return torch.full(start.shape, 1.0 if start.how == "ones" else 0.0)
