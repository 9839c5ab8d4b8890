"""Flux.1 dev at its true width with two blocks of each kind: a host's weights are shared, and it trains."""

from __future__ import annotations

import gc
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft.trainer.families.names.flux_keys import CLIP_PREFIX, T5_PREFIX
from loragraft.trainer.families.names.ldm_keys import UNET_PREFIX, VAE_PREFIX
from loragraft_tests.full import full_flux
from loragraft_tests.full.random_values import Values
from loragraft_tests.trainer import tiny, tiny_flux, tiny_t5

pytestmark = pytest.mark.full

SIDE, TOKENS = 256, 64
GROWTH_MB = 100


def resident_mb() -> float:
    """Return how much memory the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def as_comfyui_holds_them() -> dict[str, torch.Tensor]:
    """Return weights under the names of ComfyUI's modules; text encoders are as wide, not as deep."""
    clip = full_flux.clip(layers=2, words=tiny.VOCABULARY)
    t5 = full_flux.t5(layers=1, words=tiny_t5.VOCABULARY, inside=1024)
    parts = {
        UNET_PREFIX: ("flux", full_flux.transformer(), torch.bfloat16),
        VAE_PREFIX: ("ae", full_flux.vae(), torch.float32),
        CLIP_PREFIX: ("clip_l", clip, torch.bfloat16),
        T5_PREFIX: ("t5xxl", t5, torch.bfloat16),
    }
    held: dict[str, torch.Tensor] = {}
    for prefix, (part, module, dtype) in parts.items():
        values = Values(0, dtype)
        for name, tensor in full_flux.named(part, module).items():
            held[prefix + name] = values.of(name, tensor.shape)
    return held


@pytest.fixture(scope="module")
def held() -> dict[str, torch.Tensor]:
    """Return the weights that a host holds, 2.5 GB."""
    return as_comfyui_holds_them()


@pytest.fixture(scope="module")
def flux(held: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> api.Base:
    """Return the opened base model."""
    folders = tiny_flux.write_tokenizers(tmp_path_factory.mktemp("tokenizers"))
    return api.open_base_from_weights(held, name="wide", tokenizers=folders.by_kind)


def test_the_hosts_memory_is_shared(held: dict[str, torch.Tensor], flux: api.Base) -> None:
    gc.collect()
    before = resident_mb()
    parts = flux.load()
    grown = resident_mb() - before
    print(f"{sum(t.nbytes for t in held.values()) / 2**20:.0f} MB are shared; {grown:.0f} MB more are held")
    assert grown < GROWTH_MB
    known = {tensor.data_ptr() for tensor in held.values()}
    modules = (parts.denoiser, parts.vae, *parts.text_encoders.values())
    assert all(p.data_ptr() in known for module in modules for p in module.parameters())


def test_a_step_trains_every_module(flux: api.Base, tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "images" / "1_zibu", [(SIDE, SIDE)])
    data = api.make(api.DatasetConfig, {"resolution": SIDE})
    train_set = api.build_train_set(api.scan_folder(tmp_path / "images"), data)
    settings: dict[str, Any] = {
        "output_name": "wide",
        "network_dim": 16,
        "learning_rate": 1e-4,
        "max_train_steps": 1,
        "mixed_precision": "bf16",
        "t5xxl_max_token_length": TOKENS,
        "preview_image": False,
    }
    places = api.Places(tmp_path / "runs", tmp_path / "loras", tmp_path / "cache")
    config = api.make(api.TrainConfig, settings)
    events = list(api.train(flux, train_set, config, places=places, device="cpu"))
    (step,) = (e for e in events if isinstance(e, api.Step))
    planned = next(e for e in events if isinstance(e, api.Planned))
    saved = [e for e in events if isinstance(e, api.Saved)]
    peak = _peak_mb()
    print(f"one step at {SIDE}: loss {step.loss:.3f}, at most {peak:.0f} MB held")
    assert planned.num_modules == full_flux.MODULES
    assert math.isfinite(step.loss) and 0.1 < step.loss < 10
    assert saved[-1].num_tensors == 3 * full_flux.MODULES and saved[-1].zero_tensors == 0
    assert peak < 24 * 1024


def _peak_mb() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
