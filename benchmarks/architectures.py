"""The architectures that are measured: their files, and what a peer calls them. Nothing here needs torch.

Weights are random: speed and memory do not depend on them. The shapes are those of the published models,
in `shapes.py`; the files are written in `prepare.py`, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ONE_FILE: Mapping[str, str] = {"checkpoint": ""}
# Files of a model whose parts people keep apart, and what is taken from the names of a complete checkpoint.
FLUX_FILES: Mapping[str, str] = {
    "checkpoint": "model.diffusion_model.",
    "vae": "vae.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
}
FLUX_OPTIONS: Mapping[str, Any] = {
    "network_module": "networks.lora_flux",
    "guidance_scale": 1.0,
    "timestep_sampling": "shift",
    "discrete_flow_shift": 3.1582,
    "model_prediction_type": "raw",
    "cache_text_encoder_outputs": True,
}
SMALLEST: Mapping[str, Any] = {"gradient_checkpointing": True}


@dataclass(frozen=True)
class Architecture:
    """One model; ``sizes`` are arguments of its function in `shapes.py`, named by ``shapes``.

    ``script`` and ``options`` are kohya's, with its fastest documented options for the same work.
    ``settings`` are ours and kohya's alike. ``smallest`` are the settings of the trainers that are to take
    as little memory as they can. ``dtype`` is that of the file.
    """

    title: str
    family: str
    shapes: str
    script: str
    dtype: str = "bfloat16"
    files: Mapping[str, str] = field(default_factory=lambda: ONE_FILE)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 16
    alpha: float = 8.0
    smallest: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


CLIP_NAME = "openai_clip-vit-large-patch14"  # a hub name, as kohya's folder of tokenizers has it
FLUX_SMALLEST: Mapping[str, Mapping[str, Any]] = {
    "ours smallest": {**SMALLEST, "base_storage": "nf4", "blocks_to_swap": 28},
    "kohya smallest": {**SMALLEST, "fp8_base": True, "blocks_to_swap": 28},  # its documentation's for 8 GB
}


def _flux(title: str, double: int, single: int, **settings: Any) -> Architecture:
    return Architecture(
        title=title,
        family="flux",
        shapes="flux",
        script="flux_train_network.py",
        files=FLUX_FILES,
        sizes={"double": double, "single": single},
        tokenizers={"clip": (CLIP_NAME,), "t5": ("google_t5-v1_1-xxl",)},
        options=FLUX_OPTIONS,
        settings=settings,
        smallest=FLUX_SMALLEST if double + single > 40 else {},
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    "sd15": Architecture(
        title="SD1.5",
        family="sd15",
        shapes="sd15",
        script="train_network.py",
        dtype="float16",
        tokenizers={"clip": (CLIP_NAME,)},
        options={"network_module": "networks.lora"},
        rank=32,
        alpha=16.0,
        smallest={
            "ours smallest": {**SMALLEST, "base_storage": "nf4"},
            "kohya smallest": {**SMALLEST, "fp8_base": True},
        },
    ),
    "sdxl": Architecture(
        title="SDXL",
        family="sdxl",
        shapes="sdxl",
        script="sdxl_train_network.py",
        tokenizers={"clip": (CLIP_NAME, "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k")},
        options={"network_module": "networks.lora", "cache_text_encoder_outputs": True},
        smallest={
            "ours smallest": {**SMALLEST, "base_storage": "fp8"},
            "kohya smallest": {**SMALLEST, "fp8_base": True},
        },
    ),
    "flux": _flux("Flux.1 dev", 19, 38),
    # of true width, for machines with less room: 5 GB instead of 24
    "flux-4-8": _flux("Flux.1 dev with 4 and 8 blocks", 4, 8),
    "flux-1-2": _flux("Flux.1 dev with 1 and 2 blocks", 1, 2, t5xxl_max_token_length=128),
}
