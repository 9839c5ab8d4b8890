"""Learning rates over the steps equal the reference's; the soft restarts are what they say."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.optim.curve import curve
from loragraft.trainer.optim.foreign import foreign_rate
from loragraft.trainer.optim.schedules import depends_on_total, lr_factor, rate, warmup_steps
from loragraft.trainer.optim.warm_restarts import warm_restarts
from loragraft.trainer.settings.learning import LR_SCHEDULERS
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal, golden

REFERENCE = golden("lr_schedulers")
CASES = REFERENCE["cases"] + golden("lr_schedulers_more")["cases"]
BASE, TOTAL = REFERENCE["base_lr"], REFERENCE["max_train_steps"]
# What each schedule needs beside its name.
NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.1},
    "warmup_stable_decay": {"lr_decay_steps": 0.2},
    "piecewise_constant": {"lr_scheduler_args": ["step_rules=1:3,0.5:6,0.1"]},
    "adafactor": {"optimizer_type": "Adafactor", "learning_rate": 1e-4},
}
NO_WARMUP = ("constant", "piecewise_constant", "adafactor")


@pytest.mark.parametrize("case", CASES, ids=[str(case["args"]) for case in CASES])
def test_every_schedule_equals_the_reference(case: dict[str, Any]) -> None:
    config = runs.settings(learning_rate=BASE, max_train_steps=TOTAL, **case["args"])
    found = [rate(config, BASE, step, TOTAL) for step in range(0, TOTAL, 5)]
    assert found == pytest.approx(case["every_5_steps"], rel=1e-9, abs=1e-15)


def test_the_reference_has_a_case_for_every_schedule() -> None:
    """But for the one that is ours, and Adafactor's, which only shows what the optimizer does."""
    names = {case["args"].get("lr_scheduler") for case in CASES}
    assert names == set(LR_SCHEDULERS) - {"cosine_with_warm_restarts", "adafactor"} | {None}
    assert len(CASES) == 25


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 3, 0.5, 400])
def test_every_rate_of_every_schedule_is_a_share(name: str, warmup: float) -> None:
    if warmup and name in NO_WARMUP:
        return
    own = {"lr_warmup_steps": warmup, **NEEDED.get(name, {})}
    config = runs.settings(lr_scheduler=name, max_train_steps=1000, **own)
    for total in (1, 2, 7, 200):
        if name == "cosine_with_warm_restarts" and warmup >= total:
            continue  # refused: a cycle must be longer than its warm-up
        factors = [lr_factor(config, step, total) for step in range(total + 3)]
        assert all(0 <= f <= 1 and math.isfinite(f) for f in factors)
        if not warmup and not (name == "warmup_stable_decay" and total == 1):
            assert factors[0] == 1


def test_warm_up_is_a_number_of_steps_or_a_share_of_all() -> None:
    def warmup(value: float) -> int:
        config = runs.settings(lr_scheduler="linear", lr_warmup_steps=value, max_train_steps=50)
        return warmup_steps(config, 50)

    assert [warmup(v) for v in (0, 10, 0.1, 0.999, 1)] == [0, 10, 5, 49, 1]


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_a_schedule_says_whether_the_number_of_steps_enters_it(name: str) -> None:
    """If it does not, a run can be made longer and continues; so what is said must be so."""
    for warmup in (0, 3, 0.5):
        if warmup and name in NO_WARMUP:
            continue
        config = runs.settings(lr_scheduler=name, lr_warmup_steps=warmup, **NEEDED.get(name, {}))
        differs = any(lr_factor(config, step, 12) != lr_factor(config, step, 24) for step in range(12))
        assert depends_on_total(config) == differs


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("cosine_with_warm_restarts", ["T_0=5"], False),
        ("torch.optim.lr_scheduler.CosineAnnealingLR", [], True),
        ("torch.optim.lr_scheduler.CosineAnnealingLR", ["T_max=10"], False),
        ("OneCycleLR", [], True),
        ("StepLR", ["step_size=3"], False),
        ("diffusers.optimization.get_linear_schedule_with_warmup", ["num_warmup_steps=1"], True),
    ],
)
def test_given_lengths_take_the_place_of_the_runs(name: str, args: list[str], expected: bool) -> None:
    own = {"lr_scheduler": name} if name in LR_SCHEDULERS else {"lr_scheduler_type": name}
    config = runs.settings(**own, lr_scheduler_args=args)
    differs = any(lr_factor(config, step, 12) != lr_factor(config, step, 24) for step in range(12))
    assert depends_on_total(config) == expected == differs


