"""Optimizers: found, built, refused before step 1; steps equal the reference's, and states last."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.engine.flat import is_elementwise
from loragraft.trainer.engine.inside import StepInBackward
from loragraft.trainer.optim.build import advice, build_optimizer, state_bytes
from loragraft.trainer.optim.find import available, find, missing, optimizer_name, options
from loragraft.trainer.optim.groups import Group
from loragraft.trainer.optim.modes import averaged
from loragraft.trainer.optim.rates import logged_rates, set_learning_rates
from loragraft.trainer.optim.state import pack, unpack
from loragraft.trainer.settings.optimizers import KNOWN, canonical, named
from loragraft_tests.trainer import runs
from loragraft_tests.trainer.data_folders import Refusal, golden

REFERENCE = golden("optimizer_steps")
ADAPTIVE = tuple(name for name, entry in KNOWN.items() if entry.adaptive)
FREE = tuple(name for name, entry in KNOWN.items() if entry.schedule_free)
HERE = tuple(name for name in KNOWN if missing(name) is None)
BROUGHT = {"pytorch_optimizer", "dadaptation"}


def settings(name: str, **changes: Any) -> api.TrainConfig:
    """Return settings with which an optimizer can train: the rate and the schedule that it wants."""
    entry = named(name)
    assert entry is not None
    wanted: dict[str, Any] = {"optimizer_type": name, "learning_rate": entry.usual_lr}
    if entry.schedule_free:
        wanted["lr_scheduler"] = "constant"
    if name == "Adafactor" and "relative_step=False" not in changes.get("optimizer_args", ()):
        wanted |= {"lr_scheduler": "adafactor", "learning_rate": 1e-4}
    return runs.settings(**{**wanted, **changes})


def parameters() -> list[nn.Parameter]:
    """Return the reference's tensors: one with values, one of zeros."""
    return [
        nn.Parameter(torch.linspace(-1, 1, 48).sin().view(4, 12)),
        nn.Parameter(torch.zeros(12, 4)),
    ]


def kept_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the packed state as a file holds it: copies without strides of their own."""
    return {k: v.clone(memory_format=torch.contiguous_format) for k, v in pack(optimizer).items()}


def step(optimizer: torch.optim.Optimizer, tensors: list[nn.Parameter], number: int) -> None:
    """Take a step on the reference's gradients."""
    for n, p in enumerate(tensors):
        count = torch.arange(p.numel(), dtype=torch.float32)
        p.grad = ((count * 0.7 + number + n).sin() * 0.1).view_as(p) + p.detach() * 0.05
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def built(
    config: api.TrainConfig, tensors: list[nn.Parameter], lr: float | None = None
) -> torch.optim.Optimizer:
    rate = config.learning_rate if lr is None else lr
    return build_optimizer(config, [([p], rate) for p in tensors])


# ---- as the reference ----

