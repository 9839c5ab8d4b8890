"""What holds for every network: its start, its gradients, what is left out of a step, its memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer.adapters import lora, network, norm
from loragraft.trainer.adapters.shares import Drops, kept
from loragraft.trainer.engine.meter import measure
from loragraft_tests.trainer import models, networks
from loragraft_tests.trainer.networks import CASES, NORMS, Case, at, outputs

GOLDEN = Path(__file__).parent.parent / "golden"


# ---- start ----


@pytest.mark.parametrize("name", CASES)
def test_nothing_changes_at_the_start(name: str) -> None:
    plain = networks.layers().denoiser
    _, adapter = networks.injected(CASES[name])
    for path, out in outputs(adapter).items():
        expected = plain.get_submodule(path)(networks.input_of(path))
        torch.testing.assert_close(out, expected, rtol=0, atol=0 if "dora" not in name else 1e-6)
    torch.manual_seed(5)
    again = networks.injected(CASES[name])[1].saved()
    assert all(torch.equal(v, again[k]) for k, v in adapter.saved().items()), "a function of the run's seed"


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_trained_tensor(name: str) -> None:
    parts, adapter = networks.injected(CASES[name])
    networks.moved(adapter)
    for out in outputs(adapter).values():
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    trained = {f"{m.target.path}.{n}": t for m in adapter.modules for n, t in m.tensors.items()}
    assert all(t.grad is not None and t.grad.any() for t in trained.values())
    assert {id(t) for t in adapter.parameters("denoiser")} == {id(t) for t in trained.values()}
    ours = {id(t) for t in trained.values()}
    assert all((id(p) in ours) == p.requires_grad for p in parts.denoiser.parameters())


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_changed_weight(name: str) -> None:
    """The update as a product of its own has the gradients that W' x has."""
    _, adapter = networks.injected(CASES[name])
    networks.moved(adapter)
    for m in adapter.modules:
        m.module.double()
    for m in adapter.modules:
        base, x = m.module.base, networks.input_of(m.target.path).double()
        tensors = list(m.tensors.values())

        def merged(m: network.Adapted = m, base: Any = base, x: torch.Tensor = x) -> torch.Tensor:
            if isinstance(m.share, lora.LowRank):
                change = m.share.scale * lora.delta(m.tensors)
            elif hasattr(m.share, "delta"):
                change = m.share.delta(base)
            else:
                down, up = torch.cat(list(m.share.downs)), torch.cat(list(m.share.ups), 1)  # type: ignore[attr-defined]
                change = m.share.scale * lora.delta({lora.DOWN: down, lora.UP: up})  # type: ignore[attr-defined]
            bias = base.bias
            if "diff_b" in m.tensors:
                bias = bias + m.tensors["diff_b"]
            if isinstance(base, nn.Conv2d):
                return nn.functional.conv2d(x, base.weight + change, bias, base.stride, base.padding)
            return nn.functional.linear(x, base.weight + change, bias)

        towards = torch.linspace(-1, 1, merged().numel(), dtype=torch.float64)
        expected = torch.autograd.grad((merged().flatten() * towards).sum(), tensors)
        found = torch.autograd.grad((m.module(x).flatten() * towards).sum(), tensors)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(m.module(x), merged(), rtol=1e-9, atol=1e-9)


def test_normalisation_layers_start_at_nothing_and_learn() -> None:
    plain = networks.layers().denoiser
    adapter = network.inject(networks.layers(), CASES["loha"].settings(), NORMS)
    for path, out in outputs(adapter).items():
        assert torch.equal(out, plain.get_submodule(path)(networks.input_of(path)))
        (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters("denoiser"))


