"""What the trainer's tests share: one tiny random base model, its tokenizer, and a few noise images."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loragraft.trainer import api
from loragraft.trainer.engine import attention_choice
from loragraft_tests.trainer import runs, tiny, tiny_sdxl
from loragraft_tests.trainer.fake_xformers import fake_xformers


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny tokenizer's folder."""
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny base model's single file, fp16."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("base") / "tiny.safetensors")


@pytest.fixture(scope="session")
def base(checkpoint: Path, tokenizer: Path) -> api.Base:
    """Return the opened tiny base model."""
    return api.open_base(checkpoint, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def sdxl_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny SDXL's single file, float32."""
    path = tmp_path_factory.mktemp("sdxl") / "tiny.safetensors"
    return tiny_sdxl.write_checkpoint(path, torch.float32)


@pytest.fixture(scope="session")
def sdxl(sdxl_file: Path, tokenizer: Path) -> api.Base:
    """Return the opened tiny SDXL."""
    return api.open_base(sdxl_file, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of four noise images in three buckets, each used twice an epoch."""
    root = tmp_path_factory.mktemp("images")
    tiny.write_images(root / "2_zibu", [(32, 32), (40, 24), (24, 40), (32, 32)])
    return root


@pytest.fixture(scope="session")
def train_set(images: Path) -> Any:
    """Return the images as they are trained: four batches an epoch at batch size 3, one of them partial."""
    return runs.train_set(images)


@pytest.fixture
def training(base: api.Base, train_set: api.TrainSet, places: api.Places) -> runs.Training:
    """Return runs on the shared base and images, in fresh folders."""
    return runs.Training(base, train_set, places)


@pytest.fixture(scope="session")
def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the tiny base's weights under single-file names, fp16."""
    return load_file(checkpoint)


@pytest.fixture
def xformers() -> Iterator[None]:
    """Return with a working fake of xformers in the process."""
    with fake_xformers():
        yield


@pytest.fixture
def no_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process find no xformers, whatever is installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        attention_choice, "find_spec", lambda name: None if name == "xformers" else real(name)
    )
