"""The whole model as a product: the base with the training in it, one file as ComfyUI's loaders read it.

It is made of the base's own weights, wherever these lie, and of a verified checkpoint's LoRA, tensor by
tensor: W + dW is computed in float32 and written in save_precision. The VAE, which is not trained, stays as
it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .adapters.files import DTYPES, read_metadata, read_tensors, tensor_hash
from .checkpoint import Checkpoint
from .config import TrainConfig
from .errors import LoraGraftError
from .families.base import Tensors
from .families.names.ldm_keys import VAE_PREFIX
from .families.names.vae_prefix import NEWER_PREFIX
from .families.opening import Base
from .families.sources.weights import joined
from .metadata import with_workflow
from .publish import SUFFIX, checkpoint_name, sweep
from .tools.bake import merged
from .tools.lora_file import parse
from .tools.stream import write_stream

ARCHITECTURE = "modelspec.architecture"
MARKS = {"v_parameterization": "v_pred", "zero_terminal_snr": "ztsnr"}  # empty tensors, as ComfyUI reads them
CHANGES = "loragraft_changes_hash"  # of the LoRA that is in it: with the base's hash it tells the content
OF_LORAS = "ss_network_"  # what such keys say is a LoRA's; loragraft_settings tells how it was trained


def model_name(folder: Path, wished: str, config: TrainConfig, run_id: str) -> str:
    """Return the name to write under: the wished one, or a numbered one if the file is another's.

    Raises LG-SAVE-005 when it is taken and ``name_taken`` is "refuse".
    """
    name = checkpoint_name(folder, wished, run_id)
    if name != wished and config.name_taken == "refuse":
        raise LoraGraftError(
            "LG-SAVE-005",
            f"The name '{wished}' is taken: another model has it.",
            where=str(folder / f"{wished}{SUFFIX}"),
            why="it would be overwritten.",
            fix="choose another output_name, or set name_taken to 'number'",
        )
    return name


def write_model(
    folder: Path,
    name: str,
    base: Base,
    checkpoint: Checkpoint,
    config: TrainConfig,
    texts: Mapping[str, str],
    workflow: str | None = None,
) -> Path:
    """Write <name>.safetensors: ``base`` with the LoRA of ``checkpoint`` at strength 1, unless it is there.

    ``texts`` are the LoRA's metadata. About one tensor is held in memory. Raises LG-TOOL-010 and -011 where
    the two do not fit or a value cannot be stored, OSError where the disk is full.
    """
    sweep(folder, name)
    file = folder / f"{name}{SUFFIX}"
    tensors = read_tensors(checkpoint.lora_file)
    told = {**_of_model(texts), CHANGES: tensor_hash(tensors)}
    if file.exists() and {**read_metadata(file), "workflow": ""} == {**told, "workflow": ""}:
        return file
    lora = parse(tensors, name=checkpoint.lora_file.name)
    forms, made = merged(_weights(base, config), [(lora, 1.0)], base.name, dtype_of(config))
    write_stream(file, forms, made, with_workflow(told, workflow))
    return file


def dtype_of(config: TrainConfig) -> Callable[[str, torch.dtype], torch.dtype]:
    """Return the rule by which number format each tensor of the file has."""
    wanted = DTYPES[config.save_precision]
    return lambda name, own: own if name.startswith((VAE_PREFIX, NEWER_PREFIX)) else wanted


def model_bytes(base: Base, config: TrainConfig) -> int:
    """Return how large the file will be, but for its header."""
    weights = _weights(base, config)
    form = dtype_of(config)
    return sum(form(n, weights[n].dtype).itemsize * math.prod(weights[n].shape) for n in weights)


def _weights(base: Base, config: TrainConfig) -> Tensors:
    """Return the base's weights under single-file names, with what tells loaders how it was trained."""
    marks = {mark: torch.empty(0) for name, mark in MARKS.items() if getattr(config, name)}
    return joined([base.family.join(base.state_dicts), marks])


def _of_model(texts: Mapping[str, str]) -> dict[str, str]:
    """Return a LoRA's metadata without what says that the file is one."""
    kept = {key: text for key, text in texts.items() if not key.startswith(OF_LORAS)}
    return {**kept, ARCHITECTURE: texts[ARCHITECTURE].removesuffix("/lora")}
