"""Transformers at their true width in a real ComfyUI, from files as people keep them, texts in true size."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loragraft.trainer import api
from loragraft_tests.comfyui import harness, prompts
from loragraft_tests.full import full_size, full_transformers
from loragraft_tests.full.common import DATASET, SETTINGS

pytestmark = [pytest.mark.full, pytest.mark.comfy]

PACK = Path(__file__).resolve().parents[2]
BF16 = ("--bf16-unet",)  # a ComfyUI on a CPU would hold it in fp32
SOCKETS: dict[str, Any] = {"model": ["unet", 0], "clip": ["clip", 0], "vae": ["vae", 0]}
BUCKETS = {"min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64}
# family -> modules that a LoRA trains in two blocks of each kind
MODULES = {"flux": 2 * 10 + 2 * 3, "flux2": 2 * 8 + 2 * 2, "z_image": 2 * 5, "qwen_image": 2 * 12 - 4}
GROWTH_MIB, PEAK_GIB = 100, 24
NEAR = 2e-2  # both compute in bfloat16, of which a value has 8 bits


def loaders(family: str) -> prompts.Prompt:
    """Return ComfyUI's nodes that load a family from its files."""
    wide = full_transformers.FAMILIES[family]
    vae = f"{wide.parts['vae'].__name__}.safetensors"
    texts = [f"{text}.safetensors" for text in wide.texts]
    names = {"clip_name": texts[0]} if len(texts) == 1 else {"clip_name1": texts[0], "clip_name2": texts[1]}
    loader = "CLIPLoader" if len(texts) == 1 else "DualCLIPLoader"
    return {
        "unet": prompts.node("UNETLoader", unet_name=f"{family}.safetensors", weight_dtype="default"),
        "clip": prompts.node(loader, **names, type=wide.kind),
        "vae": prompts.node("VAELoader", vae_name=vae),
    }


@pytest.fixture(scope="module", params=full_transformers.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Return a family's name."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def server(
    comfyui: Path, images: Path, family: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[harness.Comfy]:
    """Return a running ComfyUI with this pack, the probes, a family's files (4 to 10 GB) and images."""
    if reason := harness.cannot_run():
        pytest.skip(reason)
    base = tmp_path_factory.mktemp(f"comfyui_{family}")
    files = full_transformers.write_files(family, full_size.scratch(tmp_path_factory.mktemp(family)))
    links = {
        "custom_nodes/probe": PACK / "tests" / "comfyui" / "probe",
        "custom_nodes/probe_full": PACK / "tests" / "full" / "probe",
        **{f"models/{file}.safetensors": path for file, path in files.items()},
    }
    for name, target in links.items():
        link = base / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target, target_is_directory=target.is_dir())
    shutil.copytree(images, base / "input" / "noise")
    with harness.Comfy.start(comfyui, base, PACK, args=BF16) as running:
        yield running


def test_every_weight_is_the_hosts(server: harness.Comfy, family: str) -> None:
    graph = {
        **loaders(family),
        "share": prompts.node("ProbeShare", **SOCKETS, tag=family),
        "growth": prompts.node("ProbeGrowth", **SOCKETS),
    }
    outputs = server.run(graph, timeout_s=900)
    shared, growth = prompts.answer(outputs, "share"), prompts.answer(outputs, "growth")
    print(f"{family}: {shared['count']} tensors shared, {growth['grown']:.0f} MiB more resident")
    files = full_transformers.in_files(family)
    tied = "text_encoders/t5xxl" in files  # its word table has two names
    assert shared["family"] == family
    assert shared["count"] == sum(map(len, files.values())) + tied
    assert all("norm" in name or name.endswith(".bias") for name in shared["copied"])  # vectors in fp8
    assert shared["copied_matrices"] == [] and shared["inference"] == []
    assert growth["dtypes"] == ["torch.bfloat16"] and growth["grown"] < GROWTH_MIB


def test_host_and_trainer_compute_the_same(server: harness.Comfy, family: str) -> None:
    graph = {**loaders(family), "near": prompts.node("ProbeNear", **SOCKETS, text="a large red circle")}
    report = prompts.answer(server.run(graph, timeout_s=900), "near")
    print(family, report)
    assert report["text"] < NEAR and report["denoised"] < NEAR


def test_one_step_fits(server: harness.Comfy, family: str) -> None:
    settings = {
        "max_train_steps": 1,
        "train_batch_size": 1,
        "mixed_precision": "bf16",
        "network_dim": 16,
        "network_alpha": 8.0,
        "output_name": family,
    }
    graph = {
        **loaders(family),
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
    lora = api.lora_tensors(server.base / "models" / "loras" / f"{family}.safetensors")
    print(f"{family}: at most {memory['peak'] / 1024:.1f} GiB in ComfyUI, {len(lora)} tensors saved")
    assert len(lora) == 3 * MODULES[family] and "lora key not loaded" not in server.log
    assert memory["peak"] / 1024 < PEAK_GIB
