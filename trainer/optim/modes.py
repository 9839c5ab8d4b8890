"""Optimizers that train one set of weights and are judged by another: schedule-free ones average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def training(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer, set to train where it has such a mode."""
    to_train = getattr(optimizer, "train", None)
    if callable(to_train):
        to_train()
    return optimizer


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let the trained tensors be what is to be saved, drawn and validated; afterwards they train on.

    The way back is a copy, not the inverse arithmetic: looking at the average must not change a bit of the
    training. For most optimizers there is only one set of weights, and nothing happens.
    """
    to_average, to_train = getattr(optimizer, "eval", None), getattr(optimizer, "train", None)
    if to_average is None or to_train is None:
        yield
        return
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in tensors]
    to_average()
    try:
        yield
    finally:
        to_train()
        with torch.no_grad():
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.copy_(before)
