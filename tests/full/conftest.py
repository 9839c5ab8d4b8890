"""The random full-size checkpoint, a LoRA trained on it headless, and a ComfyUI that holds both."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.comfyui import harness
from loragraft_tests.full import full_size
from loragraft_tests.full.common import DATASET, SETTINGS, SIDE, Trained
from loragraft_tests.trainer import tiny

PACK = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the random full-size checkpoint (2.1 GB)."""
    return full_size.write_checkpoint(full_size.scratch(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of noise images with captions."""
    return tiny.write_images(tmp_path_factory.mktemp("images") / "4_zibu", [(SIDE, SIDE)] * 2).parent


@pytest.fixture(scope="session")
def tokenizer() -> Path:
    """Return CLIP's tokenizer, which a ComfyUI brings."""
    try:
        return Path(api.find_tokenizer(None))
    except LoraGraftError as error:
        pytest.skip(f"{error.what} {error.fix}")


@pytest.fixture(scope="session")
def base(checkpoint: Path, tokenizer: Path) -> api.Base:
    """Return the checkpoint opened headless."""
    return api.open_base(checkpoint, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def trained(base: api.Base, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train two steps headless."""
    out = tmp_path_factory.mktemp("headless")
    places = api.Places(runs=out / "runs", loras=out / "loras", cache=out / "cache")
    data, config = api.make_both({**DATASET, **SETTINGS})
    train_set = api.build_train_set(api.scan_folder(images), data)
    events = list(api.train(base, train_set, config, places=places, device="cpu"))
    assert isinstance(events[-1], api.Finished)
    return Trained(events[-1].lora_file, events)


@pytest.fixture(scope="session")
def server(
    comfyui: Path, checkpoint: Path, images: Path, trained: Trained, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[harness.Comfy]:
    """Return a running ComfyUI with this pack, the probes, the checkpoint, images and the headless LoRA."""
    if reason := harness.cannot_run():
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("comfyui")
    links = {
        "custom_nodes/probe": PACK / "tests" / "comfyui" / "probe",
        "custom_nodes/probe_full": PACK / "tests" / "full" / "probe",
        "models/checkpoints/full_size.safetensors": checkpoint,
        "models/loras/headless.safetensors": trained.lora,
    }
    for name, target in links.items():
        link = base / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target, target_is_directory=target.is_dir())
    shutil.copytree(images, base / "input" / "noise")  # the path gate refuses links out of the input folder
    with harness.Comfy.start(comfyui, base, PACK) as running:
        yield running
