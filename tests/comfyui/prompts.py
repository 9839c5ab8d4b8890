"""API-format prompts for the host tests; every graph is small enough for two slow cores."""

from __future__ import annotations

import json
from typing import Any

Prompt = dict[str, dict[str, Any]]

# Required widgets of Train LoRA with values for a tiny, quick run; a test changes what it is about.
TRAIN: dict[str, Any] = {
    "output_name": "blorb",
    "network_dim": 4,
    "network_alpha": 4.0,
    "learning_rate": 1e-3,
    "unet_lr": -1,
    "text_encoder_lr": -1,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "max_train_steps": 4,
    "max_train_epochs": 0,
    "train_batch_size": 2,
    "min_snr_gamma": 0,
    "mixed_precision": "fp32",
    "clip_skip": 1,
    "seed": 7,
    "save_every_n_epochs": 0,
    "sample_prompts": "",
    "preview_image": False,
}
BUILD: dict[str, Any] = {
    "resolution": 64,
    "enable_bucket": True,
    "shuffle_caption": False,
    "keep_tokens": 0,
    "caption_dropout_rate": 0.0,
    "min_bucket_reso": 32,
    "max_bucket_reso": 128,
    "bucket_reso_steps": 32,
}
PREVIEW: dict[str, Any] = {
    "lora_name": ["train", 4],
    "prompts": "a red circle",
    "negative": "",
    "seeds": "3",
    "strengths": "0, 0.8",
    "clip_strengths": "same",
    "sampler_name": "euler",
    "scheduler": "normal",
    "steps": 3,
    "cfg": 4.0,
    "width": 64,
    "height": 64,
    "batch_size": 1,
    "save_grid": True,
}


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """Return one node of an API-format prompt."""
    return {"class_type": class_type, "inputs": inputs}


def dataset_nodes(path: str = "[demo]", **build: Any) -> Prompt:
    """Return Load Image Folder and Build Dataset."""
    return {
        "folder": node(
            "LoraGraftLoadImageFolder",
            path=path,
            recursive=True,
            class_tokens="",
            default_repeats=1,
            on_bad="stop",
        ),
        "build": node("LoraGraftBuildDataset", dataset=["folder", 0], **{**BUILD, **build}),
    }


def train_prompt(path: str = "[demo]", **settings: Any) -> Prompt:
    """Return the demo graph up to Train LoRA."""
    return {
        "base": node("LoraGraftLoadDemoBase"),
        **dataset_nodes(path),
        "train": node(
            "LoraGraftTrainLoRA",
            model=["base", 0],
            clip=["base", 1],
            vae=["base", 2],
            train_set=["build", 0],
            **{**TRAIN, **settings},
        ),
    }


def preview_node(**settings: Any) -> dict[str, Any]:
    """Return Preview with LoRA on the demo base."""
    sockets = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2]}
    return node("LoraGraftPreviewWithLoRA", **{**sockets, **PREVIEW, **settings})


def demo_prompt(train: dict[str, Any] | None = None, preview: dict[str, Any] | None = None) -> Prompt:
    """Return the whole demo graph: from a folder of images to a grid."""
    return {**train_prompt(**(train or {})), "preview": preview_node(**(preview or {}))}


def native_prompt(lora: dict[str, Any] | None, *, prefix: str, **settings: Any) -> Prompt:
    """Return the native way to one preview cell, from Load LoRA to Save Image.

    ``lora`` holds LoraLoader's widgets, or None for the base alone.
    """
    s = {**PREVIEW, **settings}
    model, clip = ["base", 0], ["base", 1]
    graph: Prompt = {"base": node("LoraGraftLoadDemoBase")}
    if lora is not None:
        graph["lora"] = node("LoraLoader", model=model, clip=clip, **lora)
        model, clip = ["lora", 0], ["lora", 1]
    return graph | {
        "positive": node("CLIPTextEncode", clip=clip, text=s["prompts"]),
        "negative": node("CLIPTextEncode", clip=clip, text=s["negative"]),
        "latent": node("EmptyLatentImage", width=s["width"], height=s["height"], batch_size=s["batch_size"]),
        "sampled": node(
            "KSampler",
            model=model,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=int(s["seeds"]),
            steps=s["steps"],
            cfg=s["cfg"],
            sampler_name=s["sampler_name"],
            scheduler=s["scheduler"],
            denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampled", 0], vae=["base", 2]),
        "save": node("SaveImage", images=["decoded", 0], filename_prefix=prefix),
    }


def answer(outputs: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the JSON that a probe node answered with."""
    found: dict[str, Any] = json.loads(outputs[name]["text"][0])
    return found
