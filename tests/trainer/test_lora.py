"""LoRA: its start, its formula on every kind of layer, its file, and what a peer makes of that file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.adapters import network
from loragraft.trainer.adapters.attach import attach
from loragraft.trainer.adapters.files import as_saved, count_zero, read_metadata, read_tensors
from loragraft.trainer.adapters.layers import LoRAConv, LoRALinear
from loragraft.trainer.families.base import Reading
from loragraft.trainer.parts import Parts, Target
from loragraft.trainer.safefile import write_safetensors
from loragraft_tests.trainer import tiny
from loragraft_tests.trainer.data_folders import Refusal

SETTINGS = network.Settings(4, 2.0, conv_dim=3, conv_alpha=1.5, seed=7)


class Toy(nn.Module):
    """One layer of every kind that is trained, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5).double()
        self.bare = nn.Linear(6, 5, bias=False).double()
        self.point = nn.Conv2d(6, 5, 1).double()
        self.conv = nn.Conv2d(6, 5, 3, padding=1).double()
        self.strided = nn.Conv2d(6, 5, 3, stride=2, padding=1).double()
        self.dilated = nn.Conv2d(6, 5, (3, 1), dilation=2).double()


LAYERS = ("linear", "bare", "point", "conv", "strided", "dilated")
LARGE = ("conv", "strided", "dilated")
TARGETS = [Target("denoiser", n, f"lora_unet_{n}", "conv" if n in LARGE else "linear") for n in LAYERS]


@pytest.fixture
def parts() -> Parts:
    """Return the toy as a denoiser, and another as a text encoder."""
    torch.manual_seed(0)
    return tiny.parts_of(Toy(), nn.Identity(), Toy())


def moved(adapter: network.Adapter) -> network.Adapter:
    """Give every up tensor random values, as training would, in double precision."""
    torch.manual_seed(1)
    for m in adapter.modules:
        m.module.double()
        m.low.up.data.normal_()
    return adapter


def delta(m: network.Adapted) -> torch.Tensor:
    """Return the change of the weight: alpha/rank * up @ down, written out for convolutions too."""
    down, up = m.low.down.detach(), m.low.up.detach()
    return (m.alpha / m.rank) * torch.einsum("or,r...->o...", up.flatten(1), down)


# ---- start ----


def test_a_new_lora_changes_nothing(base: api.Base) -> None:
    parts = base.load()
    for module in (parts.denoiser, parts.text_encoder):
        module.float()
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([500])
    (ids,) = base.family.tokenize(parts, ["zibu"], Reading())

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        cond = base.family.encode_text(parts, (ids,), Reading(clip_skip=1))[0]
        return cond, base.family.predict(parts, x, t, (cond,))

    before = outputs()
    adapter = network.inject(parts, SETTINGS, base.family.targets(parts, convolutions=True))
    after = outputs()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    moved_ups = [m.low.up.data.fill_(0.1) for m in adapter.modules]
    assert not torch.allclose(outputs()[1], before[1], atol=1e-3), len(moved_ups)


def test_down_starts_within_kaimings_bound_and_up_at_zero(parts: Parts) -> None:
    """kohya's init is kaiming_uniform_(a=sqrt(5)): uniform within 1/sqrt(fan_in)."""
    adapter = network.inject(parts, dataclasses.replace(SETTINGS, network_dim=600, conv_dim=600), TARGETS)
    for m in adapter.modules:
        down = m.low.down.detach()
        reference = torch.empty_like(down)
        nn.init.kaiming_uniform_(reference, a=5**0.5)
        bound = down[0].numel() ** -0.5
        assert down.abs().max() <= bound
        assert down.abs().max() > 0.99 * bound
        assert reference.abs().max() == pytest.approx(bound, rel=0.01)
        assert abs(down.mean()) < 0.06 * bound
        assert down.std() == pytest.approx(reference.std().item(), rel=0.05)
        assert not m.low.up.any()
        assert down.dtype == m.low.up.dtype == torch.float32


