"""Weight formats: how near a weight comes back, what stays exact, the bytes it takes, what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.engine.storage import BLOCK, FORMATS, NF4_LEVELS, Packed, pack, refuse_lacking
from loragraft_tests.trainer.data_folders import Refusal

SHAPES = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple) | st.sampled_from(
    [(5, 3, 3, 3), (1, 1), (2, 129), (64, 64), (3, 0), (320, 4, 3, 3)]
)
WIDEST_GAP = max(b - a for a, b in pairwise(NF4_LEVELS))


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Draw a float32 weight whose channels differ in size, some of them zero."""
    shape = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator)
    exponents = torch.randint(-20, 12, (shape[0],), generator=generator)
    values *= torch.where(exponents > 8, 0.0, 2.0**exponents).view(-1, *[1] * (len(shape) - 1))
    return values * (torch.rand(shape, generator=generator) > 0.1)


def largest(values: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each output channel, broadcastable to ``values``."""
    most = values.abs().flatten(1).amax(1) if values.numel() else values.new_zeros(len(values))
    return most.view(-1, *[1] * (values.ndim - 1))


@settings(max_examples=60, deadline=None)
@given(weight=weights())
def test_int8_is_half_a_step_away_at_most(weight: torch.Tensor) -> None:
    error = (pack(weight, "int8").unpack(torch.float32) - weight).abs()
    assert bool((error <= largest(weight) / 127 * 0.5001).all())


@settings(max_examples=60, deadline=None)
@given(weight=weights())
def test_fp8_keeps_four_bits_of_each_value(weight: torch.Tensor) -> None:
    """e4m3 has 3 bits after the leading one; below 2**-6 of its range, steps of 2**-9."""
    error = (pack(weight, "fp8").unpack(torch.float32) - weight).abs()
    bound = torch.maximum(weight.abs() / 16, largest(weight) / 448 * 2**-10)
    assert bool((error <= bound * 1.001).all())


@settings(max_examples=60, deadline=None)
@given(weight=weights())
def test_nf4_takes_the_nearest_level_of_its_block(weight: torch.Tensor) -> None:
    found = pack(weight, "nf4").unpack(torch.float32)
    padding = -weight.numel() % BLOCK
    blocks, others = (
        torch.nn.functional.pad(w.flatten(), (0, padding)).view(-1, BLOCK) for w in (weight, found)
    )
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] - absmax[..., None] * torch.tensor(NF4_LEVELS)).abs().amin(-1)
    assert bool(((others - blocks).abs() <= nearest + absmax * 1e-6 + 1e-40).all())
    assert bool(((others - blocks).abs() <= absmax * (WIDEST_GAP / 2 + 1e-6)).all())


@settings(max_examples=60, deadline=None)
@given(weight=weights(), storage=st.sampled_from(list(FORMATS)), dtype=st.sampled_from([0, 1, 2]))
def test_what_comes_back_has_its_shape_its_dtype_and_its_zeros(
    weight: torch.Tensor, storage: str, dtype: int
) -> None:
    wanted = (torch.float32, torch.bfloat16, torch.float64)[dtype]
    found = pack(weight, storage).unpack(wanted)
    assert (found.shape, found.dtype) == (weight.shape, wanted)
    assert not found[weight == 0].any()
    assert bool(torch.isfinite(found).all())


@settings(max_examples=30, deadline=None)
@given(weight=weights())
def test_the_bytes_are_as_promised(weight: torch.Tensor) -> None:
    count, channels = weight.numel(), len(weight)
    assert pack(weight, "fp8").num_bytes == count + 4 * channels
    assert pack(weight, "int8").num_bytes == count + 4 * channels
    blocks = math.ceil(count / BLOCK)
    assert pack(weight, "nf4").num_bytes == blocks * (BLOCK // 2 + 4) + 4 * len(NF4_LEVELS)


@pytest.mark.parametrize(("storage", "expected"), [("fp8", 0.027), ("int8", 0.0085), ("nf4", 0.093)])
def test_the_error_of_a_normal_weight(storage: str, expected: float) -> None:
    weight = torch.randn(640, 320, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.02
    error = float((pack(weight, storage).unpack(torch.float32) - weight).norm() / weight.norm())
    assert error == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(storage: str, value: float) -> None:
    weight = torch.zeros(3, 70)
    weight[1, 5] = value
    with Refusal("LG-BASE-009", storage, "(3, 70)"):
        pack(weight, storage)


@pytest.mark.parametrize("storage", ["as_is", *FORMATS])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_only_apples_gpus_lack_a_format(storage: str, device: str) -> None:
    if (storage, device) != ("fp8", "mps"):
        refuse_lacking(storage, torch.device(device))
        return
    with Refusal("LG-RUN-012", "fp8", "mps", "int8 or nf4"):
        refuse_lacking(storage, torch.device(device))


@pytest.mark.parametrize("storage", FORMATS)
def test_the_weight_is_not_written_to_and_not_kept(storage: str) -> None:
    weight = torch.randn(8, 64).half()
    before = weight.clone()
    packed = pack(weight, storage)
    weight.zero_()
    assert float((packed.unpack(torch.float32) - before).norm() / before.norm()) < 0.15


@pytest.mark.parametrize("storage", FORMATS)
def test_a_packed_weight_moves_with_its_module_and_keeps_its_values(storage: str) -> None:
    """A dtype that a module is brought to must not reach the codes."""
    packed = pack(torch.randn(4, 96), storage)
    before = packed.unpack(torch.float32)
    holder = torch.nn.ModuleDict({"inside": packed}).to(torch.float64)
    inside = holder["inside"]
    assert isinstance(inside, Packed)
    torch.testing.assert_close(inside.unpack(torch.float32), before, rtol=1e-6, atol=0)
    assert {b.device.type for b in holder.to("meta").buffers()} == {"meta"}
    assert not holder.state_dict()
