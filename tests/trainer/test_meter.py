"""The memory meter: what it counts is true, and a prediction equals the reality it predicts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from loragraft.trainer.engine.checkpointing import blocks, checkpoint_blocks
from loragraft.trainer.engine.meter import CannotMeasure, Footprint, Meter, measure, tensor_bytes, track
from loragraft_tests.trainer import models, tiny

KB = 1024
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.model()


def test_live_bytes_rise_and_fall_with_storages() -> None:
    outside = torch.ones(256)
    with Meter(models.CPU) as meter:
        a = outside + 1
        assert meter.live == KB
        view = a.view(16, 16)[2:]
        a.add_(outside)
        outside.view(-1)  # from outside: never counted
        assert meter.live == KB
        b = torch.cat([a, a])
        assert meter.live == 3 * KB
        del a
        assert meter.live == 3 * KB  # the view holds it
        del view
        assert meter.live == 2 * KB
        del b
        assert meter.live == 0
    assert meter.peak(lambda _: "all") == (3 * KB, {"all": 3 * KB})


def test_what_only_autograd_holds_is_alive() -> None:
    weight = nn.Parameter(torch.ones(256))
    with Meter(models.CPU) as meter:
        y = (weight * 2).exp().sin().sum()
        assert meter.live == KB + 4  # what exp gave and sin took, one tensor, and the sum
        y.backward()
        assert weight.grad is not None
        del y
        assert meter.live == KB  # the gradient


def test_another_device_is_not_counted() -> None:
    with Meter(torch.device("cuda")) as meter:
        kept = torch.ones(256) + 1
        assert meter.live == 0
    del kept


def equal(a: Footprint, b: Footprint) -> bool:
    return (a.peak, a.saved, a.gradients, dict(a.at_peak), a.blocks) == (
        b.peak,
        b.saved,
        b.gradients,
        dict(b.at_peak),
        b.blocks,
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_prediction_is_the_reality(model: models.Model, share: float, batch: int) -> None:
    found = [b for root in model.roots for b in blocks(root)]
    undo = checkpoint_blocks(found[: round(share * len(found))])
    fed = models.inputs(batch)
    on_meta = tuple(x.to("meta") for x in fed)
    predicted = measure(model.loss, on_meta, model.roots, models.CPU, blocks=found)
    real = track(model.loss, fed, model.roots, models.CPU, blocks=found)
    undo()
    assert equal(predicted, real)
    assert predicted.gradients == tensor_bytes(model.parameters)
    assert sum(predicted.at_peak.values()) == predicted.peak
    assert predicted.peak > predicted.saved > 0 or share == 1.0


@pytest.mark.slow
def test_without_gradients_nothing_is_kept(model: models.Model) -> None:
    sampling = measure(model.loss, models.inputs(), model.roots, models.CPU, backward=False)
    training = measure(model.loss, models.inputs(), model.roots, models.CPU)
    assert sampling.gradients == 0 and sampling.saved == 4  # the loss
    assert sampling.peak < training.peak / 3


@pytest.mark.slow
def test_in_half_precision_too(model: models.Model) -> None:
    def loss(tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.loss(tensors)

    fed = models.inputs()
    predicted = measure(loss, fed, model.roots, models.CPU)
    # A CPU's norms keep their statistics in float32, which tensors without data do not know.
    assert predicted.peak == pytest.approx(track(loss, fed, model.roots, models.CPU).peak, rel=0.01)
    assert predicted.peak < measure(model.loss, fed, model.roots, models.CPU).peak


def test_a_prediction_leaves_everything_as_it_was(model: models.Model) -> None:
    fed = models.inputs()
    before = model.gradients(fed)
    kept = [torch.full_like(p, 2.0) for p in model.parameters]
    own = [t for root in model.roots for t in (*root.parameters(), *root.buffers())]
    for p, grad in zip(model.parameters, kept, strict=True):
        p.grad = grad
    measure(model.loss, fed, model.roots, models.CPU)
    track(model.loss, fed, model.roots, models.CPU)
    assert all(p.grad is grad for p, grad in zip(model.parameters, kept, strict=True))
    now = [t for root in model.roots for t in (*root.parameters(), *root.buffers())]
    assert len(own) == len(now) and all(a is b for a, b in zip(own, now, strict=True))
    assert models.equal(before, model.gradients(fed))


def test_a_table_made_during_a_prediction_is_real() -> None:
    linear, kept = nn.Linear(4, 4), list[torch.Tensor]()

    def loss(tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        (x,) = tensors
        assert x is not None
        kept.append(torch.arange(4).float())
        return (linear(x) * kept[0]).sum()

    measure(loss, (torch.ones(2, 4),), [linear], models.CPU)
    assert kept[0].tolist() == [0, 1, 2, 3]


def test_sums_kept_outside_are_neither_counted_nor_written() -> None:
    """The fused engine's gradients are added to buffers that the modules do not hold."""
    linear, sums = nn.Linear(16, 16), torch.zeros(2**20)

    def loss(tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        y: torch.Tensor = linear(tensors[0])
        sums[:].add_(y.detach().sum())
        return y.sum()

    predicted = measure(loss, (torch.ones(1, 16),), [linear], models.CPU)
    assert not sums.any()
    assert equal(predicted, track(loss, (torch.ones(1, 16),), [linear], models.CPU))
    assert sums.any()


def test_a_loss_that_reads_values_cannot_be_measured() -> None:
    linear = nn.Linear(4, 4)

    def loss(tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        (x,) = tensors
        assert x is not None
        y: torch.Tensor = linear(x).sum()
        return y * 2 if y.item() > 0 else y

    with pytest.raises(CannotMeasure, match=r"item|_local_scalar_dense|[Dd]ata"):
        measure(loss, (torch.ones(2, 4),), [linear], models.CPU)
    assert isinstance(linear.weight, nn.Parameter) and linear.weight.grad is None
    assert torch.equal(linear(torch.ones(2, 4)), linear(torch.ones(2, 4)))  # real again


def test_tensors_on_one_storage_count_once() -> None:
    whole = torch.zeros(100)
    assert tensor_bytes([whole, whole.view(10, 10)]) == 400
    assert tensor_bytes([whole[:40], whole[40:]]) == 400
    assert tensor_bytes([whole], torch.device("cuda")) == 0


def full_size() -> tuple[Callable[[tuple[torch.Tensor | None, ...]], torch.Tensor], nn.Module]:
    """Return SD1.5's U-Net in bf16 with a rank 32 LoRA on the meta device, and its loss."""
    from diffusers import UNet2DConditionModel

    from loragraft.trainer.adapters import network
    from loragraft.trainer.families.sd15 import SD15

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    nn.Module.to(unet.requires_grad_(False), torch.bfloat16)
    parts = tiny.parts_of(unet, nn.Identity(), nn.Identity())
    settings = network.Settings(32, 16.0, None, 1.0, 1, text_encoder=False)
    network.inject(parts, settings, SD15().targets(parts, convolutions=False))

    def loss(tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        latents, t, cond = tensors
        assert latents is not None and t is not None and cond is not None
        with torch.autocast("cpu", torch.bfloat16):
            pred = SD15().predict(parts, latents, t, (cond,))
        return (pred.float() - latents).square().mean()

    return loss, unet


@pytest.mark.slow
def test_sd15_at_full_size_is_near_the_known_figures() -> None:
    """Counted elsewhere (bf16, rank 32, 512 px): 0.87 GiB saved at batch 1, 3.5 at batch 4."""
    loss, unet = full_size()

    def saved(batch: int) -> float:
        fed = (
            torch.empty(batch, 4, 64, 64, device="meta"),
            torch.empty(batch, dtype=torch.long, device="meta"),
            torch.empty(batch, 77, 768, device="meta"),
        )
        return measure(loss, fed, [unet], models.CPU).saved / 2**30

    assert saved(1) == pytest.approx(0.87, rel=0.05)
    assert saved(4) == pytest.approx(3.5, rel=0.05)
    undo = checkpoint_blocks(blocks(unet))
    assert saved(1) < 0.15
    undo()


REALITY = """
import json, sys
sys.path.insert(0, {root!r})
from tests import conftest
import torch
from loragraft_tests.trainer import test_meter
from loragraft_tests.trainer import tiny

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

print(json.dumps(test_meter.real_growth(status)))
"""


def real_growth(status: Callable[[str], int]) -> list[int]:
    """Return the predicted peak of a layer stack and the growth of this process in computing it."""
    stack = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.SiLU()) for _ in range(24)))
    fed = (torch.randn(8192, 1024),)

    def loss(tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        y: torch.Tensor = stack(tensors[0]).square().mean()
        return y

    stack(fed[0][:8]).mean().backward()  # libraries set themselves up
    for p in stack.parameters():
        p.grad = None
    predicted = measure(loss, fed, [stack], models.CPU).peak
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    before = status("RssAnon")
    file_backed = status("VmRSS") - before
    loss(fed).backward()
    return [predicted, status("VmHWM") - file_backed - before]


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_process_grows_by_what_is_predicted() -> None:
    import json

    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    code = REALITY.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    predicted, grown = json.loads(done.stdout.splitlines()[-1])
    assert predicted > 2**30
    assert grown == pytest.approx(predicted, rel=0.05)
