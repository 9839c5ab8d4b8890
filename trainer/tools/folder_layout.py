"""A single file of SD1.x, SD2.x or SDXL as diffusers' folder: a folder for each model, and what it is.

Of other families the folder holds more than the weights tell, so that they stay single files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..engine.packed_tensor import unpacked
from ..errors import LoraGraftError
from ..families import detect, sd2, sd15, sdxl
from ..families.base import Tensors
from ..families.modules import sdxl_unet
from ..families.modules.autoencoder import vae_config
from ..families.modules.unet import unet_config
from ..families.names.unet_kinds import heads_of
from ..families.opening import Base, open_file
from ..families.sources.sources import Source, parts_of
from ..families.sources.weights import Renamed, joined
from ..families.text.clip_text import PROJECTION, text_config
from ..families.text.tokenizers import load_tokenizer
from ..safefile import write_text
from .stream import Form, open_weights, write_stream

Tell = Callable[[int, int], None]
FILES = {"denoiser": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # else TEXT_FILE
TEXT_FILE = "model"
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
VOCABULARY = ("vocab.json", "merges.txt")
TOKENIZER_FILES = (*VOCABULARY, "tokenizer_config.json", "special_tokens_map.json")
OPENCLIP_PAD = "!"  # the token 0, with which OpenCLIP's texts are filled up
KERNEL = (".proj_in.weight", ".proj_out.weight")


@dataclass(frozen=True)
class Layout:
    """What a family's folder says of it beside the weights.

    ``texts`` maps text encoders to their activation and the token that fills texts up, None for CLIP's own.
    """

    pipeline: str
    scheduler: str
    unet: Callable[[Tensors], dict[str, Any]]
    scaling_factor: float
    texts: Mapping[str, tuple[str, str | None]]
    more: Mapping[str, Any]


NO_CHECKER = {
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}


def _sd2_unet(sd: Tensors) -> dict[str, Any]:
    return {**unet_config(sd, heads=heads_of), "use_linear_projection": True}


LAYOUTS: Mapping[str, Layout] = {
    "sd15": Layout(
        "StableDiffusionPipeline",
        "PNDMScheduler",
        sd15.config_of,
        sd15.SCALING_FACTOR,
        {"text_encoder": ("quick_gelu", None)},
        NO_CHECKER,
    ),
    "sd2": Layout(
        "StableDiffusionPipeline",
        "PNDMScheduler",
        _sd2_unet,
        sd2.SCALING_FACTOR,
        {"text_encoder": ("gelu", OPENCLIP_PAD)},
        NO_CHECKER,
    ),
    "sdxl": Layout(
        "StableDiffusionXLPipeline",
        "EulerDiscreteScheduler",
        sdxl_unet.config_of,
        sdxl.SCALING_FACTOR,
        {"text_encoder": ("quick_gelu", None), "text_encoder_2": ("gelu", OPENCLIP_PAD)},
        {"force_zeros_for_empty_prompt": True},
    ),
}


def to_folder(
    checkpoint: Path, output: Path, *, vae: Path | None = None, tokenizer: Path | None = None, tell: Tell
) -> list[str]:
    """Write a single-file checkpoint as a diffusers folder; returns the tensors that have no place in it.

    ``tokenizer`` is the folder to copy, found as for training where it is None. Raises LG-TOOL-008, -013,
    LG-BASE errors.
    """
    weights = open_weights(checkpoint)
    name = detect(
        joined(list(parts_of(Source(checkpoint.name, weights)).values())), where=checkpoint.name
    ).name
    if name not in LAYOUTS:
        raise LoraGraftError(
            "LG-TOOL-013",
            "A single file of this model is not turned into a folder.",
            where=f"{checkpoint.name}: {name}",
            why="its folder says more than the weights tell.",
            fix="use the file as it is: training and ComfyUI read it; the model's authors publish the folder",
        )
    base = open_file(checkpoint, tokenizer=tokenizer, vae=vae)
    layout = LAYOUTS[base.family.name]
    parts = _in_folder(base)
    for part, source in parts.items():
        inside = output / base.family.folders[part]
        _write_weights(inside / f"{FILES.get(part, TEXT_FILE)}.safetensors", source, tell)
        _write_json(inside / "config.json", _config(part, source, layout))
    for part, (_, pad) in layout.texts.items():
        _copy_tokenizer(
            base.tokenizer_folders["clip"], output / part.replace("text_encoder", "tokenizer"), pad
        )
    _write_json(output / "scheduler" / "scheduler_config.json", _scheduler(base, layout))
    _write_json(output / "model_index.json", _index(parts, layout))
    return sorted(_left_out(weights, base))


def _write_weights(file: Path, source: Tensors, tell: Tell) -> None:
    forms: dict[str, Form] = {k: (source[k].dtype, tuple(source[k].shape)) for k in sorted(source)}
    write_stream(file, forms, lambda name: unpacked(source[name]), {"format": "pt"}, tell=tell)


def _in_folder(base: Base) -> dict[str, Tensors]:
    """Return the parts as a folder holds them: SD2.x's projections are matrices there."""
    parts = dict(base.state_dicts)
    if base.family.name == "sd2":
        unet = parts["denoiser"]
        kernels = (k for k in unet if k.endswith(KERNEL) and unet[k].ndim == 4)
        parts["denoiser"] = Renamed(unet, {k: k for k in unet}, matrices=frozenset(kernels))
    return parts


