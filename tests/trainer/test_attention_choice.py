"""Which way attention is computed: the fastest that works, by a short measurement, or the one named."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from loragraft.trainer.engine import attention
from loragraft.trainer.engine.attention import BACKENDS, use_attention
from loragraft.trainer.engine.attention_choice import Choice, Shape, choose, largest_shapes, measured_ms
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.trainer import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPES = (Shape(1, 8, 64, 64, 40), Shape(1, 8, 64, 77, 40))


class Timer:
    """Say how long each backend takes, and remember what it was asked; a text is a failure."""

    def __init__(self, **times: float | str) -> None:
        self.times, self.calls = times, []  # type: ignore[var-annotated]

    def __call__(
        self, attend: Any, device: torch.device, dtype: torch.dtype, shapes: Sequence[Shape]
    ) -> float:
        self.calls.append((attend.__name__, device, dtype, tuple(shapes)))
        time = self.times[attend.__name__]
        if isinstance(time, str):
            raise NotImplementedError(time)
        return time


@pytest.mark.parametrize(("device", "deterministic"), [(CPU, False), (CPU, True), (GPU, True)])
def test_where_bits_must_repeat_auto_is_sdpa_unmeasured(
    device: torch.device, deterministic: bool, xformers: None
) -> None:
    timer = Timer()
    name, why = choose("auto", device, torch.float32, SHAPES, deterministic=deterministic, timer=timer)
    assert (name, timer.calls) == ("sdpa", [])
    assert "always" in why


def test_auto_takes_the_fastest_and_says_the_figures(xformers: None) -> None:
    timer = Timer(sdpa=2.0, xformers=1.5, plain=7.25)
    choice = choose("auto", GPU, torch.bfloat16, SHAPES, timer=timer)
    assert choice == Choice("xformers", "sdpa: 2.00 ms, xformers: 1.50 ms, plain: 7.25 ms")
    assert timer.calls == [(name, GPU, torch.bfloat16, SHAPES) for name in BACKENDS]


def test_auto_leaves_sdpa_only_for_a_gain(xformers: None) -> None:
    timer = Timer(sdpa=2.0, xformers=1.95, plain=1.96)
    assert choose("auto", GPU, torch.bfloat16, SHAPES, timer=timer).name == "sdpa"


def test_auto_does_without_what_is_not_there(no_xformers: None) -> None:
    timer = Timer(sdpa=1.9, plain=7.2)
    choice = choose("auto", GPU, torch.bfloat16, SHAPES, timer=timer)
    assert choice == Choice("sdpa", "sdpa: 1.90 ms, xformers is not installed, plain: 7.20 ms")


@pytest.mark.parametrize(
    ("times", "name"),
    [({"sdpa": 2.0, "xformers": "no kernel"}, "sdpa"), ({"sdpa": "no memory", "xformers": 3.0}, "xformers")],
)
def test_auto_does_without_what_fails(times: dict[str, Any], name: str, xformers: None) -> None:
    choice = choose("auto", GPU, torch.bfloat16, SHAPES, timer=Timer(plain=9.0, **times))
    assert choice.name == name
    assert "fails (no " in choice.why


def test_auto_where_everything_fails_is_sdpa(xformers: None) -> None:
    timer = Timer(sdpa="a", xformers="b", plain="c")
    choice = choose("auto", GPU, torch.bfloat16, SHAPES, timer=timer)
    assert choice == Choice("sdpa", "sdpa fails (a), xformers fails (b), plain fails (c)")


def test_auto_does_not_try_what_would_fill_the_memory(xformers: None) -> None:
    timer = Timer(sdpa=3.0, xformers=4.0)
    choice = choose("auto", GPU, torch.bfloat16, (Shape(1, 8, 4096, 4096, 40),), timer=timer)
    assert choice.name == "sdpa"
    assert "plain would keep 512 MiB of scores" in choice.why


def test_the_same_question_is_measured_once(xformers: None) -> None:
    timer = Timer(sdpa=2.0, xformers=1.0, plain=3.0)
    first = choose("auto", GPU, torch.bfloat16, SHAPES, timer=timer)
    timer.times = {"sdpa": 1.0, "xformers": 2.0, "plain": 3.0}
    assert choose("auto", GPU, torch.bfloat16, list(SHAPES), timer=timer) == first
    assert len(timer.calls) == 3
    assert choose("auto", GPU, torch.float16, SHAPES, timer=timer).name == "sdpa"
    assert choose("auto", GPU, torch.bfloat16, SHAPES[:1], timer=timer).name == "sdpa"
    assert len(timer.calls) == 9


def test_a_model_without_exchangeable_attention_is_not_measured(xformers: None) -> None:
    timer = Timer()
    assert choose("auto", GPU, torch.bfloat16, (), timer=timer) == Choice(
        "sdpa", "there is nothing to measure"
    )


def test_a_continued_run_stays_with_its_backend(xformers: None) -> None:
    timer = Timer(sdpa=1.0, xformers=2.0, plain=3.0)
    for device, before in ((GPU, "xformers"), (GPU, "plain"), (CPU, "plain")):
        choice = choose("auto", device, torch.float32, SHAPES, before=before, timer=timer)
        assert choice == Choice(before, "as the run began")
    assert timer.calls == []
    assert choose("sdpa", GPU, torch.float32, SHAPES, before="plain", timer=timer) == ("sdpa", "as set")


@pytest.mark.parametrize("before", ["xformers", "gone"])
def test_a_run_whose_backend_is_gone_says_so(before: str, no_xformers: None) -> None:
    timer = Timer(sdpa=1.0, plain=3.0)
    name, why = choose("auto", GPU, torch.float32, SHAPES, before=before, timer=timer)
    assert name == "sdpa"
    assert f"the run began with {before}, but" in why
    assert "sdpa: 1.00 ms" in why


@pytest.mark.parametrize("name", ["sdpa", "plain"])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_named_backend_is_taken_unmeasured(device: torch.device, name: str) -> None:
    timer = Timer()
    assert choose(name, device, torch.float32, SHAPES, timer=timer) == Choice(name, "as set")
    assert timer.calls == []


def test_xformers_by_name_is_tried_once(xformers: None) -> None:
    timer = Timer(xformers=1.0)
    assert choose("xformers", GPU, torch.bfloat16, SHAPES, timer=timer) == Choice("xformers", "as set")
    assert [call[0] for call in timer.calls] == ["xformers"]


def refused(*arguments: Any, **options: Any) -> LoraGraftError:
    with pytest.raises(LoraGraftError) as caught:
        choose(*arguments, **options)
    assert (caught.value.code, caught.value.where) == ("LG-RUN-009", "attention")
    return caught.value


def test_xformers_that_is_not_installed_is_refused(no_xformers: None) -> None:
    error = refused("xformers", GPU, torch.bfloat16, SHAPES, timer=Timer())
    assert error.why == "xformers is not installed."
    assert "built for this torch" in error.fix


def test_xformers_on_a_cpu_is_refused(xformers: None) -> None:
    error = refused("xformers", CPU, torch.float32, SHAPES, timer=Timer())
    assert "no kernels for cpu" in error.why
    assert "sdpa" in error.fix


def test_xformers_in_a_deterministic_run_is_refused(xformers: None) -> None:
    error = refused("xformers", GPU, torch.bfloat16, SHAPES, deterministic=True, timer=Timer())
    assert "same bits" in error.why
    assert "deterministic" in error.fix


def test_xformers_that_has_no_kernel_is_refused_before_the_run(xformers: None) -> None:
    timer = Timer(xformers="No operator found for this\nhead size")
    error = refused("xformers", GPU, torch.bfloat16, SHAPES, timer=timer)
    assert "No operator found for this head size" in error.why


def test_an_unknown_backend_is_refused() -> None:
    assert "no backend flash" in refused("flash", CPU, torch.float32, SHAPES).why


class Clock:
    """In the place of a CUDA event: each pair of records lies one tick further apart than the last."""

    now = ticks = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Clock.ticks += 1
        Clock.now += Clock.ticks // 2 if Clock.ticks % 2 == 0 else 0
        self.time = Clock.now

    def synchronize(self) -> None:
        """Nothing runs behind the clock."""

    def elapsed_time(self, end: Clock) -> float:
        return float(end.time - self.time)


def test_a_measurement_is_a_median_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock.now = Clock.ticks = 0
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    seen: list[tuple[torch.Size, torch.Size, torch.dtype]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None) -> torch.Tensor:
        assert q.transpose(1, 2).is_contiguous()  # as a processor hands it over
        seen.append((q.shape, k.shape, q.dtype))
        return attention.plain(q, k, v, mask)

    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with torch.no_grad():
        found = measured_ms(attend, CPU, torch.float32, SHAPES)
    assert torch.equal(torch.rand(1), expected)  # the process's random numbers are where they were
    # Pairs take 1, 2, 3, ...: the first three of each shape warm up, the middle one of eleven counts.
    assert found == 9 + 23
    assert seen == [((1, 8, 64, 40), (1, 8, s.keys, 40), torch.float32) for s in SHAPES for _ in range(14)]
    assert freed == [True]


def unet_of(heads: tuple[int, ...], down: str, up: str) -> nn.Module:
    """Return a random U-Net whose blocks, D without and C with attention, are spelt as words."""
    torch.manual_seed(0)
    names = {"D": ("DownBlock2D", "UpBlock2D"), "C": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")}
    return UNet2DConditionModel(
        block_out_channels=(32, 64, 64)[: len(down)],
        layers_per_block=1,
        cross_attention_dim=tiny.TEXT,
        attention_head_dim=heads,
        down_block_types=tuple(names[kind][0] for kind in down),
        up_block_types=tuple(names[kind][1] for kind in up),
    )


def scores(shape: Shape) -> int:
    return shape.heads * shape.queries * shape.keys


@pytest.mark.parametrize(
    ("heads", "down", "up"),
    [((8, 8), "CD", "DC"), ((2, 4, 8), "DCC", "CCD"), ((8, 2, 2), "CCC", "CCC"), ((4, 4), "DD", "DD")],
)
def test_the_largest_shapes_are_those_of_a_pass(
    heads: tuple[int, ...], down: str, up: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unet_of(heads, down, up)
    seen: set[Shape] = set()

    def recorded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        seen.add(Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3]))
        return attention.sdpa(q, k, v, mask)

    expected = largest_shapes(model, 2, (10, 7), 9)
    monkeypatch.setitem(BACKENDS, "recorded", recorded)
    use_attention(model, "recorded")
    model(torch.randn(2, 4, 10, 7), torch.tensor(3), encoder_hidden_states=torch.randn(2, 9, tiny.TEXT))
    for_self = max((s for s in seen if s.keys != 9), key=scores)
    for_text = max((s for s in seen if s.keys == 9), key=scores)
    assert expected == (for_self, for_text)
    assert largest_shapes(model, 2, (10, 7), 9) == expected  # whichever processor is in place
