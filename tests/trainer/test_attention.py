"""Attention backends: one function in three forms, and the processor that calls them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loragraft.trainer.engine import attention
from loragraft.trainer.engine.attention import BACKENDS, Processor, restore_attention, use_attention
from loragraft.trainer.engine.attention_choice import Shape, largest_shapes
from loragraft.trainer.engine.checkpointing import blocks, checkpoint_blocks
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer import tiny
from loragraft_tests.trainer.fake_xformers import fake_xformers

OTHERS = ("sdpa", "xformers")
SHAPES = (Shape(1, 8, 64, 64, 40), Shape(1, 8, 64, 77, 40))


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the relative L2 distance."""
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


def drawn(shape: Shape, dtype: torch.dtype, masked: bool, seed: int = 0) -> tuple[list[torch.Tensor], Any]:
    """Return q, k, v and the output's gradient in the processor's layout, and a mask or None."""
    numbers = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(shape.batch, n, shape.heads, shape.dim, generator=numbers, dtype=dtype).transpose(1, 2)
        for n in (shape.queries, shape.keys, shape.keys, shape.queries)
    ]
    hidden = torch.rand(shape.batch, shape.heads, 1, shape.keys, generator=numbers) < 0.3
    hidden[..., 0] = False  # where all keys are hidden, -10000 swallows the scores' digits
    return tensors, hidden.to(dtype) * -10000.0 if masked else None


def with_gradients(name: str, tensors: Sequence[torch.Tensor], mask: Any) -> list[torch.Tensor]:
    """Return a backend's output and the gradients of q, k and v."""
    *qkv, grad = [x.detach() for x in tensors]
    qkv = [x.requires_grad_() for x in qkv]
    out = BACKENDS[name](*qkv, mask)  # type: ignore[call-arg]
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


