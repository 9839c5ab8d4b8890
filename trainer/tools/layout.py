"""A checkpoint from a diffusers folder to a single file and back, SD1.x: names change, no value does.

The folder is diffusers' own form: unet, vae, text_encoder, tokenizer, scheduler and model_index.json.
Constants of the noise schedule, which a single file may hold, are left out: every loader makes them for
itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import LoraGraftError, listed
from ..families import ldm_keys as keys
from ..families.autoencoder import vae_config
from ..families.clip_text import text_config
from ..families.opening import open_file, open_folder
from ..families.sd15 import SCALING_FACTOR, SD15, config_of
from ..families.tokenizers import find_tokenizer
from ..safefile import write_text
from .lora_file import check_free
from .stream import Form, open_weights, write_stream

Tensors = Mapping[str, torch.Tensor]
FILES = {"denoiser": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
Named = dict[str, tuple[Tensors, str, bool]]  # a tensor's source, its name there, and if it becomes a kernel
Tell = Callable[[int, int], None]


def _quiet(done: int, total: int) -> None:
    """Tell nobody."""


def convert_checkpoint(
    model: Path,
    output: Path,
    *,
    vae: Path | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    tell: Tell = _quiet,
) -> list[str]:
    """Convert a folder to a file or a file to a folder; returns what is to be said of it."""
    if not model.is_dir():
        lost = to_folder(model, output, vae=vae, tokenizer=tokenizer, overwrite=overwrite, tell=tell)
        return [f"Not in the folder: {listed(lost, limit=3)}"] if lost else []
    if output.suffix.lower() != ".safetensors":
        raise LoraGraftError(
            "LG-TOOL-005",
            f"'{output.name}' is no name for a single-file checkpoint.",
            where="output",
            why="it must end with .safetensors.",
            fix=f"write {output.name}.safetensors",
        )
    to_single_file(model, output, vae=vae, overwrite=overwrite, tell=tell)
    return []


def to_single_file(
    folder: Path, output: Path, *, vae: Path | None = None, overwrite: bool = False, tell: Tell = _quiet
) -> None:
    """Write a diffusers folder as one .safetensors file; ``vae`` is another VAE's file.

    Raises LG-TOOL-004, -008, -013, LG-BASE errors.
    """
    check_free(output, overwrite=overwrite)
    parts = open_folder(folder, tokenizer=_own_tokenizer(folder)).state_dicts
    named: Named = {}
    for new, old in keys.unet_to_ldm(parts["denoiser"]).items():
        named[keys.UNET_PREFIX + new] = parts["denoiser"], old, False
    for new, old in keys.vae_to_ldm(parts["vae"]).items():
        named[keys.VAE_PREFIX + new] = parts["vae"], old, keys.is_vae_attention_weight(new)
    named |= {keys.TEXT_PREFIX + key: (parts["text_encoder"], key, False) for key in parts["text_encoder"]}
    used = {(id(source), old) for source, old, _ in named.values()}
    lost = [key for source in parts.values() for key in source if (id(source), key) not in used]
    if lost:
        raise _unfit(folder, lost)
    if vae is not None:
        named = _with_vae(named, vae)

    def made(name: str) -> torch.Tensor:
        source, old, as_kernel = named[name]
        return source[old][..., None, None] if as_kernel else source[old]

    forms: dict[str, Form] = {name: (made(name).dtype, tuple(made(name).shape)) for name in sorted(named)}
    write_stream(output, forms, made, {}, tell=tell)


def to_folder(
    checkpoint: Path,
    output: Path,
    *,
    vae: Path | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    tell: Tell = _quiet,
) -> list[str]:
    """Write a single-file checkpoint as a diffusers folder; returns the tensors that have no place in it.

    ``tokenizer`` is the folder to copy, found as for training where it is None. Raises LG-TOOL-004, -008,
    LG-BASE errors.
    """
    check_free(output, overwrite=overwrite)
    tokenizer_folder = Path(find_tokenizer(tokenizer))
    weights = open_weights(checkpoint)
    parts: dict[str, Tensors] = dict(open_file(checkpoint, tokenizer=tokenizer_folder).state_dicts)
    if vae is not None:
        parts["vae"] = _vae_parts(vae)
    configs: dict[str, dict[str, Any]] = {
        "denoiser": {"_class_name": "UNet2DConditionModel", **config_of(parts["denoiser"])},
        "vae": {"_class_name": "AutoencoderKL", **vae_config(parts["vae"], scaling_factor=SCALING_FACTOR)},
        "text_encoder": {"architectures": ["CLIPTextModel"], **text_config(parts["text_encoder"])},
    }
    configs["text_encoder"]["model_type"] = "clip_text_model"
    for part, source in parts.items():
        inside = output / SD15.folders[part]
        forms: dict[str, Form] = {k: (source[k].dtype, tuple(source[k].shape)) for k in sorted(source)}
        file = inside / f"{FILES[part]}.safetensors"
        write_stream(file, forms, source.__getitem__, {"format": "pt"}, tell=tell)
        write_text(inside / "config.json", json.dumps(configs[part], indent=2) + "\n")
    _copy_tokenizer(tokenizer_folder, output / "tokenizer")
    write_text(output / "scheduler" / "scheduler_config.json", json.dumps(SCHEDULER, indent=2) + "\n")
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **CLASSES}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    write_text(output / "model_index.json", json.dumps(index, indent=2) + "\n")
    kept = sum(len(part) for part in parts.values())
    return [] if kept == len(weights) else sorted(_left_out(weights))


def _left_out(weights: Tensors) -> list[str]:
    """List what a single file holds beside the three models."""
    split = SD15().split(weights)
    used = {old for part in split.values() for old in part.names.values()}  # type: ignore[attr-defined]
    return [key for key in weights if key not in used]


def read_vae(path: Path) -> dict[str, torch.Tensor]:
    """Return a VAE's tensors under diffusers' names: from a VAE file of either layout, or a checkpoint's VAE.

    Raises LG-TOOL-008, -013.
    """
    return _vae_parts(path)


def _vae_parts(path: Path) -> dict[str, torch.Tensor]:
    weights = open_weights(path)
    plain = {k.removeprefix(keys.VAE_PREFIX): k for k in weights if _is_vae(k)}
    if any(k.startswith("decoder.up_blocks.") for k in plain):
        return {k: weights[old] for k, old in plain.items()}
    names = keys.vae_to_diffusers(plain)
    if not any(k.startswith("decoder.") for k in names):
        raise _unfit(path, list(weights)[:3])
    return {
        new: weights[plain[old]].flatten(1) if keys.is_vae_attention_weight(old) else weights[plain[old]]
        for new, old in names.items()
    }


def _is_vae(key: str) -> bool:
    beginnings = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    return key.startswith(keys.VAE_PREFIX) or key.startswith(beginnings)


def _with_vae(named: Named, path: Path) -> Named:
    source = _vae_parts(path)
    kept = {name: entry for name, entry in named.items() if not name.startswith(keys.VAE_PREFIX)}
    return kept | {
        keys.VAE_PREFIX + new: (source, old, keys.is_vae_attention_weight(new))
        for new, old in keys.vae_to_ldm(source).items()
    }


def _own_tokenizer(folder: Path) -> Path | None:
    """Return the folder's tokenizer: converting needs none, but opening asks for one."""
    return folder / "tokenizer" if (folder / "tokenizer" / "vocab.json").is_file() else None


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _unfit(path: Path, names: list[str]) -> LoraGraftError:
    return LoraGraftError(
        "LG-TOOL-013",
        f"'{path.name}' is not of the architecture SD1.x.",
        where=listed(names, limit=3),
        why="these tensors have no place in the other layout.",
        fix="convert an SD1.x model: U-Net, VAE and CLIP text encoder",
    )
