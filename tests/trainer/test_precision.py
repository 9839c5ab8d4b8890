"""Which precision a run computes in."""

from __future__ import annotations

import pytest
import torch

from loragraft.trainer.engine.precision import resolve
from loragraft.trainer.errors import LoraGraftError

GPU = torch.device("cuda")


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_takes_what_it_has(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert resolve("auto", GPU).name == expected


def test_auto_on_a_cpu_is_fp32() -> None:
    assert resolve("auto", torch.device("cpu")).name == "fp32"


def test_bf16_is_refused_where_the_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    with pytest.raises(LoraGraftError) as refused:
        resolve("bf16", GPU)
    assert refused.value.code == "LG-RUN-002"
    assert "an old card" in refused.value.why