# The reference takes each optimizer from a package of its own, here one brings most: a last bit may differ,
# and grows where an estimate over all tensors decides on signs.
ROUGH = {"DAdaptLion": 1e-4}


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=[str(c["args"]) for c in REFERENCE["cases"]])
def test_steps_equal_the_references(case: dict[str, Any]) -> None:
    """Twelve steps of each optimizer, with the options that its users write."""
    given = {k: v for k, v in case["args"].items() if k != "learning_rate" or v}
    name = given["optimizer_type"]
    if (left_out := missing(canonical(name))) is not None:
        pytest.skip(left_out)
    entry = named(name)
    assert entry is not None
    arguments = given.pop("optimizer_args", [])
    config = settings(
        name, optimizer_args=arguments, **{k: v for k, v in given.items() if k != "optimizer_type"}
    )
    tensors = parameters()
    optimizer = built(config, tensors)
    for number in range(REFERENCE["steps"]):
        step(optimizer, tensors, number)
    with averaged(optimizer):
        found = torch.cat([p.detach().flatten() for p in tensors])
    expected = torch.tensor(case["values"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=ROUGH.get(name, 2e-6))


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


# ---- found and named ----


def test_every_optimizer_of_the_reference_is_offered() -> None:
    theirs = [
        *("AdamW", "AdamW8bit", "Lion", "Lion8bit", "PagedLion8bit", "SGDNesterov", "SGDNesterov8bit"),
        *("PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "AdEMAMix8bit", "PagedAdEMAMix8bit"),
        *("DAdaptation", "DAdaptAdamPreprint", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptAdanIP"),
        *("DAdaptLion", "DAdaptSGD", "Prodigy", "Adafactor", "AdaFactor"),
        *("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"),
    ]
    for name in theirs:
        assert canonical(name) in KNOWN
        assert canonical(name.lower()) == canonical(name.upper()) == canonical(name)


@pytest.mark.parametrize("name", HERE)
def test_every_optimizer_here_can_be_built(name: str) -> None:
    config = settings(name)
    optimizer = built(config, parameters())
    assert optimizer_name(config).endswith(")") or "(" not in optimizer_name(config)
    assert advice(config, [Group("denoiser", config.learning_rate, parameters())], None) is not None
    assert isinstance(optimizer, find(config))


def test_what_is_missing_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(available()) == set(KNOWN)
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with Refusal("LG-CFG-010", "pip install pytorch_optimizer", "AdamW"):
        built(settings("Prodigy"), parameters())


def test_a_package_that_is_not_installed_is_said_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loragraft.trainer.optim.find.find_spec", lambda name: None)
    assert missing("AdamW8bit") == "pip install bitsandbytes"
    assert missing("Lion") is None


@pytest.mark.parametrize(
    "name", ["torch.optim.NAdam", "RMSprop", "torch.optim.AdamW", "transformers.Adafactor", "torch.optim.SGD"]
)
def test_classes_are_taken_by_name(name: str) -> None:
    config = settings(name, optimizer_args=["relative_step=False"] if "Adafactor" in name else [])
    optimizer = built(config, parameters())
    assert type(optimizer).__name__ == name.rpartition(".")[2]


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "torch.load", "AdamWW", "", "torch.optim.", "torch.optim._multi_tensor",
     "pytorch_optimizer.optimizer.lion", "sys", "a.b.c", "torch.optim.lr_scheduler.StepLR"],
)  # fmt: skip
def test_names_outside_the_allow_list_are_refused(name: str) -> None:
    with Refusal("LG-CFG-003", "optimizer_type"):
        runs.settings(optimizer_type=name)


def test_a_class_that_its_library_lacks_is_refused() -> None:
    with Refusal("LG-CFG-003", "torch.optim.Adagrad"):
        built(settings("torch.optim.AdaGrad"), parameters())
    with Refusal("LG-CFG-003"):
        built(settings("torch.optim.Optimizer_"), parameters())


def test_an_optimizer_that_needs_more_than_gradients_is_refused() -> None:
    with Refusal("LG-CFG-011", "dense gradients"):
        built(settings("torch.optim.SparseAdam"), parameters())
    with Refusal("LG-CFG-007", "parameter groups"):
        built(settings("torch.optim.LBFGS"), parameters())


def test_an_optimizer_whose_state_cannot_be_kept_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden(torch.optim.SGD):
        """Counts its steps where no checkpoint looks."""

        count = 0

        def step(self, closure: Any = None) -> Any:
            self.count += 1
            for group in self.param_groups:
                group["lr"] = 0.1 / self.count
            return super().step(closure)

    monkeypatch.setattr("loragraft.trainer.optim.build.find", lambda config: Hidden)
    with Refusal("LG-CFG-011", "continued"):
        built(settings("torch.optim.NAdam"), parameters())


# ---- options ----


def test_options_reach_the_optimizer() -> None:
    given = ["weight_decay=0.5", "betas=.8,.9", "eps=1e-4"]
    (group,) = build_optimizer(
        runs.settings(optimizer_args=given), [([torch.nn.Parameter(torch.ones(2))], 1e-3)]
    ).param_groups
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-4)


def test_an_unknown_option_names_the_known_ones() -> None:
    with Refusal("LG-CFG-007", "d_coef", "weight_decay"):
        built(runs.settings(optimizer_args=["d_coef=2"]), parameters())


def test_advised_options_hold_until_others_are_given() -> None:
    pytest.importorskip("pytorch_optimizer")
    config = settings("Prodigy", optimizer_args=["d_coef=1", "decouple=False"])
    found = options(config, find(config))
    assert found["d_coef"] == 1 and found["weight_decouple"] is False
    assert found["safeguard_warmup"] is True and found["bias_correction"] is True
    (line,) = advice(config, [Group("denoiser", 1.0, [])], None)
    assert "safeguard_warmup=True" in line and "d_coef" not in line and "decouple" not in line


def test_one_option_under_two_names_is_refused() -> None:
    pytest.importorskip("pytorch_optimizer")
    config = settings("Prodigy", optimizer_args=["decouple=False", "weight_decouple=True"])
    with Refusal("LG-CFG-007", "twice"):
        options(config, find(config))


def test_what_makes_the_optimizer_cannot_be_changed() -> None:
    with Refusal("LG-CFG-007", "nesterov"):
        built(settings("SGDNesterov", optimizer_args=["nesterov=False"]), parameters())


# ---- rates ----


