"""A CPU's convolutions give the plain one's output and input gradient, on the same weight, in three ways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from loragraft.trainer.engine import cpu_convolutions, small_maps, winograd
from loragraft.trainer.engine.cpu_convolutions import CPUConv2d, use_faster_ways
from loragraft.trainer.engine.frozen import freeze


def frozen(inputs: int, outputs: int, kernel: int = 3, **more: object) -> nn.Sequential:
    torch.manual_seed(0)
    options = {"padding": kernel // 2, **more}
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **options)).requires_grad_(False)  # type: ignore[arg-type]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ways that were taken, by name; a plain convolution is none of them."""
    names: list[str] = []
    for module in (small_maps, winograd):
        name, real = module.__name__.rpartition(".")[2], module.convolution
        spy = lambda *args, name=name, real=real: names.append(name) or real(*args)  # noqa: E731
        monkeypatch.setattr(module, "convolution", spy)
    yield names


WAYS = {  # name -> size of the input, the layer's options, the way
    "one small map": ((1, 4, 4), {}, ["small_maps"]),
    "an odd small map": ((1, 5, 3), {}, ["small_maps"]),
    "small maps": ((2, 4, 4), {}, ["small_maps"]),
    "small maps at stride 2": ((1, 8, 8), {"stride": 2}, ["small_maps"]),
    "small maps without bias": ((1, 4, 4), {"bias": False}, ["small_maps"]),
    "many tiles": ((1, 16, 16), {}, ["winograd"]),
    "many tiles without bias": ((2, 16, 8), {"bias": False}, ["winograd"]),
    "large maps": ((1, 40, 32), {}, ["winograd"]),
    "few tiles": ((1, 14, 14), {}, []),
    "an odd height": ((1, 33, 32), {}, []),
    "an odd width": ((1, 32, 33), {}, []),
    "stride 2": ((1, 32, 32), {"stride": 2}, []),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_equal_to_the_plain_convolution(name: str, last: bool, taken: list[str]) -> None:
    size, options, way = WAYS[name]
    plain, fast = frozen(352, 320, **options), frozen(352, 320, **options)
    assert use_faster_ways(fast) == 1
    x = torch.randn(size[0], 352, *size[1:])
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(i) for model, i in zip((plain, fast), inputs, strict=True)]
    assert taken == way
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert outputs[1].is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(outputs[0])
    grads = [torch.autograd.grad(o, i, grad)[0] for o, i in zip(outputs, inputs, strict=True)]
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_pixels_and_any_other_kernel(dtype: torch.dtype) -> None:
    for kernel, options in ((1, {}), (1, {"padding": 1}), (5, {}), (3, {"groups": 2}), (3, {"dilation": 2})):
        plain, fast = (frozen(8, 12, kernel, **options).to(dtype) for _ in range(2))
        use_faster_ways(fast)
        x = torch.randn(2, 8, 6, 10).to(dtype).requires_grad_()
        pair = [model(x) for model in (plain, fast)]
        into = [torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in pair]
        for slow, quick in (pair, into):
            assert (quick - slow).float().norm() <= (
                1e-2 if dtype == torch.bfloat16 else 1e-6
            ) * slow.float().norm()


