"""Flux.1 dev at its true width in a real ComfyUI, from four files, T5 in its true size."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer import api
from loragraft_tests.comfyui import harness, prompts
from loragraft_tests.full import full_flux, full_size
from loragraft_tests.full.common import DATASET, SETTINGS

pytestmark = [pytest.mark.full, pytest.mark.comfy]

PACK = Path(__file__).resolve().parents[2]
BF16 = ("--bf16-unet",)  # a ComfyUI on a CPU would hold it in fp32
BASE: dict[str, Any] = {
    "unet": prompts.node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default"),
    "clip": prompts.node(
        "DualCLIPLoader", clip_name1="t5xxl.safetensors", clip_name2="clip_l.safetensors", type="flux"
    ),
    "vae": prompts.node("VAELoader", vae_name="ae.safetensors"),
}
SOCKETS: dict[str, Any] = {"model": ["unet", 0], "clip": ["clip", 0], "vae": ["vae", 0]}
BUCKETS = {"min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64}
GROWTH_MIB, PEAK_GIB = 100, 24


@pytest.fixture(scope="module")
def server(comfyui: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[harness.Comfy]:
    """Return a running ComfyUI with this pack, the probes, the four files (8 GB) and images."""
    if reason := harness.cannot_run():
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("comfyui_flux")
    files = full_flux.write_files(full_size.scratch(tmp_path_factory.mktemp("flux")))
    links = {
        "custom_nodes/probe": PACK / "tests" / "comfyui" / "probe",
        "custom_nodes/probe_full": PACK / "tests" / "full" / "probe",
        **{f"models/{full_flux.FILES[part][0]}/{part}.safetensors": path for part, path in files.items()},
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
        "share": prompts.node("ProbeShare", **SOCKETS, tag="flux"),
        "growth": prompts.node("ProbeGrowth", **SOCKETS),
    }
    outputs = server.run(graph, timeout_s=900)
    shared, growth = prompts.answer(outputs, "share"), prompts.answer(outputs, "growth")
    print(f"{shared['count']} tensors shared, {growth['grown']:.0f} MiB more resident")
    assert shared["family"] == "flux"
    assert shared["count"] == full_flux.num_tensors() + 1  # T5's word table has two names
    assert all(
        ".layer_norm." in name or "final_layer_norm" in name for name in shared["copied"]
    )  # fp8 vectors
    assert shared["copied_matrices"] == [] and shared["inference"] == []
    assert growth["dtypes"] == ["torch.bfloat16"] and growth["grown"] < GROWTH_MIB


def test_one_step_fits(server: harness.Comfy) -> None:
    settings = {
        "max_train_steps": 1,
        "train_batch_size": 1,
        "mixed_precision": "bf16",
        "network_dim": 16,
        "network_alpha": 8.0,
        "output_name": "flux",
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
    lora = api.lora_tensors(server.base / "models" / "loras" / "flux.safetensors")
    print(f"at most {memory['peak'] / 1024:.1f} GiB resident in ComfyUI, {len(lora)} tensors saved")
    assert len(lora) == 3 * full_flux.MODULES and "lora key not loaded" not in server.log
    assert memory["peak"] / 1024 < PEAK_GIB