# ---- what is left out ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_norm_learns_on_a_map_that_lies_channels_last_and_needs_no_gradient(
    dtype: torch.dtype,
) -> None:
    """torch's gradient on a CPU ends the process there: it writes that of the map, which nobody wants."""
    torch.manual_seed(0)
    base = nn.GroupNorm(8, 32).to(dtype).requires_grad_(False)
    x, found = torch.randn(2, 32, 8, 8, dtype=dtype), []
    for layout in (torch.channels_last, torch.contiguous_format):
        t = {name: torch.ones(32, requires_grad=True) for name in (norm.WEIGHT, norm.BIAS)}
        norm.update(base, x.contiguous(memory_format=layout), t).square().sum().backward()
        found.append([each.grad for each in t.values()])
    torch.testing.assert_close(*found)


def test_dropout_is_a_function_of_seed_step_micro_batch_and_module() -> None:
    _, adapter = networks.injected(CASES["lora"], drops=Drops(network=0.3, rank=0.3, module=0.2))
    networks.moved(adapter)
    at(adapter, 3)
    once, again = outputs(adapter), outputs(adapter)
    assert all(torch.equal(once[k], again[k]) for k in once), "a block computed twice leaves out the same"
    for moment in ((4, 0, 7), (3, 1, 7), (3, 0, 8)):
        at(adapter, moment[0], moment[1], moment[2])
        other = outputs(adapter)
        assert any(not torch.equal(once[k], other[k]) for k in once)
    adapter.select()
    whole = outputs(adapter)
    assert adapter.rows.moments == {}
    _, without = networks.injected(CASES["lora"])
    networks.moved(without)
    assert all(torch.equal(whole[k], v) for k, v in outputs(without).items()), "samples leave nothing out"


@pytest.mark.parametrize("path", ["linear", "point", "conv", "strided"])
def test_network_and_rank_dropout_follow_the_references_formula(path: str) -> None:
    """kohya: dropout on down(x), then a mask for each sample and rank, and the scale divided by 1 - p."""
    _, adapter = networks.injected(CASES["lora"], drops=Drops(network=0.25, rank=0.5))
    networks.moved(adapter)
    (m,) = [m for m in adapter.modules if m.target.path == path]
    at(adapter, 3)
    x, base = networks.input_of(path, batch=4), m.module.base
    down, up = lora.products(base)
    hidden = down(x, m.low.down)
    moment, key = adapter.rows.moments[0], m.target.key
    values = kept(0.25, moment, key, "network_dropout", tuple(hidden.shape), hidden)
    places = (-1, 4, 1, 1) if isinstance(base, nn.Conv2d) else (-1, 1, 4)
    of_ranks = kept(0.5, moment, key, "rank_dropout", (4, 4), hidden)
    assert 0 < of_ranks.sum() < 16 and 0.6 < values.mean() < 0.9
    thinned = hidden * values / 0.75 * of_ranks.view(places)
    expected = base(x) + up(thinned, m.low.up) * (m.low.scale * (1 / (1 - 0.5)))
    torch.testing.assert_close(m.module(x), expected)


def test_dropped_values_leave_the_mean_in_place() -> None:
    _, adapter = networks.injected(CASES["lora"], drops=Drops(network=0.4))
    networks.moved(adapter)
    m = adapter.modules[0]
    x = networks.input_of("linear")
    expected = m.module(x) - m.module.base(x)
    total = torch.zeros_like(expected)
    for step in range(600):
        at(adapter, step)
        total += (m.module(x) - m.module.base(x)).detach()
    assert ((total / 600 - expected).norm() / expected.norm()).item() < 0.1


@pytest.mark.parametrize("name", CASES)
def test_whole_modules_are_left_out_as_often_as_asked(name: str) -> None:
    _, adapter = networks.injected(CASES[name], drops=Drops(module=0.5))
    networks.moved(adapter)
    m, out = adapter.modules[0], 0
    x = networks.input_of("linear")
    for step in range(60):
        at(adapter, step)
        out += int(torch.equal(m.module(x), m.module.base(x)))
    assert 15 < out < 45