def test_the_start_of_a_module_depends_on_seed_and_name_alone(parts: Parts) -> None:
    alone = network.inject(parts, SETTINGS, TARGETS[3:4]).state_dict()
    torch.manual_seed(123)
    again = network.inject(tiny.parts_of(Toy(), nn.Identity(), Toy()), SETTINGS, TARGETS).state_dict()
    key = "lora_unet_conv.lora_down.weight"
    assert torch.equal(alone[key], again[key])
    fresh = tiny.parts_of(Toy(), nn.Identity(), Toy())
    other = network.inject(fresh, dataclasses.replace(SETTINGS, seed=8), TARGETS).state_dict()
    assert not torch.equal(other[key], again[key])
    assert not torch.equal(
        again["lora_unet_linear.lora_down.weight"], again["lora_unet_bare.lora_down.weight"]
    )


# ---- formula ----


@pytest.mark.parametrize("name", LAYERS)
def test_the_forward_pass_is_that_of_the_changed_weight(parts: Parts, name: str) -> None:
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    if name in ("linear", "bare"):
        x = x.permute(0, 2, 3, 1)
    adapter = moved(network.inject(parts, SETTINGS, TARGETS))
    (m,) = [m for m in adapter.modules if m.target.path == name]
    module, frozen = m.module, m.module.base
    weight = frozen.weight + delta(m)
    if isinstance(frozen, nn.Linear):
        expected = F.linear(x, weight, frozen.bias)
    else:
        expected = F.conv2d(x, weight, frozen.bias, frozen.stride, frozen.padding, frozen.dilation)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    assert (module(x) - frozen(x)).abs().max() > 0.01


def test_alpha_over_rank_scales_each_group(parts: Parts) -> None:
    adapter = network.inject(parts, SETTINGS, TARGETS)
    scales = {m.target.path: (m.rank, m.alpha, m.low.scale) for m in adapter.modules}
    assert scales == {n: (3, 1.5, 0.5) if n in LARGE else (4, 2.0, 0.5) for n in LAYERS}
    other = tiny.parts_of(Toy(), nn.Identity(), Toy())
    adapter = network.inject(other, dataclasses.replace(SETTINGS, network_alpha=16.0), TARGETS)
    assert {m.low.scale for m in adapter.modules} == {4.0, 0.5}


def test_strength_is_linear_and_zero_is_the_base(parts: Parts) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    adapter = moved(network.inject(parts, SETTINGS, TARGETS))
    plain, out = parts.denoiser.linear.base(x), {}
    for strength in (-1.0, 0.0, 0.5, 1.0):
        network.set_strength(adapter, strength)
        out[strength] = parts.denoiser.linear(x)
    assert torch.equal(out[0.0], plain)
    torch.testing.assert_close(out[1.0] - plain, 2 * (out[0.5] - plain))
    torch.testing.assert_close(out[1.0] + out[-1.0], 2 * plain)


def test_gradients_reach_the_lora_and_not_the_base(parts: Parts) -> None:
    for module in (parts.denoiser, parts.text_encoder):
        module.requires_grad_(False)
    adapter = moved(network.inject(parts, SETTINGS, TARGETS))
    x = torch.randn(1, 6, 8, 8, dtype=torch.float64)
    for name in LAYERS:
        layer = getattr(parts.denoiser, name)
        layer(x.permute(0, 2, 3, 1) if name in ("linear", "bare") else x).sum().backward()
    trained = adapter.parameters("denoiser")
    assert len(trained) == 12
    assert all(p.grad is not None and p.grad.any() for p in trained)
    assert [p for p in parts.denoiser.parameters() if p.requires_grad] and {
        id(p) for p in parts.denoiser.parameters() if p.requires_grad
    } == {id(p) for p in trained}
    assert adapter.parameters("text_encoder") == []


# ---- putting on and taking off ----


def test_removal_restores_every_module(parts: Parts) -> None:
    before = dict(parts.denoiser.named_modules())
    adapter = network.inject(parts, SETTINGS, TARGETS)
    assert all(isinstance(getattr(parts.denoiser, n), (LoRALinear, LoRAConv)) for n in LAYERS)
    network.remove(parts, adapter)
    assert dict(parts.denoiser.named_modules()) == before


