"""A cosine that restarts softly: each cycle climbs back to its peak instead of jumping there.

A guide for LoRA trainers proposes it for styles: with plain restarts the rate is too small to learn anything
for a while and then leaps. Its text names the parameters and what they are for; the formulas here are written
from that text, together with the public schedule that it extends (CosineAnnealingWarmupRestarts of
katsura-jp/pytorch-cosine-annealing-with-warmup: cycles, warm-up within them, a peak that decays).
"""

from __future__ import annotations

import math


def warm_restarts(
    step: int,
    T_0: int,
    gamma_min_lr: float = 1.0,
    decay: float = 1.0,
    down_factor: float = 0.0,
    warmup_steps: int = 0,
    cycle_warmup: int = 0,
    init_lr_ground: bool = True,
) -> float:
    """Return the factor on the learning rate at ``step`` (from 0).

    ``T_0`` steps make a cycle. In cycle k the factor falls as a cosine from the peak ``decay`` ** k to the
    floor ``down_factor`` * ``gamma_min_lr`` ** step, so with a smaller gamma_min_lr it falls lower, the more
    the longer the run goes. The first cycle begins with ``warmup_steps`` steps from 0 up (``init_lr_ground``)
    or from the floor up, the others with ``cycle_warmup`` steps from the floor up; they belong to the cycle.
    Raises ValueError.
    """
    _check(T_0, gamma_min_lr, decay, down_factor, warmup_steps, cycle_warmup)
    cycle, within = divmod(step, T_0)
    peak = decay**cycle
    rise = cycle_warmup if cycle else warmup_steps
    if within < rise:
        start = (
            0.0 if init_lr_ground and cycle == 0 else _floor(step - within, peak, down_factor, gamma_min_lr)
        )
        return start + (peak - start) * within / rise
    floor = _floor(step, peak, down_factor, gamma_min_lr)
    progress = (within - rise) / (T_0 - rise)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _floor(step: int, peak: float, down_factor: float, gamma: float) -> float:
    return min(peak, down_factor * gamma**step)


def _check(
    T_0: int, gamma: float, decay: float, down_factor: float, warmup_steps: int, cycle_warmup: int
) -> None:
    counts = {"T_0": T_0, "warmup_steps": warmup_steps, "cycle_warmup": cycle_warmup}
    for name, value in counts.items():
        if type(value) is not int or value < (1 if name == "T_0" else 0):
            raise ValueError(f"{name} must be a whole number of steps, not {value!r}")
    for name in ("warmup_steps", "cycle_warmup"):
        if counts[name] >= T_0:
            raise ValueError(f"{name} {counts[name]} must be shorter than a cycle, T_0 {T_0}")
    shares = {"gamma_min_lr": gamma, "decay": decay, "down_factor": down_factor}
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"{name} must be a number from 0 to 1, not {share!r}")
