"""A single file's parts, each below a prefix of its own."""

from __future__ import annotations

from collections.abc import Collection

from ..base import Tensors
from ..sources.weights import Renamed


def below(weights: Tensors, prefix: str, but: Collection[str] = ()) -> Tensors:
    """Return what has a prefix, without it (views); ``but`` names what of it is left out."""
    names = {k.removeprefix(prefix): k for k in weights if k.startswith(prefix)}
    return Renamed(weights, {name: k for name, k in names.items() if name not in but})


def above(weights: Tensors, prefix: str) -> Tensors:
    """Return weights with a prefix (views)."""
    return Renamed(weights, {prefix + k: k for k in weights})
