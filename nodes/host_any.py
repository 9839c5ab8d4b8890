"""Open a base of any MODEL that ComfyUI has loaded, for which the trainer has no family of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, cast

import comfy.model_sampling
import torch
from torch import nn

from ..trainer import api
from .host_checks import check_plain
from .host_family import HostFamily
from .host_packed import plain
from .host_weights import base_name, hashes


def open_any(model: Any, clip: Any, vae: Any) -> api.Base:
    """Open the base that MODEL, CLIP and VAE make, on their own storage; its hash is remembered.

    Raises LG-NODE-002, -004, -005, -017.
    """
    check_plain(model, clip, vae)
    denoiser = model.model.diffusion_model
    state_dicts = {
        "denoiser": {name: plain(w, "MODEL", name) for name, w in denoiser.state_dict().items()},
        "vae": dict(_stored(vae.first_stage_model)),
        "text_encoder": dict(_stored(clip.cond_stage_model)),
    }
    weights = {f"{part}.{name}": w for part, sd in state_dicts.items() for name, w in sd.items()}
    modules = (denoiser, clip.cond_stage_model, vae.first_stage_model)
    family = HostFamily(model, clip, vae)
    known = hashes.find(modules, weights, lambda: api.hash_parts(state_dicts))
    known = _as_used(known, family.sampling, clip)
    # It has no files to be told by, split or joined: what a family does with these is never asked of it.
    return api.Base(cast(Any, family), base_name(model), state_dicts, {}, known)


def _as_used(known: str, sampling: Any, clip: Any) -> str:
    """Return the hash of the weights and of what nodes have set on the MODEL and the CLIP.

    One sampled otherwise predicts something else, and a CLIP stopped at another layer reads otherwise.
    """
    denoiser, vae, text = known.split("-")
    kinds = [c.__name__ for c in type(sampling).__mro__ if c.__module__ == comfy.model_sampling.__name__]
    return f"{_mixed(denoiser, kinds)}-{vae}-{_mixed(text, getattr(clip, 'layer_idx', None))}"


def _mixed(part: str, more: object) -> str:
    return hashlib.sha256(f"{part} {more}".encode()).hexdigest()[:20]


def _stored(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that tell a module from others; it is run by ComfyUI, quantised or not."""
    for name, weight in module.state_dict().items():
        data = getattr(weight, "_qdata", weight)  # what a packed tensor holds
        if isinstance(data, torch.Tensor) and data.device.type != "meta":
            with torch.inference_mode(False):
                view = torch.empty(0, dtype=data.dtype, device=data.device)
                view.set_(data.untyped_storage(), data.storage_offset(), data.size(), data.stride())
            yield name, view
