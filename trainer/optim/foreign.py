"""Schedules of other libraries: run on a dummy, so that they too are functions of the step."""

from __future__ import annotations

import importlib
import inspect
import math
import threading
import warnings
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ..config import literals
from ..errors import LoraGraftError, listed, nearest, one_line

# Nothing else is ever imported for a schedule. Diffusers' are functions, torch's are classes.
MODULES = ("torch.optim.lr_scheduler", "diffusers.optimization")
# Not functions of the step alone, or made of functions or other schedules, which no text can name.
NOT_SCHEDULES = (
    "LRScheduler",
    "ReduceLROnPlateau",
    "LambdaLR",
    "MultiplicativeLR",
    "ChainedScheduler",
    "SequentialLR",
)
MAX_KEPT = 8


def foreign_rate(name: str, args: tuple[str, ...], base_lr: float, step: int, total_steps: int) -> float:
    """Return the rate at ``step`` (from 0) that a library's schedule gives to ``base_lr``.

    ``name`` is dotted, or a class of torch.optim.lr_scheduler. Raises LG-CFG-003 and LG-CFG-007.
    """
    return _track(name, args, base_lr, total_steps).rate(step)


def needs_total(name: str, args: tuple[str, ...]) -> bool:
    """Say whether the schedule is told the number of steps, because it takes it and was given none."""
    given = _options(args)
    return any(p in _filled(1.0, 1) and p not in given and p != "max_lr" for p in _takes(_found(name)))


class _Track:
    """The rates of one schedule on one dummy, as far as they were asked for; also by several threads."""

    def __init__(self, name: str, args: tuple[str, ...], base_lr: float, total_steps: int) -> None:
        self.name, self.args, self.one_at_a_time = name, args, threading.Lock()
        make, given = _found(name), _options(args)
        takes = _takes(make)
        if unknown := [key for key in given if key not in takes]:
            raise _refused(name, args, f"it has no option {listed(unknown)}; options: {listed(takes)}")
        filled = {k: v for k, v in _filled(base_lr, total_steps).items() if k in takes and k not in given}
        self.dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base_lr, momentum=0.9)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.schedule = make(optimizer=self.dummy, **filled, **given)
            self.rates = array("d", [self._now()])
        except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError, IndexError) as error:
            raise _refused(name, args, f"{type(error).__name__}: {error}") from None

    def rate(self, step: int) -> float:
        try:
            with self.one_at_a_time, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                while len(self.rates) <= step:
                    self.dummy.step()
                    self.schedule.step()
                    self.rates.append(self._now())
        except (TypeError, ValueError, ArithmeticError) as error:
            raise _refused(self.name, self.args, f"at step {len(self.rates)}: {error}") from None
        return self.rates[step]

    def _now(self) -> float:
        rate = float(self.dummy.param_groups[0]["lr"])
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"the learning rate would be {rate}")
        return rate


@lru_cache(maxsize=MAX_KEPT * 25)  # a run may have a group for each block
def _track(name: str, args: tuple[str, ...], base_lr: float, total_steps: int) -> _Track:
    return _Track(name, args, base_lr, total_steps)


def _filled(base_lr: float, total_steps: int) -> dict[str, Any]:
    """Return what a schedule is given where its options do not say so: the run's length and the rate."""
    return {
        "num_training_steps": total_steps,
        "total_steps": total_steps,
        "T_max": total_steps,
        "max_lr": base_lr,
    }


def _options(args: tuple[str, ...]) -> dict[str, Any]:
    return literals("lr_scheduler_args", args, "T_max=400")


def _takes(make: Callable[..., Any]) -> list[str]:
    hidden = ("self", "optimizer", "last_epoch", "verbose", "lr_lambda", "args", "kwargs")
    return [name for name in inspect.signature(make).parameters if name not in hidden]


def _found(name: str) -> Callable[..., Any]:
    """Return the class or function; raises LG-CFG-003 for what is not in the allow-list."""
    module_name, _, own = name.rpartition(".")
    module_name = module_name or MODULES[0]
    offered: dict[str, Callable[..., Any]] = {}
    for allowed in MODULES:
        if allowed == module_name:
            offered = _schedules(importlib.import_module(allowed))
    if own in offered:
        return offered[own]
    guess = nearest(own, offered)
    raise LoraGraftError(
        "LG-CFG-003",
        f"There is no schedule '{one_line(name, 80)}'.",
        where="lr_scheduler_type",
        why=f"{module_name} offers: {listed(sorted(offered), limit=40)}."
        if offered
        else f"schedules come from {' and '.join(MODULES)} alone.",
        fix=f"did you mean '{module_name}.{guess[0]}'?"
        if guess
        else f"name for instance {MODULES[0]}.OneCycleLR",
    )


def _schedules(module: Any) -> dict[str, Callable[..., Any]]:
    """Return what a module offers: subclasses of LRScheduler, and functions get_..._schedule..."""
    found = {}
    for name, item in vars(module).items():
        is_class = isinstance(item, type) and issubclass(item, torch.optim.lr_scheduler.LRScheduler)
        is_function = inspect.isfunction(item) and name.startswith("get_") and "schedule_" in f"{name}_"
        if (is_class or (is_function and name != "get_scheduler")) and name not in NOT_SCHEDULES:
            found[name] = item
    return found


def _refused(name: str, args: tuple[str, ...], why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-CFG-007",
        f"The schedule {one_line(name, 60)} does not take these options.",
        where="lr_scheduler_args: " + " ".join(args),
        why=f"{one_line(why, 600)}.",
        fix="correct lr_scheduler_args; the library's documentation explains each option",
    )
