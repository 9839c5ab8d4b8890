"""ComfyUI's own reader on the files of every network: no tensor is left over, and the weights are ours.

Its files are imported by path; what they need of the rest of ComfyUI is one function that moves tensors.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer.adapters import network
from loragraft.trainer.adapters.attach import attach
from loragraft.trainer.adapters.files import as_saved
from loragraft_tests.conftest import comfyui_path
from loragraft_tests.trainer import networks
from loragraft_tests.trainer.networks import CASES, NORMS, TARGETS

# With lengths over each output, ComfyUI divides by those of the base, LyCORIS by those of the changed weight.
OTHER_LENGTHS = ("dora on outputs", "lokr dora")


@pytest.fixture(scope="module")
def comfy_lora() -> Iterator[Any]:
    """Return ComfyUI's comfy/lora.py."""
    root = comfyui_path()
    if root is None:
        pytest.skip("no ComfyUI: COMFYUI_PATH is not set to one")
    before = {name for name in sys.modules if name == "comfy" or name.startswith("comfy.")}
    assert not before, "something else has imported ComfyUI here"

    def stub(name: str, **contents: Any) -> None:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(contents)

    stub("comfy", __path__=[])
    for name in ("memory_management", "utils", "model_base"):
        stub(f"comfy.{name}")
    stub("comfy.patcher_extension", PatcherInjection=object)
    stub("comfy.model_management", cast_to_device=lambda t, device, dtype, copy=False: t.to(device, dtype))
    for name in ("memory_management", "utils", "model_base", "model_management"):
        setattr(sys.modules["comfy"], name, sys.modules[f"comfy.{name}"])
    try:
        folder = root / "comfy"
        load("comfy.weight_adapter", folder / "weight_adapter" / "__init__.py")
        sys.modules["comfy"].weight_adapter = sys.modules["comfy.weight_adapter"]  # type: ignore[attr-defined]
        yield load("comfy.lora", folder / "lora.py")
    finally:
        for name in [n for n in sys.modules if n == "comfy" or n.startswith("comfy.")]:
            del sys.modules[name]


def load(name: str, file: Any) -> ModuleType:
    """Import a file under a name."""
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


def loaded(
    comfy_lora: Any, tensors: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> dict[str, Any]:
    """Return ComfyUI's patches by the name of the weight; nothing may be left over."""
    names = {key.partition(".")[0] for key in tensors}
    caplog.clear()
    patches = comfy_lora.load_lora(dict(tensors), {name: f"{name}.weight" for name in names})
    assert [r.message for r in caplog.records] == [], "every tensor is used"
    return dict(patches)


def merged(comfy_lora: Any, patch: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight as ComfyUI changes it at strength 1."""
    result: torch.Tensor = comfy_lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight.clone(), "x")
    return result


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_comfyui_changes_the_weights_as_we_do(
    comfy_lora: Any, name: str, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = networks.layers().denoiser
    _, adapter = networks.injected(CASES[name])
    networks.moved(adapter)
    tensors = as_saved(adapter.saved(), precision)
    patches = loaded(comfy_lora, tensors, caplog)
    limit = 2e-5 if precision == "fp32" else 4e-3
    for m in adapter.modules:
        layer = plain.get_submodule(m.target.path)
        weight, ours = layer.weight.detach(), networks.weight_of(m)
        theirs = merged(comfy_lora, patches.pop(f"{m.target.key}.weight"), weight)
        error = ((theirs - ours).norm() / (ours - weight).norm()).item()
        if name in OTHER_LENGTHS:
            assert error > 0.01, "ComfyUI has changed how it reads DoRA: look at wd_on_output's help"
        else:
            assert error < limit, m.target.path
        if "diff_b" in m.tensors:
            assert isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.bias is not None
            theirs = merged(comfy_lora, patches.pop(f"{m.target.key}.bias"), layer.bias.detach())
            moved = m.tensors["diff_b"].detach()
            torch.testing.assert_close(theirs - layer.bias, moved, rtol=limit, atol=limit)
    assert not patches


def test_comfyui_changes_normalisation_layers_as_we_do(
    comfy_lora: Any, caplog: pytest.LogCaptureFixture
) -> None:
    parts = networks.layers()
    adapter = networks.moved(network.inject(parts, CASES["lora"].settings(), NORMS))
    patches = loaded(comfy_lora, adapter.saved(), caplog)
    plain = networks.layers().denoiser
    for m in adapter.modules:
        layer = plain.get_submodule(m.target.path)
        for own in ("weight", "bias"):
            before = getattr(layer, own).detach()
            getattr(layer, own).data = merged(comfy_lora, patches[f"{m.target.key}.{own}"], before)
        x = networks.input_of(m.target.path)
        torch.testing.assert_close(layer(x), m.module(x))


@pytest.mark.parametrize("name", CASES)
def test_a_saved_network_is_put_on_a_base_as_it_was(name: str) -> None:
    """What we write we read: the attached file changes the base as the trained network did."""
    _, adapter = networks.injected(CASES[name])
    networks.moved(adapter)
    parts = networks.layers()
    attached = attach(parts, adapter.saved(), TARGETS)
    assert [m.target for m in attached.modules] == [m.target for m in adapter.modules]
    for trained, again in zip(adapter.modules, attached.modules, strict=True):
        x = networks.input_of(trained.target.path)
        torch.testing.assert_close(again.module(x), trained.module(x), rtol=1e-5, atol=2e-5)
        plain = again.module.base(x)
        assert (again.module(x) - plain).abs().max() > 1e-3
    network.set_strength(attached, 0.0)
    for m in attached.modules:
        x = networks.input_of(m.target.path)
        assert torch.equal(m.module(x), m.module.base(x))
    network.remove(parts, attached)
    assert not any(hasattr(m, "runs") for m in parts.denoiser.modules())
