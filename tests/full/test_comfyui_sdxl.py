"""SDXL's true structure in a real ComfyUI that holds it in bf16: nothing is copied, and it trains."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer import api
from loragraft_tests.comfyui import harness, prompts
from loragraft_tests.full import full_sdxl, full_size
from loragraft_tests.full.common import DATASET, SETTINGS

pytestmark = [pytest.mark.full, pytest.mark.comfy]

PACK = Path(__file__).resolve().parents[2]
BF16 = ("--bf16-unet", "--bf16-text-enc", "--bf16-vae")  # a ComfyUI on a CPU would hold it in fp32
BASE: dict[str, Any] = {"base": prompts.node("CheckpointLoaderSimple", ckpt_name="sdxl.safetensors")}
SOCKETS: dict[str, Any] = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2]}
BUCKETS = {"min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64}
NUM_TENSORS = 1680 + 248 + 196 + 517
NUM_MODULES = 722 + 264
GROWTH_MIB, PEAK_GIB = 100, 24


@pytest.fixture(scope="module")
def server(
    comfyui: Path, images: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[harness.Comfy]:
    """Return a running ComfyUI with this pack, the probes, the checkpoint (7 GB) and images."""
    if reason := harness.cannot_run():
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("comfyui_sdxl")
    scratch = full_size.scratch(tmp_path_factory.mktemp("sdxl"))
    links = {
        "custom_nodes/probe": PACK / "tests" / "comfyui" / "probe",
        "custom_nodes/probe_full": PACK / "tests" / "full" / "probe",
        "models/checkpoints/sdxl.safetensors": full_sdxl.write_checkpoint(scratch),
    }
    for name, target in links.items():
        link = base / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target, target_is_directory=target.is_dir())
    shutil.copytree(images, base / "input" / "noise")
    with harness.Comfy.start(comfyui, base, PACK, args=BF16) as running:
        yield running


def test_every_weight_is_the_hosts(server: harness.Comfy) -> None:
    graph = {
        **BASE,
        "share": prompts.node("ProbeShare", **SOCKETS, tag="sdxl"),
        "growth": prompts.node("ProbeGrowth", **SOCKETS),
    }
    outputs = server.run(graph, timeout_s=900)
    shared, growth = prompts.answer(outputs, "share"), prompts.answer(outputs, "growth")
    print(f"{shared['count']} tensors shared, {growth['grown']:.0f} MiB more resident")
    assert shared["family"] == "sdxl" and shared["count"] == NUM_TENSORS
    assert shared["copied"] == [] and shared["inference"] == []
    assert growth["dtypes"] == ["torch.bfloat16"] and growth["grown"] < GROWTH_MIB


def test_one_step_fits(server: harness.Comfy) -> None:
    settings = {
        "max_train_steps": 1,
        "train_batch_size": 1,
        "mixed_precision": "bf16",
        "network_dim": 16,
        "network_alpha": 8.0,
        "output_name": "sdxl",
    }
    graph = {
        **BASE,
        **prompts.dataset_nodes("noise", **DATASET, **BUCKETS),
        "train": prompts.node(
            "LoraGraftTrainLoRA",
            **SOCKETS,
            train_set=["build", 0],
            **{**prompts.TRAIN, **SETTINGS, **settings},
        ),
        "memory": prompts.node("ProbeResident", tag="after", after=["train", 3]),
    }
    memory = prompts.answer(server.run(graph, timeout_s=1800), "memory")
    lora = api.lora_tensors(server.base / "models" / "loras" / "sdxl.safetensors")
    print(f"at most {memory['peak'] / 1024:.1f} GiB resident in ComfyUI, {len(lora)} tensors saved")
    assert len(lora) == 3 * NUM_MODULES and "lora key not loaded" not in server.log
    assert memory["peak"] / 1024 < PEAK_GIB