def test_parts_and_convolutions_can_be_left_out(parts: Parts) -> None:
    both = TARGETS + [
        dataclasses.replace(t, part="text_encoder", key=t.key.replace("unet", "te")) for t in TARGETS
    ]

    def trained(**changes: Any) -> set[str]:
        fresh = tiny.parts_of(Toy(), nn.Identity(), Toy())
        settings = dataclasses.replace(SETTINGS, **changes)
        return {m.target.key for m in network.inject(fresh, settings, both).modules}

    unet, text = {t.key for t in both[:6]}, {t.key for t in both[6:]}
    assert trained() == unet | text
    assert trained(denoiser=False) == text
    assert trained(text_encoder=False) == unet
    assert trained(conv_dim=None) == {k for k in unet | text if not k.endswith(LARGE)}


def test_a_lora_on_nothing_is_refused(parts: Parts) -> None:
    for settings, targets in (
        (SETTINGS, []),
        (dataclasses.replace(SETTINGS, denoiser=False), TARGETS),
        (dataclasses.replace(SETTINGS, conv_dim=None), TARGETS[3:]),
    ):
        with Refusal("LG-RUN-001", f"{len(targets)} candidates"):
            network.inject(parts, settings, targets)
        assert not any(isinstance(m, (LoRALinear, LoRAConv)) for m in parts.denoiser.modules())


# ---- as a file ----


def test_state_goes_out_and_in_unchanged(parts: Parts) -> None:
    adapter = network.inject(parts, SETTINGS, TARGETS)
    for m in adapter.modules:
        m.low.up.data.normal_()
    state = {k: v.clone() for k, v in adapter.saved().items()}
    assert len(state) == 3 * len(LAYERS)
    assert all(v.dtype == torch.float32 for v in state.values())
    assert state["lora_unet_conv.alpha"].shape == ()
    assert {k: v.item() for k, v in state.items() if k.endswith("alpha")} == {
        f"lora_unet_{n}.alpha": 1.5 if n in LARGE else 2.0 for n in LAYERS
    }
    other = network.inject(
        tiny.parts_of(Toy(), nn.Identity(), Toy()), dataclasses.replace(SETTINGS, seed=9), TARGETS
    )
    other.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in other.saved().items())
    del state["lora_unet_conv.lora_up.weight"]
    with pytest.raises(KeyError):
        other.load_state_dict(state)


def test_a_saved_lora_is_attached_with_its_own_rank_and_alpha(parts: Parts) -> None:
    x = torch.randn(3, 6)
    adapter = network.inject(parts, SETTINGS, TARGETS)
    for m in adapter.modules:
        m.low.up.data.normal_()
    saved = adapter.saved()
    expected = parts.denoiser.float().linear(x)
    network.remove(parts, adapter)
    attached = attach(parts, saved, TARGETS)
    torch.testing.assert_close(parts.denoiser.float().linear(x), expected)
    assert [(m.rank, m.alpha) for m in attached.modules] == [(m.rank, m.alpha) for m in adapter.modules]


def test_a_lora_of_another_model_is_not_attached_in_part(parts: Parts) -> None:
    saved = network.inject(parts, SETTINGS, TARGETS).saved()
    fresh = tiny.parts_of(Toy(), nn.Identity(), Toy())
    cases = {
        "lora_unet_other.lora_up.weight": {**saved, "lora_unet_other.lora_up.weight": torch.zeros(1)},
        "lora_unet_conv.alpha": {k: v for k, v in saved.items() if not k.startswith("lora_unet_conv.lora_d")},
        "lora_unet_linear.lora_up.weight": {**saved, "lora_unet_linear.lora_up.weight": torch.zeros(9, 4)},
    }
    for named, tensors in cases.items():
        with Refusal("LG-SAVE-006", named):
            attach(fresh, tensors, TARGETS)
        assert not any(isinstance(m, (LoRALinear, LoRAConv)) for m in fresh.denoiser.modules())


