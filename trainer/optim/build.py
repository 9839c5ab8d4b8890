"""An optimizer built from the settings, and tried on two small tensors before the run begins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..block_weights import Blocks, notes
from ..config import TrainConfig, optimizer_kwargs
from ..errors import LoraGraftError, listed, one_line
from ..settings.optimizers import OPTION_ALIASES, TORCH, has_relative_steps
from .find import find, known, options
from .groups import PARTS, Group
from .modes import training
from .state import pack, unpack

FUSED = (torch.optim.AdamW, torch.optim.Adam)  # one kernel for all tensors; SGD's knows no latecomers
SHAPES = ((6, 64), (64, 6))  # as a LoRA's: one wide, one tall
BEFORE, AFTER = 3, 2


def build_optimizer(
    config: TrainConfig, groups: Sequence[tuple[list[nn.Parameter], float]]
) -> torch.optim.Optimizer:
    """Build the optimizer over (parameters, base learning rate) groups.

    Raises LG-CFG-003 and LG-CFG-010 where it is not there, LG-CFG-007 for options that it does not take, and
    LG-CFG-011 where it cannot train in this way.
    """
    optimizer = _built(config, groups)
    if known(config).module != TORCH or type(optimizer) not in FUSED:
        _try(config, groups[0][0][0].device)
    return training(optimizer)


def advice(config: TrainConfig, groups: Sequence[Group], blocks: Blocks | None) -> list[str]:
    """Return what a user should hear before step 1: unlikely rates, options that come of themselves."""
    entry, lines = known(config), []
    highest = max((group.lr for group in groups), default=0.0)
    if highest > entry.too_high and not has_relative_steps(entry, optimizer_kwargs(config)):
        lines.append(
            f"Warning: a learning rate of {highest:g} is very high for {config.optimizer_type}; "
            f"{entry.usual_lr:g} is usual"
        )
    all_options = options(config, find(config))
    given = {
        OPTION_ALIASES.get(key, key) if key not in all_options else key for key in optimizer_kwargs(config)
    }
    if added := {k: v for k, v in all_options.items() if k not in given}:
        text = " ".join(f"{key}={value}" for key, value in added.items())
        lines.append(f"{config.optimizer_type} with {text}; optimizer_args change what they name")
    if blocks is not None:
        lines += notes(config, blocks)
    if len(groups) > len(PARTS):
        rates = listed((f"{group.label} {group.lr:g}" for group in groups), limit=60)
        lines.append(f"learning rates: {rates}")
    return lines


def state_bytes(config: TrainConfig, device: torch.device) -> float:
    """Return the bytes that the optimizer keeps for each trained number, measured on two small tensors."""
    tensors = _small(device)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = _stepped(config, tensors, None, 0, 1)
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    size = sum(v.numel() * v.element_size() for v in kept if v.numel() > 1)
    return size / sum(p.numel() for p in tensors)


def _built(config: TrainConfig, groups: Sequence[tuple[list[nn.Parameter], float]]) -> torch.optim.Optimizer:
    cls = find(config)
    given: dict[str, Any] = options(config, cls)
    own_rate = has_relative_steps(known(config), given)
    parameters: list[dict[str, Any]] = [
        {"params": list(ps), "lr": None if own_rate else lr, "base_lr": lr} for ps, lr in groups
    ]
    if cls in FUSED:
        given["fused"] = True
    try:
        if not own_rate:
            given["lr"] = rate_of(groups)
        return cls(parameters, **given)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise LoraGraftError(
            "LG-CFG-007",
            f"{config.optimizer_type} does not take these options.",
            where="optimizer_args: " + " ".join(config.optimizer_args),
            why=one_line(str(error), 400) or type(error).__name__,
            fix="correct the named value; the optimizer's documentation explains each option",
        ) from None


def rate_of(groups: Sequence[tuple[list[nn.Parameter], float]]) -> float:
    """Return the first group's rate: some optimizers read one for all from it."""
    return groups[0][1] if groups else 0.0


def _try(config: TrainConfig, device: torch.device) -> None:
    """Take some steps on small tensors, pack the state, go on from it, and compare.

    An optimizer that needs second derivatives or a closure, or whose state cannot be kept, is found here and
    not at the first save. Raises LG-CFG-011.
    """
    kind = config.optimizer_type
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            straight, again = _small(device), _small(device)
            optimizer = _stepped(config, straight, None, 0, BEFORE)
            kept = {k: v.clone(memory_format=torch.contiguous_format) for k, v in pack(optimizer).items()}
            with torch.no_grad():
                for ours, theirs in zip(again, straight, strict=True):
                    ours.copy_(theirs)
            _stepped(config, straight, optimizer, BEFORE, AFTER)
            other = _built(config, [([p], rate_of_config(config)) for p in again])
            unpack(other, kept)
            _stepped(config, again, other, BEFORE, AFTER)
            same = all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))
            finite = all(bool(p.isfinite().all()) for p in straight)
    except LoraGraftError:
        raise
    except Exception as error:
        raise _unfit(kind, f"a trial on a small tensor failed: {type(error).__name__}: {error}") from error
    if not finite:
        raise _unfit(kind, "a trial on a small tensor gave values that are not finite.")
    if not same:
        raise _unfit(kind, "a run with it could not be continued: its state is not all that it depends on.")


def _small(device: torch.device) -> list[nn.Parameter]:
    """Return tensors as of a LoRA at its start: one with values, one of zeros."""
    wave = torch.linspace(-1, 1, SHAPES[0][0] * SHAPES[0][1], device=device).sin().view(SHAPES[0])
    return [nn.Parameter(wave.clone()), nn.Parameter(torch.zeros(SHAPES[1], device=device))]


def rate_of_config(config: TrainConfig) -> float:
    """Return a rate for the trial: the run's, or what is usual where that is another part's."""
    return config.learning_rate or known(config).usual_lr


def _stepped(
    config: TrainConfig,
    tensors: list[nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    first: int,
    steps: int,
) -> torch.optim.Optimizer:
    if optimizer is None:
        optimizer = _built(config, [([p], rate_of_config(config)) for p in tensors])
    training(optimizer)
    for step in range(first, first + steps):
        for number, tensor in enumerate(tensors):
            count = torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float32)
            tensor.grad = (count * 0.7 + step + number).sin().view_as(tensor) * 0.1 + tensor.detach() * 0.01
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def _unfit(kind: str, why: str) -> LoraGraftError:
    return LoraGraftError(
        "LG-CFG-011",
        f"{kind} cannot train a LoRA here.",
        where="optimizer_type, optimizer_args",
        why=one_line(why, 600),
        fix="choose another optimizer, such as AdamW, or other optimizer_args",
    )
