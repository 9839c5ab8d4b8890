"""SDXL's true structure, from what a host holds: nothing is copied, and a step fits into 24 GB."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from loragraft.trainer import api
from loragraft_tests.full import full_sdxl
from loragraft_tests.full.common import DATASET, SETTINGS
from loragraft_tests.trainer import tiny

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc"),
]

GROWTH_MB, PEAK_GB = 100, 24
NUM_TENSORS = 1680 + 248 + 196 + 517
NUM_MODULES = 722 + 264
KNOWN_HASH = "-".join("abcd"[i] * 20 for i in range(4))  # reading 7 GB for it would take a minute


def memory(entry: str) -> float:
    """Return VmRSS (resident now) or VmHWM (at most so far) in MB."""
    found = re.search(rf"{entry}:\s*(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    assert found is not None
    return int(found[1]) / 1024


@dataclass(frozen=True)
class Loaded:
    """SDXL on a host's weights, and by how many MB that made the process grow."""

    base: api.Base
    storages: frozenset[int]
    growth: float


@pytest.fixture(scope="module")
def loaded(tokenizer: Path) -> Iterator[Loaded]:
    """Build SDXL's modules on 7 GB of random bf16 weights."""
    base_of = api.open_base_from_weights
    weights = full_sdxl.weights()
    assert len(weights) == NUM_TENSORS
    storages = frozenset(v.untyped_storage().data_ptr() for v in weights.values())
    base = base_of(weights, name="sdxl", tokenizers={"clip": str(tokenizer)}, weights_hash=KNOWN_HASH)
    base.load()  # imports, and the tokenizer's tables
    before = memory("VmRSS")
    parts = base.load()
    yield Loaded(base, storages, memory("VmRSS") - before)
    del parts


def test_every_weight_is_shared(loaded: Loaded) -> None:
    parts = loaded.base.load()
    modules = (parts.denoiser, parts.vae, *parts.text_encoders.values())
    for module in modules:
        for name, weight in module.state_dict().items():
            assert weight.untyped_storage().data_ptr() in loaded.storages, name
            assert weight.dtype == torch.bfloat16
    assert sum(len(module.state_dict()) for module in modules) == NUM_TENSORS
    print(f"resident memory grew by {loaded.growth:.0f} MB")
    assert loaded.growth < GROWTH_MB


def test_a_step_fits(loaded: Loaded, tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "images" / "1_zibu", [(256, 256)]).parent
    own = {"max_train_steps": 1, "network_dim": 16, "network_alpha": 8.0, "mixed_precision": "bf16"}
    data, config = api.make_both({**DATASET, **SETTINGS, **own, "gradient_checkpointing": True})
    train_set = api.build_train_set(api.scan_folder(images), data)
    places = api.Places(tmp_path / "runs", tmp_path / "loras", tmp_path / "cache")
    started = time.perf_counter()
    events = list(api.train(loaded.base, train_set, config, places=places, device="cpu"))
    seconds = time.perf_counter() - started
    planned = next(e for e in events if isinstance(e, api.Planned))
    (step,) = (e for e in events if isinstance(e, api.Step))
    assert planned.num_modules == NUM_MODULES
    assert math.isfinite(step.loss) and 0.3 < step.loss < 10
    saved = [e for e in events if isinstance(e, api.Saved)][-1]
    unread = 6  # of CLIP-L's last layer, which SDXL does not read
    assert saved.num_tensors == 3 * NUM_MODULES and saved.zero_tensors == unread
    peak = memory("VmHWM") / 1024
    print(f"one step in {seconds:.0f} s, at most {peak:.1f} GB resident")
    assert peak < PEAK_GB