@pytest.mark.parametrize(
    ("precision", "limit"), [("fp16", 1e5), ("fp16", float("nan")), ("fp32", float("inf"))]
)
def test_a_value_that_the_file_cannot_store_is_refused(precision: str, limit: float) -> None:
    tensors = {"fine": torch.ones(3), "lora_unet_x.lora_up.weight": torch.tensor([0.0, limit])}
    with Refusal("LG-SAVE-003", "lora_unet_x.lora_up.weight", precision):
        as_saved(tensors, precision)
    assert as_saved({"x": torch.tensor([1e5])}, "bf16")["x"].dtype == torch.bfloat16


def test_zero_tensors_are_counted() -> None:
    assert count_zero({"a": torch.zeros(3), "b": torch.tensor([0.0, 1e-30]), "c": torch.zeros(())}) == 2


def test_reading_what_is_no_lora(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for content in (None, b"", b"\0" * 100, b"\xff" * 8):
        if content is not None:
            file.write_bytes(content)
        for read in (read_tensors, read_metadata):
            with Refusal("LG-SAVE-004", "x.safetensors"):
                read(file)


def test_a_folder_is_named_as_one(tmp_path: Path) -> None:
    for read in (read_tensors, read_metadata):
        with Refusal("LG-SAVE-004", "it is a folder."):
            read(tmp_path)


def test_the_denoisers_part_can_be_read_alone(tmp_path: Path) -> None:
    names = ("lora_unet_a.alpha", "lora_te_a.alpha", "lora_unet_b.lora_up.weight")
    write_safetensors(tmp_path / "x.safetensors", {n: torch.ones(1) for n in names}, {"a": "b"})
    assert set(read_tensors(tmp_path / "x.safetensors")) == set(names)
    assert set(read_tensors(tmp_path / "x.safetensors", denoiser_only=True)) == {names[0], names[2]}
    assert read_metadata(tmp_path / "x.safetensors") == {"a": "b"}


# ---- a peer reads the file ----


@pytest.mark.parametrize("conv_dim", [None, 3])
def test_diffusers_applies_the_file_as_we_do(base: api.Base, tmp_path: Path, conv_dim: int | None) -> None:
    """``load_lora_weights`` finds every module, and each weight changes as ours does."""
    pytest.importorskip("peft", reason="diffusers loads LoRAs through peft")
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    ours = base.load()
    targets = base.family.targets(ours, convolutions=conv_dim is not None)
    adapter = network.inject(ours, dataclasses.replace(SETTINGS, conv_dim=conv_dim), targets)
    torch.manual_seed(2)
    for m in adapter.modules:
        m.low.up.data.normal_(std=0.05)
    file = tmp_path / "x.safetensors"
    write_safetensors(file, as_saved(adapter.saved(), "fp16"))

    unet, vae, text = tiny.random_modules()
    unet.load_state_dict(base.load().denoiser.float().state_dict())
    text.load_state_dict(base.load().text_encoder.float().state_dict())
    pipe = StableDiffusionPipeline(
        vae, text, ours.tokenizer, unet, DDIMScheduler(), None, None, requires_safety_checker=False
    )
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="x")
    layers = {
        **{("denoiser", n): m for n, m in unet.named_modules() if isinstance(m, BaseTunerLayer)},
        **{("text_encoder", n): m for n, m in text.named_modules() if isinstance(m, BaseTunerLayer)},
    }
    assert set(layers) == {(m.target.part, m.target.path) for m in adapter.modules}
    for m in adapter.modules:
        theirs = layers[m.target.part, m.target.path].get_delta_weight("x")
        error = (theirs - delta(m)).norm() / delta(m).norm()
        assert error < 1e-3, m.target.key

    ids = base.family.tokenize(ours, ["zibu, blue"], Reading(75))[0]
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([300])
    for module in (ours.denoiser, ours.text_encoder):
        module.float()
    with torch.no_grad():
        cond = base.family.encode_text(ours, (ids,), Reading(clip_skip=1))[0]
        torch.testing.assert_close(text(ids[:, 0]).last_hidden_state, cond, rtol=1e-3, atol=1e-3)
        ours_out = base.family.predict(ours, x, t, (cond,))
        theirs_out = unet(x, t, encoder_hidden_states=cond).sample
        pipe.disable_lora()
        plain = unet(x, t, encoder_hidden_states=cond).sample
    assert (ours_out - theirs_out).norm() < 2e-3 * (ours_out - plain).norm()
