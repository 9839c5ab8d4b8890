"""Optimizer steps within the backward pass: a tensor's gradient is used and dropped as soon as it is."""

from __future__ import annotations

import torch


class StepInBackward:
    """Lets each tensor of an optimizer take its step alone, by hooks; for optimizers that treat each alone.

    No gradient is left when the pass ends. Steps are taken in the order in which gradients come, which
    changes no result, since no tensor's step looks at another.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self.squares: list[torch.Tensor] = []
        for parameter in self.groups:
            parameter.register_post_accumulate_grad_hook(self._step)

    def taken(self) -> torch.Tensor:
        """Return the norm of all gradients since the last call."""
        device = next(iter(self.groups)).device
        norm = torch.stack(self.squares).sum().sqrt() if self.squares else torch.zeros((), device=device)
        self.squares = []
        return norm

    @torch.no_grad()
    def _step(self, parameter: torch.Tensor) -> None:
        if parameter.grad is None:
            return
        self.squares.append(parameter.grad.float().square().sum())
        groups = self.optimizer.param_groups
        everyone = [group["params"] for group in groups]
        for group in groups:
            group["params"] = [parameter] if group is self.groups[parameter] else []
        try:
            self.optimizer.step()
        finally:
            for group, params in zip(groups, everyone, strict=True):
                group["params"] = params
        parameter.grad = None
