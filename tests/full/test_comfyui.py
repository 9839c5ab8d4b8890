"""SD1.5's true structure in a real ComfyUI: from CheckpointLoaderSimple to Train LoRA, and the file back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loragraft.trainer import api
from loragraft.trainer.families.names import ldm_keys
from loragraft_tests.comfyui import prompts
from loragraft_tests.comfyui.harness import Comfy
from loragraft_tests.full.common import DATASET, MODULES, SETTINGS, TOLERANCE, Trained

pytestmark = [pytest.mark.full, pytest.mark.comfy]

BASE: dict[str, Any] = {"base": prompts.node("CheckpointLoaderSimple", ckpt_name="full_size.safetensors")}
BUCKETS = {"min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64}  # as by default
SOCKETS: dict[str, Any] = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2]}


def comfyui_names(base: api.Base) -> dict[str, str]:
    """Map ComfyUI's weight names to the LoRA file's module names, through our own key tables only."""
    parts = base.load()
    unet = {old: new for new, old in ldm_keys.unet_to_ldm(parts.denoiser.state_dict()).items()}
    names = {}
    for target in base.family.targets(parts, convolutions=False):
        weight = f"{target.path}.weight"
        if target.part == "denoiser":
            names[f"diffusion_model.{unet[weight]}"] = target.key
        else:
            inner = weight if weight.startswith("text_model.") else f"text_model.{weight}"
            names[f"clip_l.transformer.{inner}"] = target.key
    return names


def apply(server: Comfy, base: api.Base, lora: str, folder: Path) -> dict[str, Any]:
    """Load a LoRA through the native LoraLoader and return the probe's report."""
    names = folder / "names.json"
    names.write_text(json.dumps(comfyui_names(base)), encoding="utf-8")
    graph = {
        **BASE,
        "lora": prompts.node(
            "LoraLoader",
            model=["base", 0],
            clip=["base", 1],
            lora_name=lora,
            strength_model=1.0,
            strength_clip=1.0,
        ),
        "delta": prompts.node(
            "ProbeDelta",
            model=["lora", 0],
            clip=["lora", 1],
            lora=str(server.base / "models" / "loras" / lora),
            names=str(names),
        ),
    }
    return prompts.answer(server.run(graph, timeout_s=900), "delta")


def test_comfyui_applies_every_module_equally(server: Comfy, base: api.Base, tmp_path: Path) -> None:
    report = apply(server, base, "headless.safetensors", tmp_path)
    assert report["missing"] == [] and report["unknown"] == [] and report["patched"] == MODULES
    assert "lora key not loaded" not in server.log
    print(f"ComfyUI: {report['patched']} modules, largest relative difference {report['worst'][1]:.1e}")
    assert report["largest"] > 1e-3, "the change must have a size, or equality shows nothing"
    assert report["worst"][1] <= TOLERANCE


def test_train_lora_works_on_the_loaders_own_weights(server: Comfy, base: api.Base) -> None:
    graph = {**BASE, "share": prompts.node("ProbeShare", **SOCKETS, tag="full")}
    report = prompts.answer(server.run(graph, timeout_s=900), "share")
    assert report["count"] == 686 + 248 + 196
    assert report["copied"] == [] and report["inference"] == []
    assert report["hash"] == base.weights_hash, "a host's upcast copy is the same base as the file"


def test_the_graph_gives_the_headless_lora(
    server: Comfy, base: api.Base, trained: Trained, tmp_path: Path
) -> None:
    loaded = {**BASE, "memory": prompts.node("ProbeResident", tag="before", after=["base", 0])}
    before = prompts.answer(server.run(loaded, timeout_s=900), "memory")
    graph = {
        **BASE,
        **prompts.dataset_nodes("noise", **DATASET, **BUCKETS),
        "train": prompts.node(
            "LoraGraftTrainLoRA",
            **SOCKETS,
            train_set=["build", 0],
            **{**prompts.TRAIN, "train_batch_size": 1, **SETTINGS, "output_name": "in_graph"},
        ),
        "memory": prompts.node("ProbeResident", tag="after", after=["train", 3]),
    }
    outputs = server.run(graph, timeout_s=1800)
    after = prompts.answer(outputs, "memory")
    print(
        f"ComfyUI with the checkpoint loaded: {before['now']:.0f} MiB (tensors {before['tensors']:.0f}); "
        f"after training {after['now']:.0f} MiB (tensors {after['tensors']:.0f}), "
        f"{after['kept']:.0f} with what the C library keeps; peak {after['peak']:.0f} MiB"
    )
    theirs = api.lora_tensors(server.base / "models" / "loras" / "in_graph.safetensors")
    ours = api.lora_tensors(trained.lora)
    assert theirs.keys() == ours.keys()
    assert all(bool((theirs[k] == ours[k]).all()) for k in ours), "graph and headless differ"
    report = apply(server, base, "in_graph.safetensors", tmp_path)
    assert report["patched"] == MODULES and report["worst"][1] <= TOLERANCE
    assert "lora key not loaded" not in server.log
    # what stays is the LoRA on the outputs, not a second copy of the weights (4.3 GB)
    assert after["tensors"] - before["tensors"] < 200
    assert after["now"] - before["now"] < 500


def picture(server: Comfy, graph: dict[str, Any], prefix: str) -> np.ndarray[Any, Any]:
    """Draw two steps of a small picture from ``base``'s sockets, natively."""
    drawing = prompts.native_prompt(None, prefix=prefix, steps=2, width=256, height=256)
    last = "lora" if "lora" in graph else "base"
    drawing |= graph
    drawing["sampled"]["inputs"]["model"] = [last, 0]
    for name in ("positive", "negative"):
        drawing[name]["inputs"]["clip"] = [last, 1]
    (image,) = server.run(drawing, timeout_s=900)["save"]["images"]
    return np.asarray(Image.open(io.BytesIO(server.view(image))).convert("RGB")).astype(int)


def test_the_native_loader_reads_a_finetuned_model(server: Comfy, base: api.Base, images: Path) -> None:
    """Some layers are enough: training all of them takes 14 GB."""
    models = server.base / "models"
    places = api.Places(server.base / "runs", models / "loras", server.base / "cache", models / "checkpoints")
    whole = {"algo": "full", "preset": "everything", "save_as": "checkpoint", "network_train_unet_only": True}
    chosen = {"train_modules": ["conv_in$", "mid_block.*attn2", "norm"], "learning_rate": 1e-3}
    data, config = api.make_both({**DATASET, **SETTINGS, **whole, **chosen, "output_name": "finetuned"})
    train_set = api.build_train_set(api.scan_folder(images), data)
    (*_, finished) = api.train(base, train_set, config, places=places, device="cpu")
    assert isinstance(finished, api.Finished) and finished.model_file is not None
    size = finished.model_file.stat().st_size
    assert 2.1e9 < size < 2.2e9, "the base in half precision"
    model = {"base": prompts.node("CheckpointLoaderSimple", ckpt_name="finetuned.safetensors")}
    lora = prompts.node(
        "LoraLoader",
        model=["base", 0],
        clip=["base", 1],
        lora_name="finetuned.safetensors",
        strength_model=1.0,
        strength_clip=1.0,
    )
    alone = picture(server, model, "model")
    with_file = picture(server, {**BASE, "lora": lora}, "file")
    plain = picture(server, BASE, "plain")
    finished.model_file.unlink()
    assert "lora key not loaded" not in server.log
    assert np.abs(plain - with_file).max() > 3 * np.abs(alone - with_file).max()
    assert np.abs(alone - with_file).mean() < 1, "but for the files' half precision"
