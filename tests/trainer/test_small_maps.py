"""Convolutions as matrix products give the plain one's output and input gradient, on the same weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loragraft.trainer.engine.small_maps import SmallMapConv2d, use_matrix_products


def frozen(inputs: int, outputs: int, stride: int = 1, bias: bool = True, **more: object) -> nn.Sequential:
    torch.manual_seed(0)
    options = {"stride": stride, "padding": 1, "bias": bias, **more}
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, **options)).requires_grad_(False)  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 4, 4), (1, 7, 5), (1, 8, 8), (2, 4, 4), (1, 32, 32)])
def test_equal_to_the_plain_convolution(stride: int, bias: bool, size: tuple[int, int, int]) -> None:
    plain, fast = frozen(352, 320, stride, bias), frozen(352, 320, stride, bias)
    assert use_matrix_products(fast) == 1
    x = torch.randn(size[0], 352, *size[1:])
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(i) for model, i in zip((plain, fast), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(outputs[0])
    grads = [torch.autograd.grad(o, i, grad)[0] for o, i in zip(outputs, inputs, strict=True)]
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 1e-5


@pytest.mark.parametrize("size", [(1, 4, 4), (2, 5, 4), (4, 2, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_bf16_in_batches_too_and_as_exact_as_the_convolution(size: tuple[int, int, int], stride: int) -> None:
    plain, fast = frozen(352, 320, stride).bfloat16(), frozen(352, 320, stride).bfloat16()
    use_matrix_products(fast)
    x = torch.randn(size[0], 352, *size[1:]).bfloat16()
    exact = frozen(352, 320, stride).double()
    exact.load_state_dict({k: v.double() for k, v in plain.state_dict().items()})
    grad = torch.randn(exact(x.double()).shape).bfloat16()
    results = []
    for model in (exact, plain, fast):
        dtype = next(model.parameters()).dtype
        leaf = x.to(dtype).requires_grad_()
        out = model(leaf)
        results.append((out, torch.autograd.grad(out, leaf, grad.to(dtype))[0]))
    for true, slow, quick in zip(*([r.detach() for r in pair] for pair in results), strict=True):
        of_slow, of_quick = (float((r.double() - true).norm() / true.norm()) for r in (slow, quick))
        assert of_quick < 1.6 * of_slow, "rounded twice at most: not at each of nine additions"


def test_products_are_taken_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen(352, 320)
    use_matrix_products(model)
    taken: list[tuple[int, ...]] = []
    real = torch.nn.functional.unfold
    monkeypatch.setattr(
        torch.nn.functional, "unfold", lambda x, **options: taken.append(tuple(x.shape)) or real(x, **options)
    )

    def takes(batch: int, side: int, dtype: torch.dtype) -> bool:
        taken.clear()
        model.to(dtype)(torch.zeros(batch, 352, side, side, dtype=dtype))
        return bool(taken)

    assert takes(1, 8, torch.float32) and takes(1, 8, torch.bfloat16)
    assert not takes(1, 9, torch.float32) and not takes(1, 9, torch.bfloat16)
    assert not takes(4, 4, torch.float32), "in float32 the convolution shares its layout among images"
    assert takes(4, 4, torch.bfloat16) and not takes(6, 4, torch.bfloat16)


def test_the_weights_are_shared_and_keep_their_names() -> None:
    model = frozen(352, 320)
    before = {k: v.data_ptr() for k, v in model.state_dict().items()}
    use_matrix_products(model)
    assert type(model[0]) is SmallMapConv2d
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == before


def test_only_convolutions_that_can_gain_are_changed() -> None:
    trained = frozen(352, 320).requires_grad_(True)
    others = [frozen(64, 64), frozen(352, 320, dilation=2), frozen(704, 704, groups=2), trained]
    assert [use_matrix_products(model) for model in others] == [0, 0, 0, 0]