@pytest.mark.parametrize("size", [(1, 4, 4), (2, 5, 4), (4, 2, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_bf16_is_as_exact_as_the_convolution(
    size: tuple[int, int, int], stride: int, taken: list[str]
) -> None:
    plain, fast = (frozen(352, 320, stride=stride).bfloat16() for _ in range(2))
    use_faster_ways(fast)
    x = torch.randn(size[0], 352, *size[1:]).bfloat16()
    exact = frozen(352, 320, stride=stride).double()
    exact.load_state_dict({k: v.double() for k, v in plain.state_dict().items()})
    grad = torch.randn(exact(x.double()).shape).bfloat16()
    results = []
    for model in (exact, plain, fast):
        dtype = torch.float64 if model is exact else torch.bfloat16
        leaf = x.to(dtype).requires_grad_()
        out = model(leaf)
        results.append((out, torch.autograd.grad(out, leaf, grad.to(dtype))[0]))
    assert taken == ["small_maps"]
    for true, slow, quick in zip(*([r.detach() for r in pair] for pair in results), strict=True):
        of_slow, of_quick = (float((r.double() - true).norm() / true.norm()) for r in (slow, quick))
        assert of_quick < 1.6 * of_slow, "rounded twice at most: not at each of nine additions"


def test_which_way_follows_from_shape_and_dtype(taken: list[str]) -> None:
    model = frozen(352, 320)
    use_faster_ways(model)

    def way(batch: int, side: int, dtype: torch.dtype = torch.float32) -> list[str]:
        taken.clear()
        with torch.no_grad():
            cpu_convolutions.CPUConv2d.forward(
                layers[dtype], torch.zeros(batch, 352, side, side, dtype=dtype)
            )
        return list(taken)

    layers = {torch.float32: model[0]}
    for dtype in (torch.bfloat16, torch.float64):
        other = frozen(352, 320).to(dtype)
        use_faster_ways(other)
        layers[dtype] = other[0]
    assert way(1, 5) == way(2, 4) == ["small_maps"] and way(1, 6) == [], "32 pixels are a tenth of 320"
    assert way(1, 16) == way(4, 8) == ["winograd"] and way(1, 14) == way(3, 8) == []
    assert way(1, 8, torch.bfloat16) == way(5, 4, torch.bfloat16) == ["small_maps"]
    assert way(1, 9, torch.bfloat16) == way(1, 32, torch.bfloat16) == [], "bf16 could not afford its error"
    assert way(1, 4, torch.float64) == way(1, 32, torch.float64) == []


def test_narrow_layers_stay_as_they_are(taken: list[str]) -> None:
    model = frozen(96, 320)
    use_faster_ways(model)
    model(torch.zeros(1, 96, 32, 32))
    model(torch.zeros(1, 96, 4, 4))
    assert taken == [], "below 128 channels and a million weights there is nothing to gain"


def test_nothing_is_kept_for_backward() -> None:
    for kernel, side in ((3, 4), (3, 16), (3, 15), (1, 8)):
        model = frozen(352, 320, kernel)
        use_faster_ways(model)
        kept: list[torch.Size] = []
        x = torch.randn(1, 352, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):  # noqa: B023
            model(x)
        assert kept == [], (kernel, side)


@pytest.mark.parametrize("size", [(1, 4, 4), (1, 16, 16), (1, 15, 15)])
@pytest.mark.parametrize("storage", ["as_is", "int8"])
def test_a_stored_weight_gives_the_bits_of_its_values(storage: str, size: tuple[int, int, int]) -> None:
    stored = frozen(352, 320).half()
    freeze(stored, torch.float32, None, storage=storage, keeps=lambda weight: True)
    plain = frozen(352, 320)
    plain[0].weight.data, plain[0].bias.data = stored[0].weight.float(), stored[0].bias.float()
    assert use_faster_ways(stored) == use_faster_ways(plain) == 1
    x = torch.randn(size[0], 352, *size[1:]).requires_grad_()
    outs = [model(x) for model in (plain, stored)]
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    assert torch.equal(*outs) and torch.equal(*grads)


def test_the_weights_are_shared() -> None:
    model = frozen(352, 320)
    before = model[0].weight.data_ptr()
    use_faster_ways(model)
    assert type(model[0]) is CPUConv2d and model[0].stored.data_ptr() == before


def test_only_frozen_plain_convolutions_are_changed() -> None:
    trained, bias_trained = frozen(352, 320).requires_grad_(True), frozen(352, 320)
    bias_trained[0].bias.requires_grad_(True)
    reflected = frozen(352, 320, padding_mode="reflect")
    for model in (trained, bias_trained, reflected, nn.Sequential(nn.Linear(2, 2))):
        assert use_faster_ways(model) == 0