@pytest.mark.parametrize("name", ["loha", "lokr", "full", "dora"])
@pytest.mark.parametrize("scaled", [False, True])
def test_whole_outputs_are_left_out_of_networks_without_ranks(name: str, scaled: bool) -> None:
    """LyCORIS: rows of dW are left out; rank_dropout_scale divides by the share that stays."""
    _, adapter = networks.injected(CASES[name], drops=Drops(rank=0.5, rank_scale=scaled))
    networks.moved(adapter)
    m = adapter.modules[0]
    plain = m.share.delta(m.module.base) if name != "dora" else lora.delta(m.tensors) * m.share.scale
    at(adapter, 5)
    share: Any = m.share
    if name == "dora":
        tensors = {k: v for k, v in m.tensors.items() if k != "dora_scale"}
        share = type(m.share)("lora", m.module.base, tensors, alpha=m.alpha, key=share.key, drops=share.drops)
    found = share.delta(m.module.base, adapter.rows.moments[0])
    stays = found.flatten(1).any(dim=1)
    assert 0 < int(stays.sum()) < len(stays)
    factor = len(stays) / int(stays.sum()) if scaled else 1.0
    torch.testing.assert_close(found, plain * stays[:, None] * factor)


# ---- DyLoRA ----


def test_dylora_trains_one_block_at_a_time_and_scales_as_the_reference() -> None:
    """kohya: all ranks take part, one block has gradients, times sqrt(rank / ranks up to it)."""
    case = Case("dylora", 8, 4.0, {"unit": 2})
    _, adapter = networks.injected(case)
    networks.moved(adapter)
    m = adapter.modules[0]
    x, seen = networks.input_of("linear"), set()
    whole = m.module(x) - m.module.base(x)
    for step in range(40):
        at(adapter, step)
        out = m.module(x) - m.module.base(x)
        out.sum().backward()
        touched = [n for n, t in m.tensors.items() if t.grad is not None]
        turn = int(touched[0].rpartition(".")[2])
        assert touched == [f"lora_down.weight.{turn}", f"lora_up.weight.{turn}"]
        torch.testing.assert_close(out, whole * math.sqrt(8 / (2 * turn + 2)))
        seen.add(turn)
        for t in m.tensors.values():
            t.grad = None
    assert seen == {0, 1, 2, 3}
    saved = adapter.saved()
    assert saved["lora_unet_linear.lora_down.weight"].shape == (8, 24)
    assert saved["lora_unet_linear.lora_up.weight"].shape == (16, 8)


def test_dylora_starts_as_a_lora_of_its_rank() -> None:
    _, nested = networks.injected(Case("dylora", 4, 2.0, {"unit": 2}))
    _, plain = networks.injected(CASES["lora"])
    expected = plain.saved()
    assert all(torch.equal(tensor, expected.pop(key)) for key, tensor in nested.saved().items())
    assert not expected


# ---- in the engine ----


@pytest.mark.parametrize("name", CASES)
def test_the_memory_of_a_step_can_be_predicted(name: str) -> None:
    """The planner runs both passes without data; in half precision the trained tensors stay float32."""
    parts, dtype = networks.layers(), torch.bfloat16
    parts.denoiser.to(dtype)
    _, adapter = networks.injected(CASES[name], parts)
    layers = {m.target.path: m.module for m in adapter.modules}

    def loss(tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        pairs = zip(layers.values(), tensors, strict=True)
        return torch.stack([layer(x).float().square().mean() for layer, x in pairs if x is not None]).sum()

    inputs = tuple(networks.input_of(path).to(dtype) for path in layers)
    predicted = measure(loss, inputs, [parts.denoiser], models.CPU)
    assert predicted.peak > 0
    loss(inputs).backward()
    assert all(p.dtype == torch.float32 for p in adapter.parameters("denoiser"))
    assert all(layers[path](x).dtype == dtype for path, x in zip(layers, inputs, strict=True))
