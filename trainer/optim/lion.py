"""Lion: the sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay. Elementwise; the rate may be a tensor that captured code reads."""

    elementwise = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers from 0 to below 1, not {betas}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, and is {weight_decay}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "capturable": False}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; a closure is called first, for its loss."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                momentum = state["exp_avg"]
                if group["weight_decay"]:
                    p.mul_(1 - lr * group["weight_decay"])
                direction = (momentum * beta1).add_(p.grad, alpha=1 - beta1).sign_()
                p.sub_(direction.mul_(lr))
                momentum.mul_(beta2).add_(p.grad, alpha=1 - beta2)
        return loss
