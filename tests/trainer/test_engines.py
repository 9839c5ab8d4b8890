"""Fused steps are eager ones: fifty of them on the demo base, and on a transformer of Flux's structure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.trainer import api
from loragraft.trainer.adapters import network
from loragraft.trainer.adapters.fused import fuse
from loragraft.trainer.engine.precision import Precision
from loragraft.trainer.engine.steps import Eager, Engine, Fused, Micro
from loragraft.trainer.parts import Target
from loragraft_tests.trainer import tiny

CPU = torch.device("cpu")
STEPS = 50
LATENTS, CHANNELS, TEXT = 16, 8, 12


def flux() -> nn.Module:
    """Return a tiny random transformer of Flux's structure: double and single blocks."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return model.requires_grad_(False)


def targets_of(model: nn.Module) -> list[Target]:
    return [
        Target("denoiser", path, "lora_unet_" + path.replace(".", "_"), "linear")
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks" in path
    ]


def flux_losses(kind: str) -> list[float]:
    """Train a LoRA on every linear layer of the blocks towards the straight way from noise to data."""
    parts = tiny.parts_of(flux(), nn.Identity(), nn.Identity())
    targets = targets_of(parts.denoiser)
    adapter = network.inject(parts, network.Settings(4, 4.0, None, 1.0, seed=1), targets)
    assert len(adapter.modules) == 2 * 14 + 2 * 6
    optimizer = torch.optim.AdamW(adapter.parameters("denoiser"), lr=1e-3, fused=True)
    ids = torch.zeros(LATENTS, 3)
    ids[:, 1] = torch.arange(LATENTS)

    def losses_of(rows: tuple[int, ...], tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        data, noise, t, text = (x for x in tensors if x is not None)
        noisy = (1 - t[:, None, None]) * data + t[:, None, None] * noise
        pred = parts.denoiser(
            hidden_states=noisy,
            timestep=t,
            guidance=torch.ones_like(t),
            pooled_projections=text.mean(1),
            encoder_hidden_states=text,
            img_ids=ids,
            txt_ids=torch.zeros(text.shape[1], 3),
        ).sample
        return (pred - (noise - data)).square().mean(dim=(1, 2)).view(len(rows), -1).mean(dim=1)

    engine: Engine
    if kind == "eager":
        engine = Eager(losses_of, [optimizer], [Precision("fp32", CPU).scaler()], CPU, False)
    else:
        flat, banks = fuse(parts, [adapter], torch.float32)
        engine = Fused(losses_of, [optimizer], flat, banks, CPU, False)
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(STEPS):
        shapes = ((2, LATENTS, CHANNELS), (2, LATENTS, CHANNELS))
        data, noise = (torch.randn(shape, generator=generator) for shape in shapes)
        t = torch.rand(2, generator=generator)
        text = torch.randn(2, 5, TEXT, generator=generator)
        (loss,) = engine.backward([Micro(0, (data, noise, t, text), 1)])
        engine.update(0, 1.0)
        found.append(loss.item())
    return found


def test_on_a_transformer_of_fluxs_structure() -> None:
    eager, fused = flux_losses("eager"), flux_losses("fused")
    assert fused == pytest.approx(eager, rel=1e-4)
    assert max(eager) != min(eager)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"conv_dim": 8, "conv_alpha": 4.0}], ids=["LoRA", "LoCon"])
def test_on_the_demo_base(tmp_path: Path, settings: dict[str, Any]) -> None:
    from loragraft.trainer.demo.run import DATASET, TRAINING

    base = api.open_demo_base()
    losses = {}
    for engine in ("eager", "fused"):
        common = {"max_train_steps": STEPS, "train_batch_size": 2, "save_every_n_steps": None}
        more = {"engine": engine, "preview_image": False, "output_name": "x", **settings}
        data, config = api.make_both({**DATASET, **TRAINING, **common, **more})
        train_set = api.build_train_set(api.scan_folder(api.demo_dataset()), data)
        root = tmp_path / engine
        places = api.Places(root / "runs", root / "loras", tmp_path / "cache")
        *_, last = api.train(base, train_set, config, places=places, device="cpu")
        assert isinstance(last, api.Finished)
        losses[engine] = list(last.losses)
    assert losses["fused"] == pytest.approx(losses["eager"], rel=1e-4)