@given(
    shape=st.builds(
        Shape,
        st.sampled_from([1, 3]),
        st.integers(1, 4),
        st.integers(1, 33),
        st.integers(1, 19),
        st.sampled_from([1, 4, 5, 8, 40]),
    ),
    is_self=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
@hypothesis_settings(max_examples=cases(400), deadline=None)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_backend_is_the_plain_one(
    name: str, dtype: torch.dtype, bound: float, shape: Shape, is_self: bool, masked: bool, seed: int
) -> None:
    shape = shape._replace(keys=shape.queries) if is_self else shape
    tensors, mask = drawn(shape, dtype, masked, seed)
    with fake_xformers():
        found = with_gradients(name, tensors, mask)
    expected = with_gradients("plain", tensors, mask)
    # Gradients may vanish (one key: the weights are 1 whatever q is), so each is measured on all of them.
    assert relative(found[0], expected[0]) < bound
    assert (
        relative(torch.cat([x.flatten() for x in found]), torch.cat([x.flatten() for x in expected])) < bound
    )


@pytest.mark.parametrize("masked", [False, True])
def test_the_plain_one_is_the_formula(masked: bool) -> None:
    (q, k, v, _), mask = drawn(Shape(2, 3, 5, 7, 4), torch.float64, masked)
    out = BACKENDS["plain"](q, k, v, mask)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                scores = (k[b, h] * q[b, h, i]).sum(1) / 2 + (0 if mask is None else mask[b, h, 0])
                weights = scores.exp() / scores.exp().sum()
                torch.testing.assert_close(out[b, h, i], (weights[:, None] * v[b, h]).sum(0))


def test_the_plain_one_does_not_overflow_in_fp16() -> None:
    """The scores are 14,400 each, but 256 * 30 * 30 * 1 before the scale is 230,400: infinite in fp16."""
    q, k = (torch.full((1, 1, n, 256), 30.0, dtype=torch.float16) for n in (1, 5))
    out = BACKENDS["plain"](q, k, torch.ones(1, 1, 5, 1, dtype=torch.float16), None)
    assert out.dtype == torch.float16
    assert out.item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_plain_one_takes_its_softmax_in_float32_at_least(dtype: torch.dtype) -> None:
    (q, k, v, _), mask = drawn(SHAPES[0], dtype, True)
    seen = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "_softmax":
                seen.append(out.dtype)
            return out

    with Watched():
        assert BACKENDS["plain"](q, k, v, mask).dtype == dtype
    assert seen == [torch.float64 if dtype == torch.float64 else torch.float32]


def test_a_cpu_takes_the_plain_one_in_bf16_where_keys_are_few() -> None:
    for keys in (attention.FEW_KEYS, attention.FEW_KEYS + 1):
        for dtype in (torch.bfloat16, torch.float32):
            (q, k, v, _), mask = drawn(Shape(1, 2, 5, keys, 8), dtype, True)
            out, plain = BACKENDS["sdpa"](q, k, v, mask), BACKENDS["plain"](q.float(), k.float(), v, mask)
            torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            is_plain = dtype == torch.bfloat16 and keys == attention.FEW_KEYS
            assert torch.equal(out, plain if is_plain else torchs) and not torch.equal(plain, torchs)


def test_where_keys_are_few_a_cpu_is_as_exact_in_bf16_as_torchs_kernel() -> None:
    """The output loses a quarter, the gradients gain as much; scores in bf16 lose three times as much."""

    def results(attend: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
        inputs = [x.detach().requires_grad_() for x in tensors[:3]]
        out = attend(*inputs)
        return [out, *torch.autograd.grad(out, inputs, tensors[3])]

    (q, k, v, grad), _ = drawn(Shape(2, 4, 96, 77, 40), torch.bfloat16, False)
    tensors = (3 * q, k, v, grad)
    torchs = torch.nn.functional.scaled_dot_product_attention
    exact = results(torchs, *(x.double() for x in tensors))
    ours, theirs = (
        [float((x.double() - y).norm() / y.norm()) for x, y in zip(results(f, *tensors), exact, strict=True)]
        for f in (BACKENDS["sdpa"], torchs)
    )
    assert ours[0] <= 1.5 * theirs[0] and all(a <= b for a, b in zip(ours[1:], theirs[1:], strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_are_the_numerical_ones(name: str, masked: bool, xformers: None) -> None:
    (q, k, v, _), mask = drawn(Shape(2, 2, 3, 5, 4), torch.float64, masked)
    inputs = [x.contiguous().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: BACKENDS[name](*x, mask), inputs)  # type: ignore[call-arg]


def test_xformers_gets_one_dtype(xformers: None) -> None:
    (q, k, v, _), mask = drawn(Shape(1, 2, 5, 7, 8), torch.float32, True)
    out = BACKENDS["xformers"](q, k, v.bfloat16(), mask)
    assert out.dtype == torch.bfloat16


def unet() -> nn.Module:
    """Return the tiny random U-Net, frozen, with its LoRA-to-be modules as they are."""
    return tiny.random_modules()[0].requires_grad_(False)


class Updated(nn.Module):
    """A frozen linear layer with a low-rank update, as an adapter puts in the layer's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        return out + F.linear(F.linear(x.to(out.dtype), self.down.to(out.dtype)), self.up.to(out.dtype))


def with_lora(model: nn.Module) -> list[nn.Parameter]:
    """Put a moved LoRA on all attention projections; return its tensors."""
    torch.manual_seed(5)
    parameters = []
    for module in [m for m in model.modules() if isinstance(m, Attention)]:
        for parent, name in ((module, "to_q"), (module, "to_k"), (module, "to_v"), (module.to_out, "0")):
            trained = Updated(getattr(parent, name))
            setattr(parent, name, trained)
            parameters += [trained.down, trained.up]
    return parameters


def stepped(
    model: nn.Module, parameters: Sequence[nn.Parameter], dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Return the output for a fixed input, and the gradients of input, text and parameters."""
    numbers = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 10, 6, generator=numbers).requires_grad_()
    text = torch.randn(2, 7, tiny.TEXT, generator=numbers).requires_grad_()
    half = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)
    with half:
        out = model(x, torch.tensor([5, 700]), encoder_hidden_states=text, return_dict=False)[0]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, text, *parameters])]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_sdpa_gives_the_bits_of_diffusers(
    lora: bool, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "FEW_KEYS", 0)
    model = unet()
    parameters = with_lora(model) if lora else []
    expected = stepped(model, parameters, dtype)
    assert use_attention(model, "sdpa") == (12, None)
    found = stepped(model, parameters, dtype)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_unet_computes_the_same_with_each(name: str, xformers: None) -> None:
    model = unet()
    parameters = with_lora(model)
    expected = stepped(model, parameters)
    use_attention(model, name)
    found = stepped(model, parameters)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5
    assert name == "sdpa" or not torch.equal(found[0], expected[0])  # another way of computing is in use


