"""One step of Flux.1 beside the reference trainer's: the same loss, the same gradient of every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from loragraft.trainer.adapters import network
from loragraft.trainer.adapters.settings import Settings
from loragraft.trainer.families.targets.flux_targets import find_flux_targets
from loragraft.trainer.objective import Flow
from loragraft.trainer.parts import Parts
from loragraft_tests.conftest import TESTS
from loragraft_tests.trainer import tiny_flux

RANK, ALPHA = 4, 2.0
GOLDEN = TESTS / "golden" / "flux_step.json"


def step_inputs() -> dict[str, torch.Tensor]:
    """Return latents that are not square, noise, times, and a conditioning with its mask."""
    drawn = torch.Generator().manual_seed(5)
    return {
        "latents": torch.randn(2, 16, 6, 8, generator=drawn),
        "noise": torch.randn(2, 16, 6, 8, generator=drawn),
        "t": torch.tensor([712.5, 81.25]),
        "text": torch.randn(2, 7, 32, generator=drawn),
        "pooled": torch.randn(2, 64, generator=drawn),
        "mask": torch.tensor([[1] * 5 + [0] * 2, [1] * 2 + [0] * 5]),
    }


def lora_tensors() -> dict[str, torch.Tensor]:
    """Return a LoRA for the tiny model, drawn by the modules' names."""
    drawn = torch.Generator().manual_seed(6)
    weights = tiny_flux.single_file_weights()
    prefix, found = "model.diffusion_model.", {}
    for name in sorted(weights):
        path = name.removeprefix(prefix).removesuffix(".weight")
        if not name.startswith(prefix) or "_blocks." not in name or weights[name].ndim != 2:
            continue
        rows, columns = weights[name].shape
        key = f"lora_unet_{path.replace('.', '_')}"
        found[f"{key}.lora_down.weight"] = torch.randn(RANK, columns, generator=drawn) * 0.05
        found[f"{key}.lora_up.weight"] = torch.randn(rows, RANK, generator=drawn) * 0.05
    return found


def marks(name: str, gradient: torch.Tensor) -> list[float]:
    """Return a gradient's length, and its products with two fixed random directions."""
    flat = gradient.double().flatten()
    drawn = torch.Generator().manual_seed(len(name))
    directions = torch.randn(2, len(flat), generator=drawn, dtype=torch.float64)
    return [flat.norm().item(), *(directions @ flat).tolist()]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Return a tiny dev."""
    folders = tiny_flux.write_tokenizers(tmp_path_factory.mktemp("tokenizers"))
    return cast(Parts, tiny_flux.load_parts(folders))


@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients_are_the_reference_trainers(parts: Parts, masked: bool) -> None:
    golden: dict[str, Any] = json.loads(Path(GOLDEN).read_text())["masked" if masked else "plain"]
    settings = Settings(RANK, ALPHA, None, 1.0, 0, text_encoder=False)
    adapter = network.inject(parts, settings, find_flux_targets(parts, convolutions=False))
    try:
        adapter.load_state_dict(lora_tensors())
        given, flow, own = step_inputs(), Flow(), tiny_flux.family()
        latents, noise, t = given["latents"], given["noise"], given["t"]
        cond = (given["text"], given["pooled"], *([given["mask"]] if masked else []))
        pred = own.predict(parts, flow.add_noise(latents, noise, t), t, cond, None, 1.0)
        loss = (pred - flow.target(latents, noise, t)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.item() == pytest.approx(golden["loss"], rel=1e-6)
        found = {
            f"{m.target.key}.{name}": marks(name, cast(torch.Tensor, tensor.grad))
            for m in adapter.modules
            for name, tensor in m.tensors.items()
        }
        assert sorted(found) == sorted(golden["gradients"])
        for name, (length, *others) in golden["gradients"].items():
            assert length > 1e-6, name
            assert found[name] == pytest.approx([length, *others], abs=2e-5 * length), name
    finally:
        network.remove(parts, adapter)
    frozen = [*parts.denoiser.parameters(), *parts.text_encoders.parameters(), *parts.vae.parameters()]
    assert all(p.grad is None for p in frozen)
