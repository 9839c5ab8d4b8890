"""Which precision a run computes in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loragraft.trainer.engine.precision import resolve, strict
from loragraft.trainer.engine.steps import choose
from loragraft.trainer.errors import LoraGraftError

GPU = torch.device("cuda")


def adamw() -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_takes_what_it_has(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert resolve("auto", GPU).name == expected


def test_auto_on_a_cpu_is_fp32() -> None:
    assert resolve("auto", torch.device("cpu")).name == "fp32"


@pytest.mark.parametrize("setting", ["auto", "eager"])
def test_a_cpu_takes_eager_steps(setting: str) -> None:
    assert choose(setting, resolve("fp32", torch.device("cpu")), adamw())[0] == "eager"


@pytest.mark.parametrize(
    ("precision", "name"), [("bf16", "captured"), ("fp32", "captured"), ("fp16", "eager")]
)
def test_a_gpu_takes_captured_steps_unless_a_loss_scaler_decides(
    monkeypatch: pytest.MonkeyPatch, precision: str, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose("auto", resolve(precision, GPU), adamw())[0] == name
    assert choose("eager", resolve(precision, GPU), adamw())[0] == "eager"


def test_captured_steps_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(LoraGraftError) as refused:
        choose("captured", resolve("fp32", torch.device("cpu")), adamw())
    assert refused.value.code == "LG-RUN-008"
    assert "cpu" in refused.value.why


def test_an_optimizer_that_cannot_be_captured_runs_eagerly() -> None:
    class Plain(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([nn.Parameter(torch.zeros(1))], {"lr": 1.0})

    name, why = choose("auto", resolve("fp32", GPU), Plain())
    assert name == "eager" and "Plain" in why


def test_strict_mode_leaves_the_process_as_it_was() -> None:
    def state() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark

    before = state()
    with strict(True):
        assert state() == (True, True, False)
    assert state() == before
    with pytest.raises(ValueError, match="inside"), strict(True):
        raise ValueError("inside")
    assert state() == before
    with strict(False):
        assert state() == before


def test_bf16_is_refused_where_the_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    with pytest.raises(LoraGraftError) as refused:
        resolve("bf16", GPU)
    assert refused.value.code == "LG-RUN-002"
    assert "an old card" in refused.value.why