def test_each_group_keeps_its_own_rate() -> None:
    config = runs.settings(lr_scheduler="linear", max_train_steps=4)
    optimizer = build_optimizer(config, [([p], lr) for p, lr in zip(parameters(), (1e-3, 1e-5), strict=True)])
    set_learning_rates(optimizer, config, 2, 4)
    set_learning_rates(optimizer, config, 3, 4)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25e-3, 0.25e-5]
    assert logged_rates(optimizer, ["a", "b"], config, 2, 4, 0.5) == {"a": 0.25e-3, "b": 0.25e-5}


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "DAdaptAdan"])
def test_the_log_shows_d_times_the_rate(name: str) -> None:
    if (left_out := missing(name)) is not None:
        pytest.skip(left_out)
    config = settings(name, lr_scheduler="constant")
    optimizer = built(config, tensors := parameters())
    for number in range(60):
        step(optimizer, tensors, number)
    d = optimizer.param_groups[0]["d"]
    assert d > 1e-6
    assert logged_rates(optimizer, ["a", "b"], config, 0, 9)["a"] == pytest.approx(d)


def test_the_log_shows_the_steps_that_adafactor_makes() -> None:
    optimizer = built(config := settings("Adafactor"), tensors := parameters())
    assert logged_rates(optimizer, ["a", "b"], config, 0, 9) == {"a": 0.0, "b": 0.0}
    before = tensors[0].detach().norm() / 48**0.5
    step(optimizer, tensors, 0)
    found = logged_rates(optimizer, ["a", "b"], config, 0, 9)
    assert found["a"] == pytest.approx(1e-2 * before.item()) and found["b"] == pytest.approx(1e-5)
    set_learning_rates(optimizer, config, 1, 9)
    assert optimizer.param_groups[0]["lr"] is None


def test_a_rate_that_is_hardly_meant_is_warned_of() -> None:
    (line,) = advice(runs.settings(), [Group("denoiser", 1.0, [])], None)
    assert line.startswith("Warning") and "0.0001 is usual" in line
    assert advice(runs.settings(), [Group("denoiser", 1e-3, [])], None) == []


# ---- state ----


@pytest.mark.parametrize("name", HERE)
def test_a_state_goes_on_bit_by_bit_after_every_step(name: str) -> None:
    """Six steps at once, and the same with a new optimizer that is given the state after step k."""
    config = settings(name)
    straight = parameters()
    optimizer = built(config, straight)
    kept: list[tuple[list[torch.Tensor], dict[str, torch.Tensor]]] = []
    for number in range(6):
        kept.append(([p.detach().clone() for p in straight], kept_of(optimizer)))
        step(optimizer, straight, number)
    end = [p.detach().clone() for p in straight]
    for k, (values, state) in enumerate(kept):
        again = [nn.Parameter(v.clone()) for v in values]
        for other, tensors in ((built(config, again), again), (optimizer, straight)):  # a new one, a used one
            for tensor, value in zip(tensors, values, strict=True):
                tensor.data.copy_(value)
            unpack(other, state)
            for number in range(k, 6):
                step(other, tensors, number)
            assert all(torch.equal(a, b) for a, b in zip(tensors, end, strict=True)), k


@pytest.mark.parametrize("name", [n for n in KNOWN if "8bit" in n])
def test_states_of_eight_bits_go_on_too(name: str) -> None:
    """Small tensors have states of 32 bits unless they are told otherwise."""
    pytest.importorskip("bitsandbytes")
    config = settings(name, optimizer_args=["min_8bit_size=16"])
    straight, again = parameters(), parameters()
    optimizer = built(config, straight)
    for number in range(6):
        if number == 3:
            kept = kept_of(optimizer)
            again = [nn.Parameter(p.detach().clone()) for p in straight]
        step(optimizer, straight, number)
    assert any(value.dtype == torch.uint8 and "state" in key for key, value in kept.items())
    other = built(config, again)
    unpack(other, kept)
    for number in range(3, 6):
        step(other, again, number)
    assert all(torch.equal(a, b) for a, b in zip(again, straight, strict=True))


def test_of_adamw_only_tensors_are_kept() -> None:
    optimizer = built(runs.settings(), tensors := parameters())
    step(optimizer, tensors, 0)
    assert set(pack(optimizer)) == {
        f"optimizer.{n}.{k}" for n in (0, 1) for k in ("exp_avg", "exp_avg_sq", "step")
    }


def test_tensors_come_back_as_they_lay_in_memory() -> None:
    """A product's last bits depend on it. The corner of a larger tensor is kept as a tensor of its own."""
    optimizer = built(runs.settings(), tensors := parameters())
    turned, corner = torch.arange(24.0).view(4, 6).t(), torch.arange(24.0).view(4, 6)[:, :2]
    optimizer.state[tensors[0]] = {
        "turned": turned,
        "corner": corner,
        "cube": torch.ones(2, 3, 4).permute(2, 0, 1),
    }
    again = built(runs.settings(), others := parameters())
    unpack(again, kept_of(optimizer))
    found = again.state[others[0]]
    assert torch.equal(found["turned"], turned) and found["turned"].stride() == turned.stride()
    assert found["cube"].stride() == (1, 12, 4)
    assert torch.equal(found["corner"], corner) and found["corner"].is_contiguous()
    assert "optimizer.0.corner" in pack(optimizer)


