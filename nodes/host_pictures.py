"""Pictures between ComfyUI and the trainer: images, masks, upscale models, and how much memory is free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management as management
import numpy as np
import torch
from PIL import Image

from ..trainer import api
from ..trainer.errors import LoraGraftError

# What an upscale model takes beside its weights, as ComfyUI's own node reckons it.
BYTES_PER_TILE = 512 * 512 * 3 * 4 * 384


def free_memory() -> int:
    """Return how many bytes of main memory are free."""
    return int(management.get_free_memory(torch.device("cpu")))


# ---- images and masks ----


def image_tensor(picture: Image.Image) -> torch.Tensor:
    """Return a picture as ComfyUI's IMAGE: (1, H, W, 3) float32 in 0..1."""
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32)).div_(255)[None]


def mask_tensor(mask: Image.Image) -> torch.Tensor:
    """Return a grey picture as ComfyUI's MASK: (1, H, W) float32 in 0..1."""
    return torch.from_numpy(np.array(mask, dtype=np.float32)).div_(255)[None]


def pictures_of(images: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Return each picture of a list of IMAGE batches as (H, W, C) float32."""
    return [picture.detach().float().cpu().numpy() for batch in images for picture in _batch(batch, 4)]


def masks_of(masks: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Return each mask of a list of MASK batches as (H, W) float32."""
    return [mask.detach().float().cpu().numpy() for batch in masks for mask in _batch(batch, 3)]


def _batch(tensor: torch.Tensor, dims: int) -> torch.Tensor:
    return tensor[None] if tensor.dim() == dims - 1 else tensor


# ---- upscaling ----


def upscaler(model: Any) -> api.Upscaler:
    """Return what UPSCALE_MODEL does, on the device that ComfyUI chose for it; raises LG-DATA-055."""
    inner = getattr(model, "model", None)
    if not callable(model) or inner is None or not hasattr(model, "scale"):
        raise LoraGraftError(
            "LG-DATA-055",
            "The upscale model cannot be used.",
            where="Crop: upscale_model",
            why=f"it is a {type(model).__name__}, not what Load Upscale Model gives.",
            fix="link Load Upscale Model",
        )
    patcher = getattr(model, "patcher", None)
    device = patcher.load_device if patcher is not None else management.get_torch_device()

    def run(pixels: torch.Tensor) -> torch.Tensor:
        if patcher is not None:  # cheap where it is loaded already
            memory = BYTES_PER_TILE * max(model.scale, 1)
            management.load_models_gpu([patcher], memory_required=memory, force_full_load=True)
        else:
            model.to(device)
        return model(pixels.to(device))

    return api.Upscaler(run, int(model.scale), api.weights_key(inner.state_dict()))
