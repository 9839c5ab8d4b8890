"""Flux.1 dev at its true width with two blocks of each kind: a host's weights are shared, and it trains."""

from __future__ import annotations

import gc
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.trainer import api
from loragraft_tests.full import full_transformers
from loragraft_tests.full.random_values import Values
from loragraft_tests.trainer import tiny, tiny_flux, tiny_t5

pytestmark = pytest.mark.full

SIDE, TOKENS = 256, 64
MODULES = 2 * 10 + 2 * 3
GROWTH_MB = 100


def resident_mb() -> float:
    """Return how much memory the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def as_comfyui_holds_them() -> dict[str, torch.Tensor]:
    """Return weights under the names of ComfyUI's modules; text encoders are as wide, not as deep."""
    parts = {
        **full_transformers.FAMILIES["flux"].parts,
        "text_encoder": partial(full_transformers.clip, layers=2, words=tiny.VOCABULARY),
        "text_encoder_2": partial(full_transformers.t5, layers=1, words=tiny_t5.VOCABULARY, inside=1024),
    }
    values = Values(0, torch.bfloat16)
    named = full_transformers.named("flux", parts)
    return {name: values.of(name, named[name].shape) for name in named}


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
    assert planned.num_modules == MODULES
    assert math.isfinite(step.loss) and 0.1 < step.loss < 10
    assert saved[-1].num_tensors == 3 * MODULES and saved[-1].zero_tensors == 0
    assert peak < 24 * 1024


def _peak_mb() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