def test_polynomial_ends_at_a_small_rate_and_copes_with_none() -> None:
    config = runs.settings(lr_scheduler="polynomial", learning_rate=1e-3)
    assert lr_factor(config, 10, 10) * 1e-3 == pytest.approx(1e-7)
    config = runs.settings(lr_scheduler="polynomial", learning_rate=0.0, unet_lr=1e-3)
    assert lr_factor(config, 10, 10) == 0
    config = runs.settings(lr_scheduler="polynomial", learning_rate=1e-8)
    assert lr_factor(config, 10, 10) == 1


def test_a_smaller_power_holds_the_rate_up_longer() -> None:
    low, high = (runs.settings(lr_scheduler="polynomial", lr_scheduler_power=p) for p in (0.5, 2.0))
    assert all(lr_factor(low, s, 100) > lr_factor(high, s, 100) for s in range(1, 100))


# ---- soft restarts ----

GUIDE = {"T_0": 549, "gamma_min_lr": 0.99915, "decay": 1, "down_factor": 0.5, "warmup_steps": 100,
         "cycle_warmup": 50, "init_lr_ground": True}  # fmt: skip


def test_soft_restarts_as_a_guide_gives_them() -> None:
    """Cycles of 549 steps: up from 0 at first, up from the floor later, the floor falls from step to step."""
    found = [warm_restarts(step, **GUIDE) for step in range(1648)]
    assert found[0] == 0 and found[50] == 0.5 and found[100] == 1
    floors = [0.5 * 0.99915**step for step in (549, 1098)]
    assert found[549] == pytest.approx(floors[0]) and found[599] == 1
    assert found[1098] == pytest.approx(floors[1]) and found[1148] == 1
    assert found[548] == pytest.approx(floors[0], abs=1e-3)  # no leap where a cycle ends
    steps = [abs(b - a) for a, b in pairwise(found)]
    assert max(steps) < 0.02  # what plain restarts do in one step takes fifty
    assert min(found[100:]) > 0.12


def test_the_class_that_guides_name_is_ours() -> None:
    args = [f"{key}={value}" for key, value in GUIDE.items()]
    named = runs.settings(
        lr_scheduler_type="cosine_annealing_warmup.CosineAnnealingWarmupRestarts", lr_scheduler_args=args
    )
    plain = runs.settings(lr_scheduler="cosine_with_warm_restarts", lr_scheduler_args=args)
    for step in range(0, 1600, 7):
        assert lr_factor(named, step, 1600) == lr_factor(plain, step, 1600) == warm_restarts(step, **GUIDE)


def test_soft_restarts_take_the_usual_settings_where_they_have_no_own() -> None:
    config = runs.settings(
        lr_scheduler="cosine_with_warm_restarts", lr_scheduler_num_cycles=4, lr_warmup_steps=0.05
    )
    found = [lr_factor(config, step, 400) for step in range(400)]
    assert found == [warm_restarts(step, T_0=100, warmup_steps=20) for step in range(400)]


