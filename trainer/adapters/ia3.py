"""(IA)^3: one trained factor for each output or input of a layer (Liu et al. 2022), W' = W (1 + w).

LyCORIS' own names, ``weight`` and ``on_input``, are read by no host. In a file the factors are therefore the
lengths of a DoRA without an update, m = (1 + w) |W|, which ComfyUI and LyCORIS apply as exactly this.
"""

from __future__ import annotations

import torch

from . import dora
from .lora import DOWN, UP
from .shapes import Shape
from .shares import Start, Tensors, zeros

WEIGHT, ON_INPUT = "weight", "on_input"


def begin(shape: Shape, on_input: bool) -> dict[str, Start]:
    """Return how the factors begin: at zero, (n,), or (1, n, 1, 1) for convolutions."""
    number = shape.inputs if on_input else shape.outputs
    return {WEIGHT: zeros(1, number, *shape.ones) if shape.kernel else zeros(number)}


def delta(t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """Return W w, (out, in, ...); ``on_input`` among the tensors says that inputs are scaled, not outputs."""
    return weight * _placed(t[WEIGHT].flatten(), weight, ON_INPUT in t)


def saved(t: Tensors, weight: torch.Tensor, on_input: bool) -> dict[str, torch.Tensor]:
    """Return the factors as DoRA's lengths around an update of rank 1 that is zero."""
    factors = _placed(1 + t[WEIGHT].flatten(), weight, on_input)
    ones = tuple(1 for _ in weight.shape[2:])
    return {
        "alpha": torch.tensor(1.0),
        DOWN: torch.zeros(1, *weight.shape[1:]),
        UP: torch.zeros(weight.shape[0], 1, *ones),
        dora.NAME: factors * dora.lengths(weight, not on_input),
    }


def loaded(t: Tensors, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the factors of a file, in LyCORIS' form or in that of `saved`; KeyError for another one."""
    if WEIGHT in t:
        return {WEIGHT: t[WEIGHT], ON_INPUT: t[ON_INPUT]}
    if bool(t[UP].any()):
        raise KeyError(WEIGHT)
    scale = t[dora.NAME].float()
    on_input = scale.shape[1] == weight.shape[1] and scale.shape[0] != weight.shape[0]
    factors = (scale / dora.lengths(weight, not on_input)).flatten() - 1
    ones = tuple(1 for _ in weight.shape[2:])
    placed = factors.view(1, -1, *ones) if ones else factors
    return {WEIGHT: placed, ON_INPUT: torch.tensor(int(on_input))}


def _placed(factors: torch.Tensor, weight: torch.Tensor, on_input: bool) -> torch.Tensor:
    """View (n,) as (n, 1, ...) for outputs or (1, n, ...) for inputs."""
    sides = [1] * weight.ndim
    sides[1 if on_input else 0] = -1
    return factors.view(sides)