@pytest.mark.parametrize("name", BACKENDS)
def test_gradient_checkpointing_changes_no_bit(name: str, xformers: None) -> None:
    model = unet()
    parameters = with_lora(model)
    use_attention(model, name)
    expected = stepped(model, parameters)
    checkpoint_blocks(blocks(model))
    found = stepped(model, parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def processors(model: nn.Module) -> list[type]:
    return [type(m.processor) for m in model.modules() if isinstance(m, Attention)]


def test_the_processors_come_back() -> None:
    model = unet()
    use_attention(model, "plain")
    use_attention(model, "sdpa")  # again, with another: what comes back is still the first
    assert processors(model) == [Processor] * 12
    assert restore_attention(model) == 12
    assert processors(model) == [AttnProcessor2_0] * 12
    assert restore_attention(model) == 0


class Norm(nn.Module):
    """In the place of a spatial norm, whose convolutions are of no interest here."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return x * temb


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all dropped out": {"dropout": 1.0},
    "biased": {"bias": True, "out_bias": False},
    "residual": {"residual_connection": True, "rescale_output_factor": 2.0},
    "group norm": {"norm_num_groups": 4, "eps": 1e-3},
    "queries and keys normalised": {"qk_norm": "layer_norm"},
    "queries and keys normalised by rms": {"qk_norm": "rms_norm"},
    "text normalised": {"cross_attention_norm": "layer_norm"},
    "text normalised in groups": {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4},
    "other width": {"out_dim": 24},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(
    # diffusers computes no module of another width on images either.
    ("form", "image"),
    [(form, image) for form in FORMS for image in (False, True) if not (image and form == "other width")],
)
def test_every_form_of_module_is_computed_as_diffusers_does(
    form: str, image: bool, cross: bool, masked: bool
) -> None:
    torch.manual_seed(0)
    attn: Any = Attention(
        16, cross_attention_dim=20 if cross else None, heads=4, dim_head=8 if form != "other width" else 6,
        **FORMS[form],
    )  # fmt: skip
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, 16, 5, 3) if image else torch.randn(3, 15, 16)
    text = torch.randn(3, 7, 20) if cross else None
    mask = -10000.0 * (torch.rand(3, 1, 7 if cross else 15) < 0.4) if masked else None
    if form == "plain" and image:
        attn.spatial_norm = Norm()
    arguments = {"encoder_hidden_states": text, "attention_mask": mask, "temb": torch.tensor(0.7)}
    expected = attn(x, **arguments)
    assert use_attention(attn, "sdpa").num_modules == 1
    torch.testing.assert_close(attn(x, **arguments), expected, rtol=1e-5, atol=1e-6)


def test_a_grouped_projection_takes_the_place_of_three() -> None:
    torch.manual_seed(0)
    attn: Any = Attention(16, heads=4, dim_head=8)
    cross: Any = Attention(16, cross_attention_dim=20, heads=4, dim_head=8)
    x, text = torch.randn(3, 15, 16), torch.randn(3, 7, 20)
    use_attention(attn, "sdpa")
    use_attention(cross, "sdpa")
    expected = attn(x), cross(x, encoder_hidden_states=text)
    seen: list[torch.Size] = []

    def grouped(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(rows.shape)
        weight = torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight])
        return (rows @ weight.T).chunk(3, dim=-1)  # views with the rows of all three: no copy is needed

    attn.grouped_qkv = cross.grouped_qkv = grouped
    torch.testing.assert_close(attn(x), expected[0], rtol=1e-5, atol=1e-6)
    assert seen == [(45, 16)]
    assert torch.equal(cross(x, encoder_hidden_states=text), expected[1])  # its k and v have another input
    assert len(seen) == 1


VIEWS = {"view", "_unsafe_view", "t", "transpose", "detach", "alias", "expand", "unsqueeze", "slice"}


class Counted(TorchDispatchMode):
    """Count what is dispatched: what computes, and what only looks at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = func.overloadpacket.__name__ in VIEWS
        self.views, self.kernels = self.views + is_view, self.kernels + (not is_view)
        return func(*args, **(kwargs or {}))


def counts(attn: Any, text: torch.Tensor | None) -> tuple[int, int]:
    x = torch.randn(2, 15, 32, requires_grad=True)
    with Counted() as counted:
        out = attn(x, encoder_hidden_states=text)
        torch.autograd.grad(
            out, [x, *(p for p in attn.parameters() if p.requires_grad)], torch.ones_like(out)
        )
    return counted.kernels, counted.views


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_less_is_dispatched_than_in_diffusers(cross: bool, lora: bool) -> None:
    attn = Attention(32, cross_attention_dim=48 if cross else None, heads=4, dim_head=8)
    attn.requires_grad_(False)
    if lora:
        with_lora(attn)
    text = torch.randn(2, 7, 48) if cross else None
    kernels, views = counts(attn, text)
    use_attention(attn, "sdpa")
    fewer = counts(attn, text)
    assert fewer[0] == kernels - 2  # the division by 1, forward and backward
    assert fewer[1] <= (0.9 if cross else 0.75) * views


def test_other_processors_are_left_alone_and_named() -> None:
    flux: Any = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    before = list(flux.attn_processors.values())
    installed = use_attention(flux, "plain")
    assert installed.num_modules == 0
    assert installed.note is not None
    assert "3 modules" in installed.note
    assert "3 x FluxAttnProcessor" in installed.note
    assert list(flux.attn_processors.values()) == before
    assert largest_shapes(flux, 1, (64, 64), 77) == ()