def test_all_kinds_of_values_are_kept() -> None:
    from collections import deque

    values: dict[str, Any] = {
        "none": None, "bool": True, "int": 2**60, "float": 0.1 + 0.2, "inf": float("inf"), "text": "ä",
        "tuple": (1, 2.5, (torch.ones(2),)), "list": [torch.zeros(1, dtype=torch.int32)],
        "dict": {3: torch.ones(1)}, "queue": deque([1, 2], maxlen=3), "dtype": torch.bfloat16,
        "a.b": torch.arange(3),
    }  # fmt: skip
    optimizer = built(runs.settings(), tensors := parameters())
    optimizer.state[tensors[0]] = dict(values)
    optimizer.param_groups[1]["d"] = values["tuple"]
    again = built(runs.settings(), others := parameters())
    unpack(again, kept_of(optimizer))
    found = again.state[others[0]]
    assert str(found) == str({k: found[k] for k in found}) and set(found) == set(values)
    for key, value in values.items():
        assert type(found[key]) is type(value) and str(found[key]) == str(value)
    assert found["queue"].maxlen == 3 and found["list"][0].dtype == torch.int32
    assert str(again.param_groups[1]["d"]) == str(values["tuple"])
    optimizer.state[tensors[0]]["object"] = object()
    with pytest.raises(TypeError, match="object"):
        pack(optimizer)


@pytest.mark.parametrize("name", FREE)
def test_looking_at_the_average_changes_no_bit_of_the_training(name: str) -> None:
    if (left_out := missing(name)) is not None:
        pytest.skip(left_out)
    config = settings(name, learning_rate=0.1)
    looked, alone = parameters(), parameters()
    optimizers = [built(config, looked), built(config, alone)]
    for number in range(10):  # one of them begins with some steps of plain SGD
        for optimizer, tensors in zip(optimizers, (looked, alone), strict=True):
            step(optimizer, tensors, number)
        before = [p.detach().clone() for p in looked]
        with averaged(optimizers[0]):
            differs = any(not torch.equal(p, b) for p, b in zip(looked, before, strict=True))
    assert differs
    assert all(torch.equal(a, b) for a, b in zip(looked, alone, strict=True))


def test_most_optimizers_have_no_average() -> None:
    optimizer = built(runs.settings(), tensors := parameters())
    with averaged(optimizer):
        assert torch.equal(tensors[0], parameters()[0])


# ---- steps within the backward pass ----


@pytest.mark.parametrize("name", [name for name, entry in KNOWN.items() if entry.separable])
def test_steps_within_the_backward_pass_are_the_same_steps(name: str) -> None:
    config = settings(name)
    inside, after = parameters(), parameters()
    first, second = built(config, inside), built(config, after)
    within = StepInBackward(first)
    for number in range(4):
        norms = []
        for tensors in (inside, after):
            x = torch.full((2, 4), 0.3 + number)
            (x @ tensors[0] @ tensors[1].tanh() + (x @ tensors[0]).square().sum()).sum().backward()
        norms.append(torch.stack([p.grad.square().sum() for p in after if p.grad is not None]).sum().sqrt())
        second.step()
        second.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in inside)
        torch.testing.assert_close(within.taken(), norms[0])
        assert all(torch.equal(a, b) for a, b in zip(inside, after, strict=True))
    assert {k: v.tolist() for k, v in pack(first).items()} == {k: v.tolist() for k, v in pack(second).items()}


def test_elementwise_optimizers_are_known() -> None:
    told = {name for name in HERE if is_elementwise(built(settings(name), parameters()))}
    assert told == {name for name, entry in KNOWN.items() if entry.elementwise}
    dampened = settings("torch.optim.SGD", optimizer_args=["momentum=0.9", "dampening=0.1"])
    assert not is_elementwise(built(dampened, parameters()))


def test_the_tests_see_what_the_extra_brings() -> None:
    """The development extra has these packages; without them most of this file would be left out."""
    if importlib.util.find_spec("pytorch_optimizer") is None:
        pytest.skip("pip install pytorch_optimizer")
    assert {KNOWN[name].package for name in HERE} >= BROUGHT - {"dadaptation"}


@pytest.mark.parametrize(("name", "expected"), [("AdamW", 8.0), ("Lion", 4.0), ("SGDNesterov", 4.0)])
def test_what_an_optimizer_keeps_is_measured(name: str, expected: float) -> None:
    config = api.make(api.TrainConfig, {"optimizer_type": name, "learning_rate": 1e-4})
    assert state_bytes(config, torch.device("cpu")) == expected
