"""Learning rates equal the reference's, and the optimizer gets them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from loragraft.trainer.optim import (
    build_optimizer,
    depends_on_total,
    lr_factor,
    set_learning_rates,
    warmup_steps,
)
from loragraft.trainer.settings.learning import LR_SCHEDULERS
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal, golden

REFERENCE = golden("lr_schedulers")
CASES = [case for case in REFERENCE["cases"] if case["args"]["lr_scheduler"] in LR_SCHEDULERS]
BASE, TOTAL = REFERENCE["base_lr"], REFERENCE["max_train_steps"]


@pytest.mark.parametrize("case", CASES, ids=[str(case["args"]) for case in CASES])
def test_every_schedule_equals_the_reference(case: dict[str, Any]) -> None:
    config = runs.settings(learning_rate=BASE, max_train_steps=TOTAL, **case["args"])
    found = [BASE * lr_factor(config, step, TOTAL) for step in range(0, TOTAL, 5)]
    assert found == pytest.approx(case["every_5_steps"], rel=1e-9, abs=1e-15)


def test_the_reference_has_a_case_for_every_schedule() -> None:
    assert {case["args"]["lr_scheduler"] for case in CASES} == set(LR_SCHEDULERS)
    assert len(CASES) == 8


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 3, 0.5, 400])
def test_every_rate_of_every_schedule_is_a_share(name: str, warmup: float) -> None:
    if name == "constant" and warmup:
        return
    config = runs.settings(lr_scheduler=name, lr_warmup_steps=warmup, lr_scheduler_num_cycles=3)
    for total in (1, 2, 7, 200):
        factors = [lr_factor(config, step, total) for step in range(total + 3)]
        assert all(0 <= f <= 1 and math.isfinite(f) for f in factors)
        if not warmup:
            assert factors[0] == 1


def test_warm_up_is_a_number_of_steps_or_a_share_of_all() -> None:
    def warmup(value: float) -> int:
        return warmup_steps(runs.settings(lr_scheduler="linear", lr_warmup_steps=value), 50)

    assert [warmup(v) for v in (0, 10, 10.0, 0.1, 0.999, 1, 1.0)] == [0, 10, 10, 5, 49, 1, 1]


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_a_schedule_says_whether_the_number_of_steps_enters_it(name: str) -> None:
    """If it does not, a run can be made longer and continues; so what is said must be so."""
    for warmup in (0, 3, 0.5):
        if name == "constant" and warmup:
            continue
        config = runs.settings(lr_scheduler=name, lr_warmup_steps=warmup)
        differs = any(lr_factor(config, step, 10) != lr_factor(config, step, 20) for step in range(10))
        assert depends_on_total(config) == differs


def test_polynomial_ends_at_a_small_rate_and_copes_with_none() -> None:
    config = runs.settings(lr_scheduler="polynomial", learning_rate=1e-3)
    assert lr_factor(config, 10, 10) * 1e-3 == pytest.approx(1e-7)
    config = runs.settings(lr_scheduler="polynomial", learning_rate=0.0, unet_lr=1e-3)
    assert lr_factor(config, 10, 10) == 0
    config = runs.settings(lr_scheduler="polynomial", learning_rate=1e-8)
    assert lr_factor(config, 10, 10) == 1


def test_each_group_keeps_its_own_rate() -> None:
    groups = [([torch.nn.Parameter(torch.ones(2))], 1e-3), ([torch.nn.Parameter(torch.ones(2))], 1e-5)]
    optimizer = build_optimizer(runs.settings(), groups)
    set_learning_rates(optimizer, 0.5)
    set_learning_rates(optimizer, 0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25e-3, 0.25e-5]


def test_options_reach_the_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    options = ["weight_decay=0.5", "betas=.8,.9", "eps=1e-4"]
    (group,) = build_optimizer(runs.settings(optimizer_args=options), [([parameter], 1e-3)]).param_groups
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-4)


def test_an_unknown_option_names_the_known_ones() -> None:
    with Refusal("LG-CFG-007", "d_coef", "weight_decay"):
        build_optimizer(
            runs.settings(optimizer_args=["d_coef=2"]), [([torch.nn.Parameter(torch.ones(1))], 1.0)]
        )


def test_steps_equal_plain_adamw() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(64), [torch.randn(64) for _ in range(5)]
    ours, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = build_optimizer(runs.settings(), [([ours], 1e-2)])
    peer = torch.optim.AdamW([plain], lr=1e-2, foreach=False, fused=False)
    for gradient in gradients:
        for parameter, stepper in ((ours, optimizer), (plain, peer)):
            parameter.grad = gradient.clone()
            stepper.step()
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)
