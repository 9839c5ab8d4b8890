"""Attention backends on a GPU: against the plain one, measured, and inside captured steps."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from loragraft.trainer.engine.attention import BACKENDS, use_attention
from loragraft.trainer.engine.attention_choice import Shape, choose
from loragraft_tests.trainer import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CUDA = torch.device("cuda")
HERE = [name for name in BACKENDS if name != "xformers" or importlib.util.find_spec("xformers")]
SHAPES = (Shape(2, 8, 1024, 1024, 40), Shape(2, 8, 1024, 77, 40))


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave TF32 out of float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def results(name: str, shape: Shape, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return output and gradients in float64, computed on the GPU in ``dtype`` from the same numbers."""
    numbers = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(shape.batch, n, shape.heads, shape.dim, generator=numbers)
        .to(CUDA, torch.bfloat16)  # what both dtypes can hold
        .to(dtype)
        .transpose(1, 2)
        for n in (shape.queries, shape.keys, shape.keys, shape.queries)
    )
    qkv = [x.detach().requires_grad_() for x in (q, k, v)]
    out = BACKENDS[name](*qkv, None)  # type: ignore[call-arg]
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, qkv, grad))]


@pytest.mark.parametrize("shape", [*SHAPES, Shape(1, 8, 63, 63, 160)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", HERE)
def test_a_backend_is_the_plain_one(name: str, dtype: torch.dtype, bound: float, shape: Shape) -> None:
    expected = results("plain", shape, torch.float64)
    for found, exact in zip(results(name, shape, dtype), expected, strict=True):
        assert float((found - exact).norm() / exact.norm()) < bound


def test_auto_measures_once_and_touches_no_random_numbers() -> None:
    state = torch.cuda.get_rng_state()
    first = choose("auto", CUDA, torch.bfloat16, SHAPES)
    assert first.name in HERE
    assert "sdpa: " in first.why and " ms" in first.why
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert choose("auto", CUDA, torch.bfloat16, SHAPES) == first


@pytest.mark.parametrize("name", HERE)
def test_a_captured_pass_is_the_same(name: str) -> None:
    model: Any = tiny.random_modules()[0].requires_grad_(False).to(CUDA)
    torch.manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, device=CUDA), torch.randn(2, 77, tiny.TEXT, device=CUDA)
    t = torch.tensor([5, 700], device=CUDA)

    def passed() -> torch.Tensor:
        return model(x, t, encoder_hidden_states=text, return_dict=False)[0]

    with torch.no_grad():
        expected = passed()
        use_attention(model, name)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                passed()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = passed()
        graph.replay()
    assert float((out - expected).norm() / expected.norm()) < 1e-4