@settings(deadline=None, max_examples=200)
@given(
    cycle=st.integers(1, 60),
    gamma=st.floats(0, 1),
    decay=st.floats(0, 1),
    down=st.floats(0, 1),
    rises=st.tuples(st.integers(0, 59), st.integers(0, 59)),
    ground=st.booleans(),
)
def test_soft_restarts_stay_between_floor_and_peak(
    cycle: int, gamma: float, decay: float, down: float, rises: tuple[int, int], ground: bool
) -> None:
    first, later = (min(r, cycle - 1) for r in rises)
    for step in range(3 * cycle):
        found = warm_restarts(step, cycle, gamma, decay, down, first, later, ground)
        peak = decay ** (step // cycle)
        assert 0 <= found <= peak + 1e-12
        if not (ground and step < first):
            assert found >= min(peak, down * gamma**step) - 1e-12


@pytest.mark.parametrize(
    "option",
    ["T_0=0", "T_0=1.5", "T_0='x'", "gamma_min_lr=2", "decay=-1", "down_factor=None", "warmup_steps=400",
     "cycle_warmup=-1", "decay=True"],
)  # fmt: skip
def test_impossible_restarts_are_refused(option: str) -> None:
    options = [option] if option.startswith("T_0") else ["T_0=100", option]
    config = runs.settings(lr_scheduler="cosine_with_warm_restarts", lr_scheduler_args=options)
    with Refusal("LG-CFG-007", option.split("=")[0]):
        lr_factor(config, 0, 400)


# ---- refused ----


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["T_0=5"]}, ["cosine", "no options"]),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ["end=5"]}, ["lr_end"]),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules=1:x,2"]}, ["1:10"]),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules=-1"]}, ["-1"]),
        (
            {
                "lr_scheduler": "warmup_stable_decay",
                "lr_decay_steps": 0.5,
                "lr_scheduler_args": ["decay_type=1"],
            },
            ["decay_type"],
        ),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step=3"]}, ["step_size"]),
        ({"lr_scheduler_type": "StepLR"}, ["step_size"]),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size='x'"]}, ["StepLR"]),
        ({"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ["total_steps=2"]}, ["at step"]),
    ],
)  # fmt: skip
def test_options_that_a_schedule_does_not_take(changes: dict[str, Any], mentions: list[str]) -> None:
    config = runs.settings(**changes)
    with Refusal("LG-CFG-007", *mentions):
        [lr_factor(config, step, 20) for step in range(20)]


@pytest.mark.parametrize(
    "name",
    ["os.system", "torch.optim.lr_scheduler.os", "builtins.eval", "diffusers.models.x", "a.b", "x y", "."],
)
def test_only_schedules_of_the_allow_list_can_be_named(name: str) -> None:
    with Refusal("LG-CFG-003"):
        lr_factor(runs.settings(lr_scheduler_type=name), 0, 10)


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "LambdaLR", "warnings", "SequentialLR", "StepLr"])
def test_what_is_no_schedule_of_the_step_is_not_offered(name: str) -> None:
    with Refusal("LG-CFG-003", "StepLR"):
        lr_factor(runs.settings(lr_scheduler_type=name), 0, 10)


# ---- the curve ----


def test_the_curve_is_what_the_run_will_take() -> None:
    config = runs.settings(unet_lr=2e-4, lr_warmup_steps=2, scale_lr=True, train_batch_size=4)
    assert curve(config, 10) == pytest.approx([8e-4 * lr_factor(config, step, 10) for step in range(10)])
    only_text = runs.settings(unet_lr=0.0, text_encoder_lr=1e-5, lr_scheduler="constant")
    assert curve(only_text, 3) == [1e-5] * 3


def test_a_picture_asks_for_some_steps_alone() -> None:
    config = runs.settings(lr_scheduler="cosine", max_train_steps=50)
    assert curve(config, 50, [0, 7, 49]) == [curve(config, 50)[step] for step in (0, 7, 49)]


def test_a_librarys_schedule_is_asked_by_a_run_and_a_picture_at_once() -> None:
    name, args, rate = "torch.optim.lr_scheduler.OneCycleLR", ("pct_start=0.31",), 1e-3
    alone = [foreign_rate(name, args, 2 * rate, step, 600) / 2 for step in range(600)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda step: foreign_rate(name, args, rate, step, 600), reversed(range(600))))
    assert found[::-1] == pytest.approx(alone)


def test_the_curve_of_adafactors_own_steps() -> None:
    base = {"optimizer_type": "Adafactor", "lr_scheduler": "adafactor", "learning_rate": 1e-4}
    assert curve(runs.settings(**base), 3) == [1e-2] * 3
    warm = runs.settings(**base, optimizer_args=["warmup_init=True"])
    assert curve(warm, 3) == pytest.approx([1e-6, 2e-6, 3e-6])
