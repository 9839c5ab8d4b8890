"""Schedules: how the sigmas fall from the noise schedule's largest to its smallest, with a 0 at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..objective import Flow, Objective

Row = Callable[[torch.Tensor, int], torch.Tensor]
OWN = "own"  # the schedule of the family's authors
RHO = 7.0  # of Karras et al. 2022, table 1


def normal(table: torch.Tensor, steps: int) -> torch.Tensor:
    """Evenly spaced timesteps from the last to the first; sigmas between two are interpolated in log."""
    return _at(table, torch.linspace(len(table) - 1, 0, steps))


def sgm_uniform(table: torch.Tensor, steps: int) -> torch.Tensor:
    """Evenly spaced timesteps that stop one step before the first."""
    return _at(table, torch.linspace(len(table) - 1, 0, steps + 1)[:-1])


def ddim_uniform(table: torch.Tensor, steps: int) -> torch.Tensor:
    """Every n-th timestep from the second on, as DDIM's authors space them."""
    stride = max(1, len(table) // steps)
    return table[(torch.arange(steps) * stride + 1).clamp(max=len(table) - 1)].flip(0)


def karras(table: torch.Tensor, steps: int) -> torch.Tensor:
    """Evenly spaced in sigma^(1/7) (Karras et al. 2022, eq. 5)."""
    high, low = float(table[-1]) ** (1 / RHO), float(table[0]) ** (1 / RHO)
    return (high + torch.linspace(0, 1, steps) * (low - high)) ** RHO


def exponential(table: torch.Tensor, steps: int) -> torch.Tensor:
    """Evenly spaced in log sigma."""
    return torch.linspace(float(table[-1].log()), float(table[0].log()), steps).exp()


SCHEDULES: dict[str, Row] = {
    "normal": normal,
    "karras": karras,
    "exponential": exponential,
    "sgm_uniform": sgm_uniform,
    "ddim_uniform": ddim_uniform,
}


def sigmas_of(schedule: str, table: torch.Tensor, steps: int) -> torch.Tensor:
    """Return (steps + 1,) falling sigmas that end with 0, for a table of each timestep's sigma, rising."""
    return torch.cat([SCHEDULES[schedule](table, steps), torch.zeros(1)])


def levels(schedule: str, objective: Objective, steps: int, size: tuple[int, int]) -> torch.Tensor:
    """Return (steps + 1,) falling sigmas that end with 0 for an image of ``size`` (height, width).

    OWN are those that the objective samples at by itself.
    """
    if schedule == OWN:
        return objective.sigmas_for(steps, size)
    if isinstance(objective, Flow) and objective.dynamic is not None:
        shift = objective.dynamic  # the table has more entries than steps are taken
        objective = replace(objective, dynamic=lambda tokens, _: shift(tokens, steps))
    table = objective.sigmas_for(objective.num_timesteps, size)[:-1].flip(0)
    return sigmas_of(schedule, table, steps)


def _at(table: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Interpolate log sigma at timesteps t, which need not be whole."""
    low, high = t.floor().long(), t.ceil().long()
    share = t - low
    return ((1 - share) * table[low].log() + share * table[high].log()).exp()
