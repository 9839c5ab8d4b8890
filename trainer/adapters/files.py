"""A LoRA as a file: its number format, its metadata, and what is checked when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import LoraGraftError
from ..safefile import tensor_bytes

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FACTORS = (".dora_scale", ".rescale")
DENOISER_PREFIX = "lora_unet_"
PREDICTION, VELOCITY = "modelspec.prediction_type", "v"  # where metadata says that a base predicts velocity
TERMINAL = "ss_zero_terminal_snr"


def as_saved(tensors: Mapping[str, torch.Tensor], precision: str) -> dict[str, torch.Tensor]:
    """Return the tensors in the file's number format; raises LG-SAVE-003 if a value is not finite there.

    Factors on whole channels stay float32: near 1, half precision would round them by more than they learn.
    """
    dtype = DTYPES[precision]
    saved = {
        name: tensor.to(torch.float32 if name.endswith(FACTORS) else dtype).contiguous()
        for name, tensor in tensors.items()
    }
    for name, tensor in saved.items():
        if not bool(torch.isfinite(tensor).all()):
            raise LoraGraftError(
                "LG-SAVE-003",
                f"The LoRA holds a value that {precision} cannot store.",
                where=name,
                why="the file would draw black or broken images.",
                fix="set save_precision to fp32 or bf16, or train with a lower learning rate",
            )
    return saved


def count_zero(tensors: Mapping[str, torch.Tensor]) -> int:
    """Count the tensors that are all zero: modules that no gradient has reached."""
    return sum(not bool(tensor.any()) for tensor in tensors.values())


def tensor_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 over the tensors' bytes in name order, as modelspec.hash_sha256 wants it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensor_bytes(tensors[name].detach().cpu().contiguous()))
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def read_tensors(path: Path, *, denoiser_only: bool = False) -> dict[str, torch.Tensor]:
    """Read a LoRA's tensors; ``denoiser_only`` leaves out the text encoders'."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [n for n in file.keys() if not denoiser_only or n.startswith(DENOISER_PREFIX)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def compact(value: object) -> str:
    """Return JSON text for a metadata field, keys sorted so that equal content gives equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _unreadable(path: Path, error: Exception) -> LoraGraftError:
    return LoraGraftError(
        "LG-SAVE-004",
        f"'{path.name}' cannot be read as a LoRA.",
        where=str(path),
        why="it is a folder." if path.is_dir() else str(error)[:200],
        fix="choose a complete .safetensors file; a file cut short must be copied or trained again",
    )
