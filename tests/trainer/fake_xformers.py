"""An xformers for tests: its one function, with its refusals."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch


def efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """xformers' formula in its layout (B, L, heads, D), with its refusals: one dtype, aligned full biases."""
    assert query.dtype == key.dtype == value.dtype
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    scores = torch.einsum("blhd,bshd->bhls", query * (scale or query.shape[-1] ** -0.5), key)
    if attn_bias is not None:
        assert attn_bias.dtype == query.dtype
        assert attn_bias.shape == scores.shape
        assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
        scores = scores + attn_bias
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), value)


@contextlib.contextmanager
def fake_xformers(function: Callable[..., torch.Tensor] = efficient) -> Iterator[None]:
    """Put an xformers into the process whose attention is ``function``."""
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.__spec__, package.__path__ = ModuleSpec("xformers", None, is_package=True), []
    ops.memory_efficient_attention = function  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "xformers", package)
        patch.setitem(sys.modules, "xformers.ops", ops)
        yield