def _config(part: str, sd: Tensors, layout: Layout) -> dict[str, Any]:
    if part == "denoiser":
        return {"_class_name": "UNet2DConditionModel", **layout.unet(sd)}
    if part == "vae":
        return {"_class_name": "AutoencoderKL", **vae_config(sd, scaling_factor=layout.scaling_factor)}
    config = text_config(sd, activation=layout.texts[part][0])
    projected = {"projection_dim": sd[PROJECTION].shape[0]} if PROJECTION in sd else {}
    return {
        "architectures": [_text_class(sd)],
        "model_type": "clip_text_model",
        **config,
        **projected,
    }


def _text_class(sd: Tensors) -> str:
    return "CLIPTextModelWithProjection" if PROJECTION in sd else "CLIPTextModel"


def _scheduler(base: Base, layout: Layout) -> dict[str, Any]:
    said: dict[str, Any] = {"_class_name": layout.scheduler, **NOISE}
    said["prediction_type"] = "v_prediction" if base.velocity else "epsilon"
    if base.zero_terminal:
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return said


def _index(parts: Mapping[str, Tensors], layout: Layout) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": layout.pipeline, **layout.more}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for part in layout.texts:
        index[part] = ["transformers", _text_class(parts[part])]
        index[part.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    return {**index, "scheduler": ["diffusers", layout.scheduler]}


def _copy_tokenizer(source: str, target: Path, pad: str | None) -> None:
    """Copy a tokenizer; ``pad`` is the token that fills texts up, where it is another than the source's."""
    target.mkdir(parents=True, exist_ok=True)
    if not Path(source).is_dir():  # a name that the hub's cache knows
        tokenizer = load_tokenizer(source)
        tokenizer.pad_token = pad or tokenizer.pad_token
        tokenizer.save_pretrained(target)
        return
    for file in (Path(source) / name for name in TOKENIZER_FILES):
        if file.is_file() and (pad is None or file.name in VOCABULARY):
            shutil.copyfile(file, target / file.name)
        elif file.is_file():
            told = json.loads(file.read_text(encoding="utf-8"))
            _write_json(target / file.name, {**told, "pad_token": pad})


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(values, indent=2) + "\n")


class _Watched(Mapping[str, torch.Tensor]):
    """Tensors that note which of them were asked for."""

    def __init__(self, source: Tensors) -> None:
        self._source = source
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked.add(name)
        return self._source[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


def _left_out(weights: Tensors, base: Base) -> list[str]:
    """List what a single file holds beside the models."""
    watched = _Watched(weights)
    parts = parts_of(Source(base.name, watched))
    for own in base.family.split(joined(list(parts.values()))).values():
        for name in own:
            own[name]
    return [key for key in weights if key not in watched.asked]
