"""On a CPU, maps that a step adds or multiplies lie in one order: mixed ones take ten times as long."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loragraft.trainer import api
from loragraft_tests.trainer import runs

SAMPLES, LATENT_CHANNELS = 3, 4
BY_VALUE = ("add", "add_", "mul", "mul_", "silu_backward", "native_group_norm_backward")


class Mixed(TorchDispatchMode):
    """Notes operations on two maps of one size, of which one lies channels last and one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.Size]] = []
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        maps = [x for x in args if isinstance(x, torch.Tensor) and self._is_map(x)]
        if name in BY_VALUE and len(maps) > 1 and len({x.shape for x in maps}) == 1:
            self.number += 1
            if len({x.stride(1) == 1 for x in maps}) > 1:
                self.found.append((name, maps[0].shape))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_map(x: torch.Tensor) -> bool:
        """Tell a map inside the denoiser from latents, weights and single pixels."""
        return x.dim() == 4 and len(x) == SAMPLES and x.shape[1] > LATENT_CHANNELS and x.shape[2:].numel() > 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_mixes_no_orders(training: runs.Training, precision: str) -> None:
    events = training.start(max_train_steps=2, mixed_precision=precision, conv_dim=2)
    assert next(event.step for event in events if isinstance(event, api.Step)) == 1
    with Mixed() as mixed:
        assert next(event.step for event in events if isinstance(event, api.Step)) == 2
    events.close()
    assert mixed.number > 50 and mixed.found == []
