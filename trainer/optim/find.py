"""Which optimizers are there: classes looked for in their libraries, and what brings the missing ones."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from ..config import TrainConfig, optimizer_kwargs
from ..errors import LoraGraftError, listed, nearest
from ..settings.optimizers import KNOWN, MODULES, OPTION_ALIASES, OWN, Known, named
from .lion import Lion

OPTIMIZER = type[torch.optim.Optimizer]
# What the engine decides, not the user: how the update's kernels run.
NOT_OPTIONS = ("self", "params", "lr", "foreach", "fused", "capturable", "differentiable")


def known(config: TrainConfig) -> Known:
    """Return the table entry of the run's optimizer; raises LG-CFG-003 for a name that cannot be one."""
    found = named(config.optimizer_type)
    if found is None:
        guess = nearest(config.optimizer_type, KNOWN)
        raise LoraGraftError(
            "LG-CFG-003",
            f"There is no optimizer '{config.optimizer_type}'.",
            where="optimizer_type",
            why=f"expected one of {', '.join(KNOWN)}, or a class of {', '.join(MODULES)}.",
            fix=f"did you mean '{guess[0]}'?" if guess else "choose one of these",
        )
    return found


def missing(name: str) -> str | None:
    """Return what brings an optimizer that is not there, as a command; None where it is there.

    Nothing is imported: only whether the package is installed is looked up.
    """
    found = named(name)
    if found is None or found.module == OWN or find_spec(found.module.partition(".")[0]) is not None:
        return None
    return f"pip install {found.package}"


def find(config: TrainConfig) -> OPTIMIZER:
    """Return the optimizer's class; raises LG-CFG-003 and LG-CFG-010 where there is none."""
    entry = known(config)
    if entry.module == OWN:
        return Lion
    try:
        module = importlib.import_module(entry.module)  # one of an allow-list: see `named`
    except Exception as error:  # a library without its binaries raises anything
        raise LoraGraftError(
            "LG-CFG-010",
            f"{config.optimizer_type} needs the package {entry.package or entry.module}.",
            where="optimizer_type",
            why=f"it is not installed, or does not start: {type(error).__name__}: {error}",
            fix=f"pip install {entry.package}; or choose AdamW, which is always there",
        ) from None
    cls = getattr(module, entry.cls, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        names = [n for n, c in vars(module).items() if isinstance(c, type) and _is_optimizer(c)]
        guess = nearest(entry.cls, names)
        raise LoraGraftError(
            "LG-CFG-003",
            f"{entry.module} has no optimizer {entry.cls}.",
            where="optimizer_type",
            why=f"the installed version offers: {listed(sorted(names), limit=60)}.",
            fix=f"did you mean '{entry.module}.{guess[0]}'?" if guess else "choose one of these",
        )
    return cls


def options(config: TrainConfig, cls: OPTIMIZER) -> dict[str, Any]:
    """Return all options that the optimizer is built with: the table's, then the user's, which win.

    Only what the class's signature names is passed on; another one of the user's raises LG-CFG-007.
    """
    entry = known(config)
    takes = [name for name in inspect.signature(cls).parameters if name not in NOT_OPTIONS]
    takes = [name for name in takes if name not in entry.fixed and name != "kwargs"]
    given = {}
    for key, value in optimizer_kwargs(config).items():
        other = OPTION_ALIASES.get(key)
        name = other if key not in takes and other in takes else key
        if name in given:
            raise _unknown(config, f"{key} twice, once as {name}", takes)
        given[name] = value
    if unknown := [key for key in given if key not in takes]:
        raise _unknown(config, listed(unknown), takes)
    advised = {key: value for key, value in entry.options.items() if key in takes}
    return {**advised, **given, **entry.fixed}


def optimizer_name(config: TrainConfig) -> str:
    """Return the optimizer's dotted name with its options, as a LoRA's metadata gives it."""
    cls = find(config)
    text = ",".join(f"{key}={value}" for key, value in options(config, cls).items())
    module = "loragraft" if cls is Lion else cls.__module__
    return f"{module}.{cls.__name__}" + (f"({text})" if text else "")


def available() -> Mapping[str, str | None]:
    """Return for every optimizer of the table None, or the command that brings it."""
    return {name: missing(name) for name in KNOWN}


def _is_optimizer(cls: type) -> bool:
    return issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer


def _unknown(config: TrainConfig, what: str, takes: list[str]) -> LoraGraftError:
    return LoraGraftError(
        "LG-CFG-007",
        f"{config.optimizer_type} has no option {what}.",
        where="optimizer_args",
        why="it would be ignored.",
        fix=f"options: {listed(takes, limit=40)}",
    )
